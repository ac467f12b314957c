"""Diff-In against a per-sample implementation of the authors' procedure: pairs per second, and agreement of the scores.

    python -m tests.benchmarks.reference_procedure [--model 27m] [--batch 128] [--target 512] [--reference 64]
        [--values 64] [--timed 2] [--threads 2]

For every pair and checkpoint the procedure of the authors' example (github.com/hrtan/Diff-In) loads the checkpoint from
disk, takes the gradients of the pair's loss, of a batch B and of the target V, two Hessian products as forward
differences of gradients (Eq. 6, eps = 1e-3), and their inner product with the target's gradient. It draws B anew for
every pair; here both sides use one B, so that they estimate the same number, and the procedure takes its gradient anew
all the same. `kept` is a kinder form that keeps what does not depend on the pair: the checkpoint in memory, `G_B`, and
`g_V`. A pair's loss is the one of this project (against R), as a contrastive loss has none of a pair alone. Both sides
have the same model, threads and data; the procedure runs fused attention, which backward passes allow. With
`--threads 1` processor time is counted.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.func import functional_call

from pipeline.influence import Batches, Scorer, Settings, prepare
from pipeline.influence.losses import Neighbours, batch_loss, pair_losses, similar_captions
from pipeline.influence.trees import dot, norm, plus
from pipeline.models.clip import PairModel
from pipeline.types import Checkpoint, PairBatch, Tree
from tests.benchmarks.models import cast, digit_pairs, medium_model, small_model, trained_checkpoint
from tests.benchmarks.passes import timed

#: The authors' step, and one at which the forward difference has no error of its own to speak of in float64.
EPSILON, FINE = 1e-3, 1e-6

#: Eq. 9 for SGD, which is what the authors' code computes; N and m only scale it.
SETTINGS = Settings(precondition="none")


@dataclass
class PerSample:
    """The authors' procedure on one checkpoint.

    Args:
        model: run in `eval` mode, as the engine does; the authors' code never calls `eval`.
        file: the checkpoint's tensors, loaded for every pair.
        batches: R, B and V.
        epsilon: the step of Eq. 6.
    """

    model: PairModel
    file: Path
    batches: Batches
    epsilon: float = EPSILON

    def value(self, pair: PairBatch) -> Tensor:
        """`<g_V, H_B G_z + H_z G_B>` of one pair, everything computed for it alone."""
        state = torch.load(self.file, weights_only=True)
        target = self.gradient(self._mean_loss(self.batches.target), state)
        return self._bracket(pair, state, target, self.gradient(self._mean_loss(self.batches.gradient), state))

    def kept(self) -> Callable[[PairBatch], Tensor]:
        """The same with what does not depend on the pair computed once."""
        state = torch.load(self.file, weights_only=True)
        target, of_batch = (
            self.gradient(self._mean_loss(batch), state) for batch in (self.batches.target, self.batches.gradient)
        )
        return lambda pair: self._bracket(pair, state, target, of_batch)

    def _bracket(self, pair: PairBatch, state: Tree, target: Tree, of_batch: Tree) -> Tensor:
        batch_loss, pair_loss = self._mean_loss(self.batches.gradient), self._pair_loss(pair)
        of_pair = self.gradient(pair_loss, state)
        first = self._product(batch_loss, state, of_batch, of_pair)
        second = self._product(pair_loss, state, of_pair, of_batch)
        return dot(target, first) + dot(target, second)

    def gradient(self, loss: Callable[[Tree], Tensor], state: Tree) -> Tree:
        """By backward, on the trainable parameters."""
        names = [name for name, _ in self.model.named_parameters()]
        leaves = {name: state[name].detach().requires_grad_() for name in names}
        found = torch.autograd.grad(loss({**state, **leaves}), list(leaves.values()))
        return dict(zip(names, found, strict=True))

    def _product(self, loss: Callable[[Tree], Tensor], state: Tree, base: Tree, vector: Tree) -> Tree:
        """Eq. 6: the Hessian of a loss times a vector as a forward difference of gradients."""
        scale = self.epsilon / norm(vector)
        there = self.gradient(loss, plus(state, vector, scale))
        return {name: (value - base[name]) / scale for name, value in there.items()}

    def _mean_loss(self, batch: PairBatch) -> Callable[[Tree], Tensor]:
        excluded = similar_captions(batch.captions, batch.captions, False)
        return lambda state: batch_loss(
            functional_call(self.model, state, (batch.images, batch.tokens)), excluded, "clip"
        )

    def _pair_loss(self, pair: PairBatch) -> Callable[[Tree], Tensor]:
        others = self.batches.reference
        near = Neighbours(pair.ids, pair.captions, others.ids, others.captions, False)

        def loss(state: Tree) -> Tensor:
            sides = (functional_call(self.model, state, (b.images, b.tokens)) for b in (pair, others))
            return pair_losses(*sides, near, SETTINGS.family, SETTINGS.loss)[0]

        return loss


def ours(model: PairModel, checkpoint: Checkpoint, batches: Batches) -> Scorer:
    """The engine's scorer of Eq. 9's bracket (`a_t` divided out)."""
    plan = prepare(model, checkpoint, batches, SETTINGS, dataset_size=1, num_checkpoints=1)
    return Scorer(model, [(checkpoint, plan)], batches.reference, SETTINGS)


def agreement(model: PairModel, wide: PairModel, trained: Checkpoint, batches: Batches, pairs: PairBatch) -> None:
    """Print Spearman and relative error of our float32 scores to the procedure's in float64, at two steps of Eq. 6."""
    found = ours(model, trained, batches).score(pairs).terms[:, 0].double() / -(trained.step * trained.lr**2)
    with tempfile.TemporaryDirectory() as folder:
        exact = cast(trained, torch.float64)
        torch.save({**exact.params, **exact.buffers}, file := Path(folder, "checkpoint.pt"))
        for epsilon in (EPSILON, FINE):
            value = PerSample(wide, file, batches, epsilon).kept()
            expected = torch.stack([value(pairs[i : i + 1]) for i in range(len(pairs))])
            error = float((found - expected).abs().max() / expected.abs().max())
            rank = spearmanr(found, expected)[0]
            print(f"  {len(pairs)} pairs, step {epsilon:g}: Spearman {rank:.5f}, error {error:.1e} of the largest")


def rates(model: PairModel, checkpoint: Checkpoint, batches: Batches, pairs: PairBatch, count: int) -> dict[str, float]:
    """Seconds per pair and checkpoint of the procedure, its kinder form and ours; of our preparation per checkpoint."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.save({**checkpoint.params, **checkpoint.buffers}, file := Path(folder, "checkpoint.pt"))
        procedure = PerSample(model, file, batches)
        kept = procedure.kept()
        for name, value in (("procedure", procedure.value), ("kept", kept)):
            value(pairs[:1])
            found[name] = timed(lambda v=value: [v(pairs[i : i + 1]) for i in range(1, count + 1)]) / count
    made: list[Scorer] = []
    found["preparation, once"] = timed(lambda: made.append(ours(model, checkpoint, batches)))
    (scorer,) = made
    scorer._parts[0].observed = False  # the loss and similarity columns are not part of Eq. 9
    with torch.no_grad(), scorer.passes.ready():
        near = scorer.neighbours(pairs)
        scorer._parts[0].score(pairs[:32], scorer.neighbours(pairs[:32]))
        found["ours"] = timed(lambda: scorer._parts[0].score(pairs, near)) / len(pairs)
    return found


def main() -> None:
    """Print rates, ratios and agreement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="27m", help="27m, or one of the shipped configs")
    parser.add_argument("--batch", type=int, default=128, help="pairs in B; 128 is the authors' default")
    parser.add_argument("--target", type=int, default=512, help="pairs in V; 512 is the authors' default")
    parser.add_argument("--reference", type=int, default=64, help="pairs in R")
    parser.add_argument("--values", type=int, default=64, help="pairs whose scores are compared (0: none)")
    parser.add_argument("--timed", type=int, default=2, help="pairs that the procedure is timed on (0: none)")
    parser.add_argument("--steps", type=int, default=8, help="training steps before the checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    build = medium_model if options.model == "27m" else lambda dtype: small_model(options.model, dtype)
    model = build(torch.float32)
    sizes = (options.reference, options.batch, options.target, max(64, options.values))
    parts, pool = [], digit_pairs(model, sum(sizes))
    for size in sizes:
        parts.append(pool[:size])
        pool = pool[size:]
    batches, pairs = Batches(*parts[:3]), parts[3]
    checkpoint = trained_checkpoint(model, parts[2], options.steps, batch=min(64, options.target))
    parameters = sum(value.numel() for value in checkpoint.params.values())
    print(
        f"{options.model}: {parameters / 1e6:.1f}M parameters, {model.image_spec.size[0]} px; |B| {options.batch}, ",
        end="",
    )
    print(f"|V| {options.target}, |R| {options.reference}, {options.threads} threads", flush=True)
    if options.timed:
        found = rates(model, checkpoint, batches, pairs, options.timed)
        for name in ("procedure", "kept"):
            print(
                f"  {name:10} {found[name]:9.4f} s per pair and checkpoint: {found[name] / found['ours']:7.0f} x ours"
            )
        print(
            f"  ours       {found['ours']:9.4f} s, and once per checkpoint {found['preparation, once']:.1f} s",
            flush=True,
        )
    if options.values:
        agreement(model, build(torch.float64), checkpoint, batches, pairs[: options.values])


if __name__ == "__main__":
    main()

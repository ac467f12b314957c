"""How well the projected self-influences rank pairs, against the exact form, and at what cost.

    python -m tests.benchmarks.self_influence [--steps 150] [--pairs 256]

The truth is Eq. 12 (and `<G_z, P G_z>`) with the gradient of every pair and the exact Hessian of B on all parameters.
Costs are tangents per pair and checkpoint, those of `score.projections` and `score.eigenpairs`; the exact form on a
subset of the parameters costs a gradient per pair instead. The last columns say how well a large absolute value finds
the captions that are wrong (a fifth is drawn at random).
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.func import grad

from pipeline.evaluation.quality import auroc
from pipeline.influence import Batches, Scorer, Settings, prepare
from pipeline.influence.forward_mode import push_forward
from pipeline.influence.local import LocalView
from pipeline.influence.losses import Neighbours, pair_losses
from pipeline.influence.trees import dot, tree_map
from pipeline.influence.twice import TwiceDifferentiable
from pipeline.models.clip import PairModel
from pipeline.types import Checkpoint, PairBatch, Tree
from tests.benchmarks.models import digit_pairs, small_model, trained_checkpoint, wrong_captions

PROJECTIONS = (8, 32, 128)
EIGENPAIRS = (2, 8, 32)


def exact_parts(here: LocalView, pairs: PairBatch, reference: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
    """`<G_z, P H_B P G_z>`, `<G_z, P H_z P G_B>` and `<G_z, P G_z>` of every pair, float64 `[b]` each."""
    push = here.preconditioned(here.gradient_loss.gradient(here.state))
    point, bends, own, squares = here.params, [], [], []
    for index in range(len(pairs)):
        pair = pairs[index : index + 1]
        near = Neighbours(pair.ids, pair.captions, reference.ids, reference.captions, False)

        def loss(params: Tree, pair: PairBatch = pair, near: Neighbours = near) -> Tensor:
            state = {**here.state, **params}
            features = here.passes.features(state, pair), here.passes.features(state, reference)
            return pair_losses(*features, near, "clip", "marginal")[0]

        with here.passes.ready(), TwiceDifferentiable():
            gradient, bent = push_forward(grad(loss), (point,), (push,))
        moved = here.preconditioned(tree_map(lambda v: v.detach(), gradient))
        bends.append(dot(moved, here.gradient_loss.hessian_product(here.state, moved)))
        own.append(dot(moved, bent))
        squares.append(dot(moved, gradient))
    return torch.stack(bends), torch.stack(own), torch.stack(squares)


def show(label: str, cost: str, found: Tensor, truth: Tensor, wrong: np.ndarray) -> None:
    """One line of the table."""
    values = found.double().numpy()
    agreement = spearmanr(values, truth.numpy())[0]
    print(f"{label:40} {cost:>12} {agreement:9.3f} {auroc(-np.abs(values), wrong):7.3f}", flush=True)


def scored(model: PairModel, checkpoint: Checkpoint, batches: Batches, pairs: PairBatch, settings: Settings) -> Tensor:
    """The estimator's term of every pair, `[b]`."""
    plan = prepare(model, checkpoint, batches, settings, dataset_size=1000, num_checkpoints=1)
    return Scorer(model, [(checkpoint, plan)], batches.reference, settings).score(pairs).terms[:, 0]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="digits-vit")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--pairs", type=int, default=256)
    options = parser.parse_args()
    model = small_model(options.model)
    pool = digit_pairs(model, 1024)
    checkpoint = trained_checkpoint(model, pool, options.steps)
    batches = Batches(pool[:64], pool[64:128], pool[128:192])
    pairs, wrong = pool[192 : 192 + options.pairs], wrong_captions(1024)[192 : 192 + options.pairs]
    print(f"{options.model}, {options.steps} AdamW steps, {options.pairs} pairs, {wrong.mean():.0%} wrong captions")
    print(f"{'form':40} {'cost':>12} {'Spearman':>9} {'AUROC':>7}")
    base = Settings(estimator="diff-in-self")
    bend, own, square = exact_parts(LocalView(model, checkpoint, batches, base), pairs, batches.reference)
    truth = -(bend + own)
    positive = float((truth > 0).double().mean())
    print(f"Eq. 12: {positive:.0%} of the scores positive; AUROC of low score {auroc(truth.numpy(), wrong):.3f}, ")
    print(f"  of high score {auroc(-truth.numpy(), wrong):.3f}; size of the two parts "
          f"{float(bend.abs().median()):.2e}, {float(own.abs().median()):.2e}")  # fmt: skip
    show("diff-in-self, exact", "", truth, truth, wrong)
    show("  its part with H_B alone", "", -bend, truth, wrong)
    show("tracin-self, exact", "", square, square, wrong)
    for count in PROJECTIONS:
        settings = replace(base, estimator="tracin-self", projections=count)
        show(f"tracin-self, {count} projections", f"{count}", scored(model, checkpoint, batches, pairs, settings),
             square, wrong)  # fmt: skip
    for eigenpairs in EIGENPAIRS:
        for count in PROJECTIONS:
            settings = replace(base, projections=count, eigenpairs=eigenpairs)
            found = scored(model, checkpoint, batches, pairs, settings)
            label = f"diff-in-self, {count} projections, {eigenpairs} eigenpairs"
            show(label, f"{2 * count + eigenpairs}", found, truth, wrong)
    for choice in ("last-2-blocks", "last-1-blocks", "projections"):
        part = LocalView(model, checkpoint, batches, replace(base, parameters=choice))
        some_bend, some_own, some_square = exact_parts(part, pairs, batches.reference)
        show(f"diff-in-self, exact on {choice}", "gradient", -(some_bend + some_own), truth, wrong)
        show(f"tracin-self, exact on {choice}", "gradient", some_square, square, wrong)


if __name__ == "__main__":
    main()

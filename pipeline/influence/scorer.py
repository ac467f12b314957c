"""Scores pairs: a batch in, one term per checkpoint out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.influence.hashing import signed, uniform
from pipeline.influence.losses import Neighbours, error_norms, pair_losses, similarities
from pipeline.influence.memory import halving
from pipeline.influence.passes import Jet, Passes, chunks, derivative, joined, joined_jets, pass_size
from pipeline.influence.per_pair import self_values
from pipeline.influence.plan import Point, Probe, ProbePlan
from pipeline.influence.regressor import Observed
from pipeline.influence.settings import ScoreBatch, Settings
from pipeline.influence.transfers import on_device
from pipeline.influence.trees import moved, to_device
from pipeline.types import Checkpoint, Features, PairBatch, Tree

#: Pairs on the device at once: weights are moved to the point of a probe, and losses taken, once for all of them.
_BLOCK = 1024

#: Bytes of random vectors that are held at a time; a pass along several holds them a second time.
_DRAWN_BYTES = 4 * 2**30

#: Quantities that are not computed from the features of a pass.
_WITHOUT_JETS = ("random", "gradient-square", "self-bracket")


class Scorer:
    """Evaluates the plans of all checkpoints for batches of pairs.

    A pair's terms depend on the pair, the checkpoints and R alone, not on the other pairs of the batch.

    Args:
        model: `model(images, tokens)` gives `Features`; moved to `device`.
        checkpoints: each checkpoint with its plan; all runs, in the order of the terms.
        reference: R.
        settings: as for `prepare`.
        device: where passes run; weights, vectors and R's features of all checkpoints stay there.
        batch_size: pairs per pass; on a CPU at most 32 to 128 of them, by the size of the model's activations, on a GPU
            fewer once its memory does not hold so many.
        trained: for each run by its number, the ids of the pairs that it was trained on (int64, ascending): a pair is
            then scored only by the other runs, whose terms are scaled up to stand for all. None scores by all runs.
        compiled: whether passes with derivatives are compiled: a first program when the scorer starts, another one for
            each new length of captions in a part that has more than half of `batch_size` pairs.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Sequence[tuple[Checkpoint, ProbePlan]],
        reference: PairBatch,
        settings: Settings,
        device: torch.device | str = "cpu",
        batch_size: int = 1024,
        trained: Mapping[int, Tensor] | None = None,
        compiled: bool = False,
    ) -> None:
        self.settings = settings
        self.device = torch.device(device)
        self.reference = reference.to(self.device)
        model = model.to(self.device)
        self.batch_size = pass_size(batch_size, model, self.reference)
        self.passes = Passes(model, settings, self.batch_size if compiled else 0)
        # A gradient per pair goes backwards through a pass, which not every operator does in mixed precision.
        self.precise = Passes(model, replace(settings, precision="fp32"))
        self.trained = {run: to_device({"ids": ids}, self.device)["ids"] for run, ids in (trained or {}).items()}
        last = {checkpoint.run: index for index, (checkpoint, _) in enumerate(checkpoints)}
        self._last = set(last.values())
        self._runs = list(last)
        with self.passes.ready():
            self._parts = [
                _CheckpointScorer(self, checkpoint, plan, observed=index in self._last)
                for index, (checkpoint, plan) in enumerate(checkpoints)
            ]
            if compiled:
                self._compile()

    def score(self, batch: PairBatch) -> ScoreBatch:
        """Terms, loss, similarity and embedding of each pair of the batch, in its order.

        Raises `InputError` for a batch without pairs.
        """
        if not len(batch):
            raise InputError("expected at least one pair to score, found none")
        order = _by_caption_length(batch.tokens)
        parts: list[ScoreBatch] = []
        with torch.no_grad(), self.passes.ready():
            for block in on_device(batch, order, _BLOCK, self.device):
                parts.append(self._score(block))
        restore = order.argsort()
        return ScoreBatch(
            *(torch.cat([getattr(part, name) for part in parts])[restore] for name in ScoreBatch.__slots__)
        )

    def observe(self, batch: PairBatch) -> Observed:
        """What the forward pass at the last checkpoint of each run shows of the batch, in its order; no tangents."""
        order = _by_caption_length(batch.tokens)
        with torch.no_grad(), self.passes.ready(differentiable=False):
            parts = [self._observe(block) for block in on_device(batch, order, _BLOCK, self.device)]
        return Observed(*(torch.cat([getattr(part, name) for part in parts]) for name in Observed.__slots__))[
            order.argsort()
        ]

    def _observe(self, batch: PairBatch) -> Observed:
        embedding: list[Tensor] = []
        seen: list[tuple[Tensor, Tensor]] = []
        counts: list[Tensor] = []
        everyone = self.neighbours(batch)
        for part in (part for part in self._parts if part.observed):
            rows = self._held_out(part.run, batch)
            # The last run's embedding is wanted of every pair.
            whole = bool(rows.all()) or part is self._parts[-1]
            taken = torch.ones_like(rows) if whole else rows
            sides = torch.zeros(len(batch), 2 * self._width, dtype=torch.float16, device=self.device)
            values = torch.full((2, len(batch)), torch.nan, dtype=part.dtype, device=self.device)
            if taken.any():
                some = batch if whole else batch[taken]
                loss, features = part.observe(some, everyone if whole else self.neighbours(some))
                sides[taken] = torch.cat([features.image, features.text], 1).half()
                values[:, taken] = torch.stack([loss, similarities(features)])
            values[:, ~rows] = torch.nan
            embedding.append(sides.cpu())
            seen.append((values[0], values[1]))
            counts.append(rows.cpu())
        loss, similarity = (torch.stack(values).nanmean(0).float().cpu() for values in zip(*seen, strict=True))
        return Observed(torch.stack(embedding, 1), torch.stack(counts, 1), loss, similarity)

    @property
    def _width(self) -> int:
        """Values of one side of an embedding."""
        return self._parts[-1].reference_jets[()][()].image.shape[1]

    def _score(self, batch: PairBatch) -> ScoreBatch:
        held_out = {run: self._held_out(run, batch) for run in self._runs}
        everyone = self.neighbours(batch)
        terms: list[Tensor] = []
        observed: list[tuple[Tensor, Tensor]] = []
        features: Features | None = None
        for part in self._parts:
            rows = held_out[part.run]
            all_of_them = bool(rows.all())
            some = batch if all_of_them else batch[rows]
            term, seen = part.score(some, everyone if all_of_them else self.neighbours(some))
            terms.append(_spread(term, rows))
            if seen is not None:
                loss, found = seen
                observed.append((_spread(loss, rows), _spread(similarities(found), rows)))
                features = found if all_of_them else None
        features = features if features is not None else self._parts[-1].features(batch)
        counting = torch.stack(list(held_out.values()), 1).sum(1)
        return ScoreBatch(
            terms=(torch.stack(terms, 1) * (len(held_out) / counting)[:, None]).cpu(),
            counts=torch.stack([held_out[part.run] for part in self._parts], 1).cpu(),
            loss=torch.stack([loss for loss, _ in observed]).nanmean(0).cpu(),
            similarity=torch.stack([similarity for _, similarity in observed]).nanmean(0).cpu(),
            embedding=torch.cat([features.image, features.text], 1).half().cpu(),
        )

    def _held_out(self, run: int, batch: PairBatch) -> Tensor:
        """Bool `[b]`: the pairs that `run` scores."""
        ids = self.trained.get(run)
        if ids is None or not len(ids):
            return torch.ones(len(batch), dtype=torch.bool, device=self.device)
        places = torch.searchsorted(ids, batch.ids).clamp(max=len(ids) - 1)
        return ids[places] != batch.ids

    def in_parts(self, pairs: PairBatch, work: Callable[[PairBatch], Jet]) -> list[Jet]:
        """What `work` gives for consecutive parts; where a GPU's memory does not hold one, they are halved for good."""
        most = min(self.batch_size, len(pairs))

        def run(size: int) -> list[Jet]:
            if size < most:
                self.batch_size = size
                if self.passes.programs is not None:
                    self.passes.programs.size = size
            return [work(part) for part in chunks(pairs, size)]

        return halving(run, most)

    def _compile(self) -> None:
        """Compile a first program, by passes over pairs of R: what cannot be compiled fails before any shard."""
        for part in self._parts:
            for point, wanted in part.wanted.items():
                if any(wanted):
                    part._jet(point, self.reference[: self.batch_size])
                    return

    def neighbours(self, batch: PairBatch) -> Neighbours:
        """Which members of R are negatives of which pair of the batch."""
        ignore = self.settings.equal_captions == "ignore"
        reference = self.reference
        return Neighbours(batch.ids, batch.captions, reference.ids, reference.captions, ignore)


class _CheckpointScorer:
    """One checkpoint's tensors and plan on the device, with R's features and their derivatives at every point."""

    def __init__(self, scorer: Scorer, checkpoint: Checkpoint, plan: ProbePlan, observed: bool) -> None:
        self.scorer = scorer
        self.plan = plan
        self.observed = observed
        self.run = checkpoint.run
        device = scorer.device
        self.state = to_device({**checkpoint.params, **checkpoint.buffers}, device)
        self.vectors = {name: to_device(tree, device) for name, tree in plan.vectors.items()}
        self.wanted: dict[Point, list[tuple[str, ...]]] = {}
        # A derivative along zero is zero: no pass for it.
        self.probes = [probe for probe in plan.probes if all(self._stored(name) for name in probe.along)]
        for probe in self.probes:
            if probe.of not in _WITHOUT_JETS:
                self.wanted.setdefault(probe.at, []).append(probe.along)
        if observed:
            self.wanted.setdefault((), []).append(())
        self.reference_jets = {
            point: _on(device, plan.reference[point]) if point in plan.reference else self._jet(point, scorer.reference)
            for point in self.wanted
        }

    def _jet(self, point: Point, pairs: PairBatch) -> Jet:
        scorer, wanted = self.scorer, self.wanted[point]
        with torch.no_grad():
            state = self._state_at(point)
            found: Jet = {}
            for names, vectors in self._in_memory(wanted):
                work = partial(scorer.passes.jet, state, vectors, wanted=names)
                found |= joined_jets(scorer.in_parts(pairs, work))
            return found

    def _in_memory(self, wanted: list[tuple[str, ...]]) -> Iterator[tuple[list[tuple[str, ...]], dict[str, Tree]]]:
        """What is wanted, in parts whose vectors fit into memory together; with each part its vectors."""
        drawn = self.plan.drawn
        names = [each for each in wanted if not drawn.keys() & set(each)]
        rest = [each for each in wanted if drawn.keys() & set(each)]
        width = max(1, _DRAWN_BYTES // max(1, _bytes(self._stored(rest[0][0])))) if rest else 1
        for start in range(0, max(len(rest), 1), width):
            names += rest[start : start + width]
            yield names, {name: self._vector(name) for each in names for name in each}
            names = []

    def _stored(self, name: str) -> Tree:
        """The vector itself, or for one that is drawn the vector whose entries get random signs."""
        drawn = self.plan.drawn.get(name)
        return self.vectors[name if drawn is None else drawn.of]

    def _vector(self, name: str) -> Tree:
        drawn = self.plan.drawn.get(name)
        return self.vectors[name] if drawn is None else signed(self.vectors[drawn.of], drawn.seed, drawn.index)

    def _state_at(self, point: Point) -> Tree:
        state = self.state
        for name, coefficient in point:
            state = moved(state, self.vectors[name], coefficient)
        return state

    def score(self, batch: PairBatch, near: Neighbours) -> tuple[Tensor, tuple[Tensor, Features] | None]:
        """The term of each pair `[b]`, and where observed its loss and features at the checkpoint itself."""
        total = torch.zeros(len(batch), dtype=self.dtype, device=batch.images.device)
        if not len(batch):
            return total, (total, Features(total[:, None], total[:, None], total, total)) if self.observed else None
        jets = {point: self._jet(point, batch) for point in self.wanted}
        for probe in self.probes:
            total = total + probe.weight * self._value(probe, batch, jets, near) ** probe.power
        if self.plan.root_weight is not None:
            total = self.plan.root_weight * total.sqrt()
        if not self.observed:
            return total, None
        features = jets[()][()]
        loss = self._pair_losses(near)(features, self.reference_jets[()][()])
        return total, (loss, features)

    def features(self, batch: PairBatch) -> Features:
        """Features of a batch at the checkpoint itself."""
        work = partial(self.scorer.passes.jet, self.state, {}, wanted=[()])
        return joined([jet[()] for jet in self.scorer.in_parts(batch, work)])

    def observe(self, batch: PairBatch, near: Neighbours) -> tuple[Tensor, Features]:
        """Loss and features of the pairs at the checkpoint itself."""
        features = self.features(batch)
        return self._pair_losses(near)(features, self.reference_jets[()][()]), features

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of losses: that of the weights, float32 at least."""
        dtype = next(value.dtype for value in self.state.values() if value.is_floating_point())
        return dtype if dtype.itemsize >= 4 else torch.float32

    def _pair_losses(self, near: Neighbours) -> Callable[[Features, Features], Tensor]:
        settings = self.scorer.settings
        return lambda pairs, reference: pair_losses(pairs, reference, near, settings.family, settings.loss)

    def _value(self, probe: Probe, batch: PairBatch, jets: dict[Point, Jet], near: Neighbours) -> Tensor:
        settings = self.scorer.settings
        if probe.of == "random":
            return uniform(batch.ids, settings.seed)
        if probe.of in ("gradient-square", "self-bracket"):
            return self_values(
                self.scorer.precise,
                self.state,
                self.vectors,
                batch,
                self.scorer.reference,
                lambda pairs, others, beside: self._pair_losses(beside)(pairs, others),
                self.scorer.neighbours,
                bracket=probe.of == "self-bracket",
            )
        pairs, reference = jets[probe.at], self.reference_jets[probe.at]
        if probe.of == "loss":
            return derivative(self._pair_losses(near), [pairs, reference], probe.along)
        here, others = pairs[()], reference[()]
        if probe.of == "similarity":
            return similarities(here)
        if probe.of == "neg-clip-loss":
            return -pair_losses(here, others, near, settings.family, "row") / here.scale
        return error_norms(here, others, near, settings.family)


def random_bytes(plan: ProbePlan) -> int:
    """The most bytes that the random vectors of a plan take at a time, with the copy of those in a pass."""
    sizes = [_bytes(plan.vectors[drawn.of]) for drawn in plan.drawn.values()]
    return 2 * min(sum(sizes), max(_DRAWN_BYTES, *sizes)) if sizes else 0


def _bytes(tree: Tree) -> int:
    return sum(value.numel() * value.element_size() for value in tree.values())


def _spread(values: Tensor, rows: Tensor) -> Tensor:
    """Values of the rows where `rows` `[b]` is true, as `[b]` with NaN elsewhere."""
    return values.new_full((len(rows),), torch.nan).masked_scatter(rows, values)


def with_reference(
    model: nn.Module,
    checkpoint: Checkpoint,
    plan: ProbePlan,
    reference: PairBatch,
    settings: Settings,
    batch_size: int = 1024,
) -> ProbePlan:
    """The plan with what scoring needs of R, computed on the model's device, kept on the CPU."""
    device = next(model.parameters()).device
    (part,) = Scorer(model, [(checkpoint, plan)], reference, settings, device, batch_size)._parts
    return replace(plan, reference={point: _on("cpu", jet) for point, jet in part.reference_jets.items()})


def _on(device: torch.device | str, jet: Jet) -> Jet:
    return {names: Features(*(value.to(device) for value in features)) for names, features in jet.items()}


def _by_caption_length(tokens: Tensor) -> Tensor:
    """An order of pairs in which captions of equal length are neighbours."""
    return (tokens != 0).sum(1).argsort(stable=True)

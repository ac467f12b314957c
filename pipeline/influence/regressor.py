"""Predicts the terms of pairs that were not scored from what one forward pass shows of them.

Influence is a smooth function of the embedding, so a regression on a sample of scored pairs predicts the rest. Each
proxy run has a regression of its own, on its own embedding: ridge, and if wanted a small network on what ridge leaves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.types import Tree

#: Share of a term's values at either end that are clipped before fitting, as a few outliers would decide the fit.
TAIL = 0.03
#: Ridge penalties tried, as multiples of the number of pairs; features have unit variance.
PENALTIES = tuple(10.0**power for power in (-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2))
#: Hidden units, passes over the pairs, pairs per step, step size and weight decay of the network.
HIDDEN, EPOCHS, BATCH, RATE, DECAY = 64, 60, 256, 1e-3, 0.1


@dataclass(slots=True)
class Observed:
    """What one forward pass at the last checkpoint of each of `r` runs shows of `n` pairs.

    Attributes:
        embedding: float16 `[n, r, 2 d]`, image then text of unit length, in the order of the runs; zeros where a run
            does not count.
        counts: bool `[n, r]`, whether a run counts for a pair: not where only held-out runs do and it saw the pair.
        loss: `[n]`, against the reference batch, mean over the runs that count.
        similarity: `[n]`, cosine of image and text, mean over the same.
    """

    embedding: Tensor
    counts: Tensor
    loss: Tensor
    similarity: Tensor

    def __len__(self) -> int:
        return len(self.loss)

    def __getitem__(self, rows: Tensor) -> Observed:
        return Observed(*(getattr(self, name)[rows] for name in self.__slots__))

    def features(self, run: int) -> Tensor:
        """Image, text, their product, loss and similarity: float32 `[n, 3 d + 2]`, for the `run`-th run."""
        image, text = self.embedding[:, run].float().chunk(2, 1)
        return torch.cat([image, text, image * text, self.loss.float()[:, None], self.similarity.float()[:, None]], 1)


class Regressor:
    """A fitted prediction of terms `[n, m]`.

    Args:
        runs: for each term, the place of its run among the runs of `Observed`.
        parts: for each run, its tensors: `mean`, `scale`, `weight`, `bias`, and of the network `w1`, `b1`, `w2`, `b2`.
    """

    def __init__(self, runs: Sequence[int], parts: Sequence[Tree]) -> None:
        self.runs = torch.tensor(list(runs))
        self.parts = list(parts)

    def predict(self, seen: Observed) -> Tensor:
        """Terms of pairs that one forward pass has seen, float64 `[n, m]`, NaN for runs that do not count.

        Each is as large as if all runs counted, as in `fit`.
        """
        terms = torch.zeros(len(seen), len(self.runs), dtype=torch.float64)
        for run, part in enumerate(self.parts):
            x = (seen.features(run) - part["mean"]) / part["scale"]
            y = x @ part["weight"]
            if "w1" in part:
                y = y + nn.functional.gelu(x @ part["w1"] + part["b1"]) @ part["w2"] + part["b2"]
            terms[:, self.runs == run] = y.double() + part["bias"]
        return terms.masked_fill(~seen.counts[:, self.runs], torch.nan)

    def to_tensors(self) -> tuple[Tree, str]:
        """The tensors as one flat dictionary, and the rest as JSON."""
        tensors = {f"{run}/{name}": value for run, part in enumerate(self.parts) for name, value in part.items()}
        return {name: value.contiguous() for name, value in tensors.items()}, json.dumps({"runs": self.runs.tolist()})

    @staticmethod
    def from_tensors(tensors: Tree, metadata: str) -> Regressor:
        """The inverse of `to_tensors`."""
        runs = json.loads(metadata)["runs"]
        parts: list[Tree] = [{} for _ in range(max(runs) + 1)]
        for key, value in tensors.items():
            run, _, name = key.partition("/")
            parts[int(run)][name] = value
        return Regressor(runs, parts)


def scaled_up(terms: Tensor, runs: Sequence[int]) -> Tensor:
    """Terms `[n, m]` such that the finite ones add up to the score: the runs that count stand for all."""
    counts = torch.isfinite(terms)
    of_run = torch.tensor(list(runs))
    counting = torch.stack([counts[:, of_run == run].all(1) for run in range(int(of_run.max()) + 1)], 1).double()
    return terms * (counting.shape[1] / counting.sum(1))[:, None]


def fit(seen: Observed, terms: Tensor, runs: Sequence[int], *, network: bool = False, seed: int = 0) -> Regressor:
    """Fit a regressor on scored pairs.

    Args:
        seen: what the forward pass showed of them.
        terms: `[n, m]`, each as large as if all runs counted, NaN where its run does not.
        runs: for each term, the place of its run among the runs of `seen`.
        network: add a network on what ridge leaves.
        seed: decides the network's start and order.

    Raises `InputError` where a run has fewer than two such pairs.
    """
    of_run = torch.tensor(list(runs))
    parts = []
    for run in range(int(of_run.max()) + 1):
        y = terms[:, of_run == run].double()
        known = torch.isfinite(y).all(1)
        if (count := int(known.sum())) < 2:
            raise InputError(f"score.sample: expected two scored pairs or more of each proxy run, found {count} of one")
        parts.append(_fit_run(seen[known].features(run), y[known], network, seed + run))
    return Regressor(runs, parts)


def _fit_run(x: Tensor, y: Tensor, network: bool, seed: int) -> Tree:
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / scale
    # Quantiles by sorting: torch.quantile refuses large inputs.
    ordered = y.sort(0).values
    tail = int(TAIL * len(y))
    y = y.clamp(ordered[tail], ordered[-1 - tail])
    unit = y.std(0).clamp_min(torch.finfo(torch.float64).tiny)
    bias = y.mean(0)
    target = (y - bias) / unit
    weight = _ridge(x, target)
    part = {"mean": mean, "scale": scale, "weight": (weight * unit).float(), "bias": bias}
    if network:
        left = (target - x.double() @ weight).float()
        layers = _network(x, left, seed)
        part |= layers | {name: layers[name] * unit.float() for name in ("w2", "b2")}
    return part


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """Weights float64 `[p, m]` for centred `x [n, p]`, `y [n, m]`; each column's penalty by generalised
    cross-validation."""
    n, p = x.shape
    if n >= p:
        squares, vectors = torch.linalg.eigh(_products(x, x))
        inner = vectors.T @ _products(x, y)  # in the basis of the eigenvectors, X^T y
    else:
        left, singular, right = torch.linalg.svd(x.double(), full_matrices=False)
        squares, vectors = singular**2, right.T
        inner = singular[:, None] * (left.T @ y)
    squares = squares.clamp_min(0)[:, None]
    # A direction without variance has no weight, whatever the penalty.
    inner = torch.where(squares > squares.max() * 1e-10, inner, 0)
    best, least = torch.zeros_like(inner), torch.full((y.shape[1],), torch.inf, dtype=torch.float64)
    for penalty in PENALTIES:
        damped = squares + penalty * n
        left_over = (y**2).sum(0) - (inner**2 * (squares + 2 * penalty * n) / damped**2).sum(0)
        freedom = (squares / damped).sum() + 1
        error = left_over / n / (1 - freedom / n).clamp_min(1e-6) ** 2
        best = torch.where(error < least, inner / damped, best)
        least = torch.minimum(error, least)
    weights: Tensor = vectors @ best
    return weights


def _products(x: Tensor, y: Tensor, rows: int = 4096) -> Tensor:
    """`x^T y` in float64 without a float64 copy of either."""
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for start in range(0, len(x), rows):
        total += x[start : start + rows].double().T @ y[start : start + rows].double()
    return total


def _network(x: Tensor, y: Tensor, seed: int) -> Tree:
    """A network with one hidden layer, trained on `y`: it starts as zero and is held near it by weight decay."""
    draw = torch.Generator().manual_seed(seed)
    p, m = x.shape[1], y.shape[1]
    layers = {
        "w1": torch.randn(p, HIDDEN, generator=draw) / p**0.5,
        "b1": torch.zeros(HIDDEN),
        "w2": torch.zeros(HIDDEN, m),
        "b2": torch.zeros(m),
    }
    weights = [value.requires_grad_() for value in layers.values()]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=DECAY)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(EPOCHS):
            order = torch.randperm(len(x), generator=draw)
            for start in range(0, len(x), BATCH):
                rows = order[start : start + BATCH]
                hidden = nn.functional.gelu(x[rows] @ layers["w1"] + layers["b1"])
                loss = (hidden @ layers["w2"] + layers["b2"] - y[rows]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return {name: value.detach() for name, value in layers.items()}

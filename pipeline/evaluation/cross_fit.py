"""How well scores are predicted for pairs that the regressor has not seen, by the share of the pairs that is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.arrays import Float64
from pipeline.evaluation.correlation import spearman
from pipeline.influence import Observed, Regressor, fit, scaled_up

#: Parts that the sample is divided into; each is predicted from the others.
FOLDS = 5
#: Parts of the sample that the curve shows, the smallest first.
PARTS = (0.125, 0.25, 0.5, 1.0)
#: Fewest pairs that a fit is tried on.
FEWEST = 20


@dataclass(frozen=True)
class CurvePoint:
    """Rank correlation of predicted with computed scores on held-out pairs, at one size of the sample.

    Attributes:
        share: of all pairs: those that the regressor was fitted on.
        pairs: how many these are.
        correlation, low, high: Spearman's, with its 95 % interval.
    """

    share: float
    pairs: int
    correlation: float
    low: float
    high: float


@dataclass(frozen=True)
class CrossFit:
    """What cross-validation found.

    Attributes:
        kind: `ridge`, or `ridge and network` where that predicts better.
        error: root mean square error of a predicted score.
        curve: the correlation by the share that is sampled, rising; the last is that of four fifths of the sample.
    """

    kind: str
    error: float
    curve: tuple[CurvePoint, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"kind": self.kind, "error": self.error, "curve": [asdict(point) for point in self.curve]}


def cross_fit(
    seen: Observed, terms: Tensor, runs: Sequence[int], draws: Tensor, *, share: float, seed: int
) -> tuple[Regressor, CrossFit]:
    """Fit a regressor on scored pairs, and measure how it does on those that it was not fitted on.

    Args:
        seen: what the forward pass showed of them.
        terms: `[n, m]`, as for `fit`.
        runs: for each term, the place of its run.
        draws: `[n]` in [0, 1): decides fold and part of each pair, so that neither depends on their order.
        share: the share of all pairs that they are.
        seed: decides the network's start.
    """
    score = scaled_up(terms.double(), runs).nansum(1)
    folds = (draws * FOLDS).long()
    # Within a fold, the pairs of a part are those whose remainder is below it.
    within = draws * FOLDS - folds

    def held_out(part: float, network: bool) -> tuple[Float64, CurvePoint] | None:
        predicted = torch.zeros_like(score)
        fitted = 0.0
        for fold in range(FOLDS):
            rows = (folds != fold) & (within < part)
            if int(rows.sum()) < FEWEST:
                return None
            found = fit(seen[rows], terms[rows], runs, network=network, seed=seed)
            predicted[folds == fold] = scaled_up(found.predict(seen[folds == fold]), runs).nansum(1)
            fitted += float(rows.sum()) / FOLDS
        left = predicted.numpy()
        return left, CurvePoint(share * fitted / len(seen), round(fitted), *_correlation(left, score.numpy()))

    plain, deep = held_out(1.0, network=False), held_out(1.0, network=True)
    assert plain is not None
    assert deep is not None
    network = deep[1].correlation > plain[1].correlation
    predicted, last = deep if network else plain
    curve = [point[1] for part in PARTS[:-1] if (point := held_out(part, network)) is not None]
    error = float(np.sqrt(np.mean((predicted - score.numpy()) ** 2)))
    regressor = fit(seen, terms, runs, network=network, seed=seed)
    return regressor, CrossFit("ridge and network" if network else "ridge", error, (*curve, last))


def _correlation(predicted: Float64, true: Float64) -> tuple[float, float, float]:
    """Spearman's correlation with its 95 % interval (Bonett and Wright 2000); 0 for a constant prediction."""
    value = float(np.nan_to_num(spearman(predicted, true)))
    spread = 1.96 * np.sqrt((1 + value**2 / 2) / (len(true) - 3))
    middle = np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12))
    return value, float(np.tanh(middle - spread)), float(np.tanh(middle + spread))

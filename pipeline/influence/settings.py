"""What decides a score: the estimator, how it is computed, and the pairs it is computed against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.literals import (
    EqualCaptions,
    EstimatorName,
    Family,
    Method,
    PairLoss,
    Precision,
    Precondition,
    ReplayForm,
    SelfForm,
    TargetLoss,
)
from pipeline.types import PairBatch

#: How a score, which keeps its published sign, becomes a utility, in which higher means keep.
UTILITY: dict[EstimatorName, Literal["score", "-score", "-|score|"]] = {
    "diff-in": "-score",
    "diff-in-self": "-|score|",
    "tracin": "score",
    "tracin-self": "-score",
    "moso": "score",
    "unrolled": "score",
    "z0": "score",
    "clip-score": "score",
    "neg-clip-loss": "score",
    "el2n": "score",
    "grand": "score",
    "random": "score",
}

_Numbers = TypeVar("_Numbers", Tensor, NDArray[np.float32], NDArray[np.float64])


def utility_of(estimator: EstimatorName, score: _Numbers) -> _Numbers:
    """The utility of scores of any shape. A self-influence of either sign is suspect when it is large."""
    form = UTILITY[estimator]
    if form == "score":
        return score
    return -score if form == "-score" else -abs(score)


@dataclass(frozen=True)
class Settings:
    """Everything but the pairs and the checkpoints that decides a score.

    Attributes:
        estimator: what is estimated.
        method: how derivatives are taken: `exact`, `central` (Diff-In's bracket as a difference of two tangent passes),
            `forward` (losses only), or `auto`.
        family: the contrastive loss.
        loss: the loss of one pair against the reference batch.
        target_loss: what of the target pairs is differentiated: their contrastive loss or minus their margin.
        equal_captions: whether pairs of equal captions are each other's negatives.
        parameters: the parameters that directions live on: `all`, `projections` or `last-K-blocks`.
        precondition: whether AdamW's preconditioner is used; `auto` where the checkpoint carries Adam's state.
        projections: random directions of projected self-influences.
        eigenpairs: leading eigenpairs of `H_B` for the projected `diff-in-self`.
        self_form: `exact` takes a gradient per pair (small models), `projected` random directions.
        replay: how `unrolled` goes back through the run.
        precision: arithmetic of the passes; features and losses are always float32 or wider.
        chunk: pairs per pass while directions are computed, at most (`gradients` takes 64 on a GPU and 32 to 128 on a
            CPU); it bounds memory and changes nothing else.
        seed: decides random directions and the `random` estimator.

    Raises `ConfigError` for an unknown estimator, method and the like.
    """

    estimator: EstimatorName = "diff-in"
    method: Method = "auto"
    family: Family = "clip"
    loss: PairLoss = "marginal"
    target_loss: TargetLoss = "contrastive"
    equal_captions: EqualCaptions = "negative"
    parameters: str = "all"
    precondition: Precondition = "auto"
    projections: int = 64
    eigenpairs: int = 16
    self_form: SelfForm = "projected"
    replay: ReplayForm = "checkpoints"
    precision: Precision = "fp32"
    chunk: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `ConfigError` for a value that there is not: a misspelt one would be taken for another."""
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise ConfigError(f"expected one of {choices}", key=name, found=getattr(self, name))

    def roundoff(self, dtype: torch.dtype) -> float:
        """Relative rounding error of a pass whose weights have `dtype`."""
        if dtype == torch.float64:
            return torch.finfo(torch.float64).eps
        return {"fp32": torch.finfo(torch.float32).eps, "tf32": 2.0**-10, "bf16": 2.0**-8}[self.precision]


@dataclass(slots=True)
class Batches:
    """The pairs that directions are computed from.

    Attributes:
        reference: `R`, the negatives of the loss of one pair.
        gradient: `B`, training pairs whose mean loss gives `G_B` and `H_B`.
        target: `V`, the pairs whose loss the kept data should lower.
    """

    reference: PairBatch
    gradient: PairBatch
    target: PairBatch


@dataclass(slots=True)
class ScoreBatch:
    """Scores of `b` pairs at `m` checkpoints, on the CPU.

    Attributes:
        terms: `[b, m]`, in the estimator's own sign, one per checkpoint in the order given; those that count add up
            to the score, the others are NaN.
        counts: bool `[b, m]`, whether a term counts: not where only held-out runs do and this one saw the pair.
        loss: `[b]`, the loss of the pair against the reference batch, mean over the last checkpoints of the runs that
            count.
        similarity: `[b]`, cosine of image and text, mean over the same.
        embedding: float16 `[b, 2 d]`, image then text of unit length, at the last checkpoint of all.
    """

    terms: Tensor
    counts: Tensor
    loss: Tensor
    similarity: Tensor
    embedding: Tensor

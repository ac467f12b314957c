"""Values of config keys that the mathematics, the models and the trainer take as they are."""

from __future__ import annotations

from typing import Literal

EstimatorName = Literal[
    "diff-in", "diff-in-self", "tracin", "tracin-self", "moso", "unrolled", "z0",
    "clip-score", "neg-clip-loss", "el2n", "grand", "random",
]  # fmt: skip

#: Estimators whose directions at one checkpoint depend on the others of the run.
WHOLE_RUN: frozenset[EstimatorName] = frozenset({"unrolled", "z0"})

#: How derivatives are taken.
Method = Literal["auto", "exact", "central", "forward"]

#: The contrastive loss of a batch.
Family = Literal["clip", "siglip"]

#: The loss of one pair against the reference batch.
PairLoss = Literal["marginal", "row"]

#: What of the target is differentiated: its contrastive loss, or minus its margin between similarities.
TargetLoss = Literal["contrastive", "margin"]

#: Whether pairs of equal captions are each other's negatives.
EqualCaptions = Literal["negative", "ignore"]

Precondition = Literal["auto", "adam", "none"]
SelfForm = Literal["projected", "exact"]
ReplayForm = Literal["exact", "checkpoints"]
Precision = Literal["fp32", "tf32", "bf16"]
OptimizerName = Literal["adamw", "sgd"]

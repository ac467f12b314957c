"""The sections about what is made of the scores: selections, what is handed over, and how good it is."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from pipeline.config.base import Fraction, PositiveInt, Section, Shards
from pipeline.config.problems import first_problem
from pipeline.literals import EstimatorName


class Threshold(Section):
    """Keep what lies at or above a value."""

    threshold: float
    """Smallest value that is kept."""


class Band(Section):
    """Keep a band of the ranking: drop a share at either end."""

    drop_lowest: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share dropped from the low end (the least useful)."""
    drop_highest: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share dropped from the high end (the easiest)."""

    @model_validator(mode="after")
    def _something_left(self) -> Band:
        if self.drop_lowest + self.drop_highest >= 1:
            raise ValueError("expected drop_lowest and drop_highest together below 1")
        return self


def _form_of_keep(value: Any) -> str:
    """Which of its forms a `keep` has, so that what is wrong with it is told of that one."""
    if isinstance(value, Threshold) or (isinstance(value, dict) and "threshold" in value):
        return "a threshold"
    return "a count" if isinstance(value, int) else "a fraction" if isinstance(value, float) else "a band"


Keep = Annotated[
    Annotated[float, Tag("a fraction")]
    | Annotated[int, Tag("a count")]
    | Annotated[Threshold, Tag("a threshold")]
    | Annotated[Band, Tag("a band")],
    Discriminator(_form_of_keep),
]


class DedupConfig(Section):
    """Removal of duplicates before the quota is filled."""

    exact: bool = False
    """Drop pairs whose image bytes and caption repeat, keeping the one of highest utility."""
    cosine: Annotated[float, Field(gt=0, le=1)] | None = None
    """Drop near-duplicates above this cosine similarity of image embeddings (SemDeDup); null does not. Needs
    embeddings."""


class BalanceConfig(Section):
    """Quotas that keep groups of pairs represented."""

    by: Literal["none", "caption", "cluster"] = "none"
    """Groups: pairs of equal caption, or clusters of embeddings (which need embeddings)."""
    quota: Literal["proportional", "equal", "complexity"] = "proportional"
    """Share of each group: by its size, the same for all, or (clusters) by how spread out it is and how far from
    others, whatever its size (Density-Based Pruning)."""
    clusters: PositiveInt = 100
    """Clusters of image embeddings, for quotas, `infomax` and fills; large ones are split where neighbours are looked
    for."""


class SelectConfig(Section):
    """Which pairs are kept."""

    name: str = "default"
    """Name of this selection; several live side by side under one run."""
    keep: Keep = 0.7
    """A fraction in (0, 1] (float), a count (integer), `{threshold: x}`, or `{drop_lowest: a, drop_highest: b}`. `1` is
    one pair, `1.0` all of them. A threshold needs `policy: rank` and no `balance`."""
    by: str = "utility"
    """The value that is ranked, higher is kept: a column or a formula such as `0.7 * rank(utility) + 0.3 *
    rank(similarity)`."""
    where: str | None = None
    """A condition that a pair must meet to be kept, such as `width >= 64 and source != "a.org"`."""
    join: dict[str, str] = {}
    """Folders of other runs over the same shards, by name: with `{other: runs/b}` formulas may say `other.utility`.
    `min(rank(utility), rank(other.utility))` as `by` keeps what both runs rank high."""
    spread: str | None = None
    """With `significant`: the standard error of `by`; null takes `utility_std`, or `zterms_std` for `by: zterms`."""
    embeddings: str | None = None
    """The joined run whose `embedding` column clusters and near-duplicates are found by; null takes this run's."""
    policy: Literal["rank", "significant", "infomax"] = "rank"
    """`rank` cuts the ranking; `significant` removes only what is harmful beyond its spread and fills up from the
    ties (it needs `proxy.runs` of 2 or more, or a `spread`); `infomax` also avoids redundancy (it needs embeddings:
    `score.embeddings`)."""
    significance: Annotated[float, Field(ge=0)] = 1.0
    """With `significant`: a pair is harmful when its utility is below minus this many `utility_std`."""
    fill: Literal["random", "representative", "diverse", "utility"] = "random"
    """With `significant`: how the rest of the quota is chosen among the ties. `representative` and `diverse` need
    embeddings."""
    redundancy: Annotated[float, Field(ge=0)] = 0.3
    """With `infomax`: weight of the similarity to what is already kept."""
    dedup: DedupConfig = DedupConfig()
    balance: BalanceConfig = BalanceConfig()

    @field_validator("keep", mode="before")
    @classmethod
    def _valid_keep(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, float | int | dict | Section):
            raise ValueError("expected a fraction in (0, 1], a positive count, {threshold: x} or a band")
        if isinstance(value, float) and not 0 < value <= 1:
            raise ValueError("expected a fraction in (0, 1]")
        if isinstance(value, int) and value < 1:
            raise ValueError("expected a positive count")
        return value

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not value or any(not (c.isalnum() or c in "-_") for c in value):
            raise ValueError("expected letters, digits, '-' and '_'")
        return value


class EmitConfig(Section):
    """What is handed to the training run."""

    materialize: bool = False
    """Write the pruned tars; else only the keep lists and manifests."""
    pairs_per_shard: PositiveInt = 10_000
    """Pairs in each pruned tar, at most; their sizes differ by at most one."""
    shuffle: bool = False
    """Put the kept pairs into a global seeded random order over the pruned tars."""
    train_batch_size: PositiveInt = 256
    """Batch size in the printed open_clip command."""
    train_epochs: PositiveInt = 32
    """Epochs in the printed open_clip command."""


#: Sets that are trained and rankings that are judged without `evaluate.compare`.
_BUILT_IN = ("kept", "full", "random", "clip-score", "right-only", "utility", "similarity", "select")


class EvaluateConfig(Section):
    """Training on what was kept, against baselines of the same size; pairs held out as the target are in no set.
    With `evaluate.shards` set `diffprune run` does it, too, after `emit`; `diffprune plan` leaves it out."""

    seeds: PositiveInt = 3
    """Training runs per set; mean and standard deviation are reported."""
    steps: PositiveInt | None = None
    """Steps of each training, equal for all sets; null takes the proxy's."""
    augment: bool = False
    """Train the judged models with open_clip's random crops."""
    baselines: list[Literal["full", "random", "clip-score", "right-only"]] = ["full", "random"]
    """Sets trained beside the kept one: everything, as many drawn at random or by similarity, and (with `truth`) the
    pairs whose captions are right."""
    compare: dict[str, dict[str, Any]] = {}
    """Other choices of the same size trained beside the kept one, by name: the keys of `select` that differ, such as
    `{Diff-In alone: {by: utility}}`; no name of a set that there is anyway (`kept`, `full`, `random`, ...). Their
    rankings are judged, too, with `truth`."""
    shards: Shards | None = None
    """Pairs to measure on, used for nothing else; zero-shot accuracy where captions form few classes, else retrieval
    recall. `demo:test` is that part of the demo data."""
    truth: str | None = None
    """A CSV of `uid`, `clean` (the true class) and `caption_class` (the class that the caption names), for judging
    only: how well low utility finds wrong captions. A pair is wrong where the two differ. `demo:truth` is that of the
    demo data."""
    keeps: list[Fraction] | None = None
    """Sizes for a coreset curve; null evaluates only the selection's own size."""

    @field_validator("compare")
    @classmethod
    def _keys_of_select(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, changes in value.items():
            if name in _BUILT_IN:
                raise ValueError(f"expected a name that is not built in, {name} is ({', '.join(_BUILT_IN)})")
            try:
                SelectConfig.model_validate(changes)
            except ValidationError as error:
                problem = first_problem(error, changes)
                expected = "no key of select" if problem.unknown else problem.expected
                raise ValueError(f"expected keys of select, {name}.{problem.key}: {expected}") from None
        return value

    @model_validator(mode="after")
    def _truth_given(self) -> EvaluateConfig:
        if "right-only" in self.baselines and self.truth is None:
            raise ValueError("expected truth with the baseline right-only")
        return self


class ValidateConfig(Section):
    """How far the scores can be trusted: retraining without pairs, and on random halves."""

    estimators: list[EstimatorName] = ["diff-in", "tracin", "unrolled", "clip-score", "random"]
    """Estimators compared."""
    pairs: PositiveInt = 256
    """Pairs of the small run that is retrained."""
    leave_out: PositiveInt = 64
    """Pairs left out, one at a time."""
    partial: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Also take only this share of each pair away (0.1, say): an estimator that predicts that and not the removal of
    the whole pair is right to first order, and the pair too large a step for it; null does not."""
    halves: PositiveInt = 64
    """Random halves trained on for the linear datamodelling score."""
    seeds: PositiveInt = 3
    """Seeds of every counterfactual training."""
    steps: PositiveInt = 100
    """Steps of every training."""
    warm_steps: Annotated[int, Field(ge=0)] = 0
    """AdamW steps on other pairs that all trainings start after: from scratch a short run learns too little to tell
    pairs apart. An AdamW run goes on with the moments of these steps."""
    warm_pairs: PositiveInt = 1024
    """Pairs of those steps, none of which is in the small run."""
    warm_lr: Annotated[float, Field(gt=0)] = 4e-3
    """Peak learning rate of those steps."""
    deletions: Annotated[int, Field(ge=0)] = 0
    """Random sets of a tenth of the pairs whose deletion is estimated and compared with retraining."""
    swapped: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the pairs whose captions are exchanged among them, to see whether they are found; with
    `evaluate.truth` known wrong captions are judged instead."""


class TrackConfig(Section):
    """Where the trainings of the proxy and of `evaluate` log their losses and results, beside TensorBoard's files in
    the run's folder."""

    wandb: str | None = None
    """A project of Weights & Biases (`pip install '.[wandb]'`, then `wandb login` or `WANDB_MODE=offline`); null logs
    nothing there."""

    @field_validator("wandb")
    @classmethod
    def _installed(cls, value: str | None) -> str | None:
        if value is not None and importlib.util.find_spec("wandb") is None:
            raise ValueError("expected null, as wandb is not installed (pip install '.[wandb]')")
        return value


class ReportConfig(Section):
    """The report page."""

    gallery: PositiveInt = 24
    """Pairs shown in each gallery."""

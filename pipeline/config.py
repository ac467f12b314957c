"""The config tree of a run: every setting, its type, its default and what it means.

The only module that knows YAML. A config is checked as a whole before any work; what is wrong with it is one
`ConfigError` that names the file, the key, what was expected and what was found.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.errors import ConfigError

Fraction = Annotated[float, Field(gt=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0)]
Shards = str | list[str]

EstimatorName = Literal[
    "diff-in", "diff-in-self", "tracin", "tracin-self", "moso", "unrolled", "z0",
    "clip-score", "neg-clip-loss", "el2n", "grand", "random",
]  # fmt: skip


class Section(BaseModel):
    """Base of all config sections: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, use_attribute_docstrings=True)


class DataConfig(Section):
    """The pairs that are to be scored and pruned."""

    shards: Shards
    """WebDataset tars: a brace pattern, a glob, a local folder, a list, a `.txt` file of URLs, `::`-joined patterns;
    paths or fsspec URLs."""
    caption: str = "txt"
    """Where the caption is: `txt`, or `json:KEY` for a key of the sample's json."""
    max_pixels: PositiveInt = 64_000_000
    """Images with more pixels than this are rejected before they are decoded (decompression bombs)."""
    source: str = "url"
    """The json key whose domain (for URLs) or value names the source of a pair in plans and reports."""

    @field_validator("caption")
    @classmethod
    def _known_caption(cls, value: str) -> str:
        return known_caption(value)


def known_caption(value: str) -> str:
    """The value if it says where captions are. Raises `ValueError`."""
    if value != "txt" and not (value.startswith("json:") and len(value) > len("json:")):
        raise ValueError("expected 'txt' or 'json:KEY'")
    return value


class TargetConfig(Section):
    """The target set V: the pairs whose loss the kept data shall lower."""

    kind: Literal["holdout", "shards", "train"] = "holdout"
    """`holdout`: a seeded part of the training pairs, left out of the proxy run; `shards`: other pairs; `train`:
    the training pairs themselves."""
    shards: Shards | None = None
    """With `kind: shards`: where the target pairs are (forms as in `data.shards`)."""
    caption: str | None = None
    """With `kind: shards`: where the captions are, as in `data.caption`; null takes that. For a labelled set
    `json:KEY` names the key with the class's name."""
    prompt: str = "{}"
    """With `kind: shards`: the caption takes the place of `{}`. With class names as captions, `a photo of a {}` makes
    the zero-shot prompts of a classification set; `reference.equal_captions: ignore` belongs to it."""
    pairs: PositiveInt = 512
    """How many target pairs are used, drawn by the run's seed."""

    @field_validator("caption")
    @classmethod
    def _known_caption(cls, value: str | None) -> str | None:
        return None if value is None else known_caption(value)

    @model_validator(mode="after")
    def _shards_given(self) -> TargetConfig:
        if (self.kind == "shards") != (self.shards is not None):
            raise ValueError("target.shards is needed with, and only with, target.kind: shards")
        if self.kind != "shards" and (self.caption is not None or self.prompt != "{}"):
            raise ValueError("target.caption and target.prompt go with target.kind: shards")
        if "{}" not in self.prompt:
            raise ValueError("expected a {} in target.prompt, where the caption goes")
        return self


class ReferenceConfig(Section):
    """The seeded batches of training pairs that a pair's loss is measured against."""

    pairs: PositiveInt = 256
    """Pairs in R, the negatives of the loss of one pair."""
    gradient_pairs: PositiveInt = 1024
    """Pairs in B, whose mean loss gives `G_B` and `H_B` of Eq. 9 (and `G_D` for `moso`)."""
    equal_captions: Literal["negative", "ignore"] = "negative"
    """Whether pairs with the same caption are each other's negatives, in training and in scores."""


class ProxyConfig(Section):
    """The proxy CLIP model: trained here, or given as checkpoints."""

    model: str = "ViT-B-32"
    """An open_clip model name, or a `.json` file with an open_clip model config, or one of the small configs
    shipped here (`tiny-vit`, ...)."""
    pretrained: str | None = None
    """A weights file (open_clip `.pt`, `.safetensors`) to start from; null starts at random."""
    checkpoints: list[str] | None = None
    """Existing checkpoints (open_clip `epoch_N.pt`, safetensors) or one `manifest.json`; null trains a proxy."""
    checkpoint_steps: list[PositiveInt] | None = None
    """With plain safetensors checkpoints: the step of each."""
    checkpoint_rates: list[float] | None = None
    """With plain safetensors checkpoints: the learning rate of each."""
    runs: PositiveInt = 1
    """Independent proxy runs (other seeds); their scores are combined and their spread is kept."""
    subset: Fraction = 1.0
    """The seeded share of the pairs that each run trains on; consecutive runs complement each other (two halves, three
    times two thirds)."""
    within: str | None = None
    """Folder of a selection over the same shards (`RUN/pruned`, `RUN/selections/NAME`): the runs train only on what it
    keeps, a second round; null trains on all pairs."""
    epochs: Annotated[float, Field(gt=0)] = 5
    """Passes over the data; ignored when `steps` is given."""
    steps: PositiveInt | None = None
    """Optimizer steps; null derives them from `epochs`."""
    batch_size: PositiveInt = 256
    """Pairs per step over all workers: the pairs that are each other's negatives."""
    loss: Literal["clip", "siglip"] = "clip"
    """The contrastive loss the model trains with, and is scored with."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The optimizer; Diff-In's formula follows it."""
    lr: Annotated[float, Field(gt=0)] = 5e-4
    """Peak learning rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's first beta; SGD's momentum is `momentum`."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """AdamW's second beta."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """AdamW's epsilon."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """SGD's momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay of matrices (biases, gains and the logit scale have none)."""
    grad_clip: Annotated[float, Field(gt=0)] | None = None
    """Norm to which the gradient is clipped; null does not clip."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps with a linearly rising learning rate; a half cosine to zero follows."""
    num_checkpoints: PositiveInt = 4
    """Recorded checkpoints per run, `m` in Eq. 9."""
    checkpoint_at: Literal["even", "random"] | list[PositiveInt] = "even"
    """Which steps are recorded: evenly spaced (the last one included), at random (seeded), or a list."""
    augment: bool = False
    """Train with open_clip's random crops instead of the evaluation transform."""
    workers: PositiveInt = 1
    """Training workers per run; above 1 the run goes through `ray.train`."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """GPUs of a training worker; null takes one where the cluster has GPUs."""
    resume_every: PositiveInt = 200
    """Steps between the resume points of an interrupted proxy run."""

    @model_validator(mode="after")
    def _plain_checkpoints(self) -> ProxyConfig:
        for name in ("checkpoint_steps", "checkpoint_rates"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.checkpoints or []):
                raise ValueError(f"{name} must have one entry per checkpoint")
        if self.within is not None and self.checkpoints is not None:
            raise ValueError("expected either within or checkpoints: these are trained already")
        return self


class ScoreConfig(Section):
    """What is computed for each pair."""

    estimator: EstimatorName = "diff-in"
    """The estimator; `diffprune estimators` lists them with their costs."""
    method: Literal["auto", "exact", "central", "forward"] = "auto"
    """How Diff-In's bracket is computed: Hessian-vector product and mixed second derivative, central difference of
    two tangent passes, or forward passes only."""
    loss: Literal["marginal", "row"] = "marginal"
    """The loss of one pair against R: with what it does to the others as a negative, or without."""
    parameters: str = "all"
    """Parameters that directions live on: `all`, `projections`, or `last-K-blocks`."""
    precondition: Literal["auto", "adam", "none"] = "auto"
    """AdamW's preconditioner in Eq. 9; `auto` uses it where the checkpoint carries Adam's state."""
    held_out: bool = False
    """Score each pair only with the proxy runs that did not train on it; needs `proxy.subset` below 1 and runs that
    leave every pair out once (two with `subset: 0.5`)."""
    batch_size: PositiveInt = 256
    """Pairs per tangent pass (on a CPU at most 32); it changes speed and memory, not the scores (to rounding)."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Arithmetic of the passes on a GPU; sums and losses are always float32."""
    embeddings: bool = False
    """Store the normalised embedding of the last checkpoint (image and text, float16) in the score files."""
    projections: PositiveInt = 64
    """Random directions of the projected self-influences (`diff-in-self`, `tracin-self`)."""
    eigenpairs: PositiveInt = 16
    """Leading eigenpairs of `H_B` (Lanczos) for `diff-in-self`."""
    self_form: Literal["projected", "exact"] = "projected"
    """How self-influences are computed; `exact` takes a gradient per pair (small models)."""
    replay: Literal["exact", "checkpoints"] = "checkpoints"
    """`unrolled`: back through every recorded step, or with each checkpoint's own Hessian in between."""
    sample: Fraction = 1.0
    """Share of the pairs, drawn by their uids, that is scored; the others' scores are predicted from one forward pass
    per proxy run. 1 scores every pair."""
    min_correlation: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """With `sample` below 1: the least rank correlation of predicted with computed scores, on pairs that were not
    fitted on; below it the stage is refused."""


class EngineConfig(Section):
    """Workers, retries and what a restart does."""

    workers: PositiveInt | None = None
    """Scoring actors, whether or not there is room for all of them yet: an autoscaling cluster grows to fit them. Null
    takes one per GPU, or without GPUs one per `cpus_per_worker`; on a cluster that was joined, as many again are asked
    for, so that one that can grow does."""
    cpus_per_worker: Annotated[float, Field(gt=0)] | None = None
    """CPUs of an actor; null shares the machine's CPUs out evenly."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """GPUs of an actor; null takes one where the cluster has GPUs."""
    memory_per_worker: PositiveInt | None = None
    """Bytes that Ray reserves for an actor; null reserves none."""
    object_store_memory: PositiveInt | None = None
    """Bytes of the object store of a Ray started here; null takes 256 MiB, as only small messages go through it."""
    decode_threads: PositiveInt | None = None
    """Threads that decode images in each actor; null takes its CPUs."""
    prefetch: PositiveInt = 1
    """Shards fetched and decoded ahead in each actor."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Times a failed shard is tried again before it is set aside."""
    retry_wait: Annotated[float, Field(ge=0)] = 1.0
    """Seconds before the first retry; doubled each time."""
    shard_timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds without news from a worker that has shards in hand, after which it is taken to hang, is killed and is
    started anew; null takes 20 times the longest shard so far, and half an hour at least."""
    allowed_failures: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the shards that may fail for good without failing the run."""
    stale: Literal["refuse", "redo"] = "refuse"
    """What happens to finished results that were made with other settings."""
    address: str | None = None
    """A running Ray cluster (`auto`, `ray://...`); null joins the job's own, else starts a local one."""


class Threshold(Section):
    """Keep what lies at or above a value."""

    threshold: Annotated[float, Field(allow_inf_nan=False)]
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
            raise ValueError("drop_lowest and drop_highest together must be below 1")
        return self


class DedupConfig(Section):
    """Removal of duplicates before the quota is filled."""

    exact: bool = False
    """Drop pairs whose image bytes and caption repeat, keeping the one of highest utility."""
    cosine: Annotated[float, Field(gt=0, le=1)] | None = None
    """Drop near-duplicates above this cosine similarity of image embeddings (SemDeDup); null does not."""


class BalanceConfig(Section):
    """Quotas that keep groups of pairs represented."""

    by: Literal["none", "caption", "cluster"] = "none"
    """Groups: pairs of equal caption, or clusters of embeddings."""
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
    keep: float | int | Threshold | Band = 0.7
    """A fraction in (0, 1] (float), a count (integer), `{threshold: x}`, or `{drop_lowest: a, drop_highest: b}`."""
    by: str = "utility"
    """The value that is ranked, higher is kept: a column or a formula such as `0.7 * rank(utility) + 0.3 *
    rank(similarity)`."""
    where: str | None = None
    """A condition that a pair must meet to be kept, such as `width >= 64 and caption_length > 5`."""
    join: dict[str, str] = {}
    """Folders of other runs over the same shards, by name: with `{other: runs/b}` formulas may say `other.utility`.
    `min(rank(utility), rank(other.utility))` as `by` keeps what both runs rank high."""
    spread: str | None = None
    """With `significant`: the standard error of `by`; null takes `utility_std`, or `zterms_std` for `by: zterms`."""
    embeddings: str | None = None
    """The joined run whose `embedding` column clusters and near-duplicates are found by; null takes this run's."""
    policy: Literal["rank", "significant", "infomax"] = "rank"
    """`rank` cuts the ranking; `significant` removes only what is harmful beyond its spread and fills up from the
    ties; `infomax` also avoids redundancy."""
    significance: Annotated[float, Field(ge=0)] = 1.0
    """With `significant`: a pair is harmful when its utility is below minus this many `utility_std`."""
    fill: Literal["random", "representative", "diverse", "utility"] = "random"
    """With `significant`: how the rest of the quota is chosen among the ties."""
    redundancy: Annotated[float, Field(ge=0)] = 0.3
    """With `infomax`: weight of the similarity to what is already kept."""
    dedup: DedupConfig = DedupConfig()
    balance: BalanceConfig = BalanceConfig()

    @field_validator("keep", mode="before")
    @classmethod
    def _valid_keep(cls, value: Any) -> Any:
        if isinstance(value, bool | str):
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
    """Pairs in each pruned tar (near-equal; the last ones may have one fewer)."""
    shuffle: bool = False
    """Put the kept pairs into a global seeded random order over the pruned tars."""
    train_batch_size: PositiveInt = 256
    """Batch size in the printed open_clip command."""
    train_epochs: PositiveInt = 32
    """Epochs in the printed open_clip command."""


class EvaluateConfig(Section):
    """Training on what was kept, against baselines of the same size."""

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
    `{Diff-In alone: {by: utility}}`. With `truth` their rankings are judged, too."""
    shards: Shards | None = None
    """Pairs to measure on; zero-shot accuracy where captions form few classes, else retrieval recall. Never used
    before."""
    truth: str | None = None
    """A CSV of `uid`, `clean`, `caption_class`, for judging only: how well low utility finds wrong captions."""
    keeps: list[Fraction] | None = None
    """Sizes for a coreset curve; null evaluates only the selection's own size."""

    @field_validator("compare")
    @classmethod
    def _keys_of_select(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, changes in value.items():
            try:
                SelectConfig.model_validate(changes)
            except ValidationError as error:
                problem = error.errors(include_url=False)[0]
                key = ".".join(str(part) for part in problem["loc"])
                expected = "no key of select" if problem["type"] == "extra_forbidden" else problem["msg"]
                raise ValueError(f"expected keys of select, {name}.{key}: {expected}") from None
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
    """Also take only this share of each pair away (0.1, say): an estimator that foretells that and not the removal of
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
    """A project of Weights & Biases (`pip install 'diffprune[wandb]'`, then `wandb login` or `WANDB_MODE=offline`);
    null logs nothing there."""

    @field_validator("wandb")
    @classmethod
    def _installed(cls, value: str | None) -> str | None:
        if value is not None and importlib.util.find_spec("wandb") is None:
            raise ValueError("expected null, as wandb is not installed (pip install 'diffprune[wandb]')")
        return value


class ReportConfig(Section):
    """The report page."""

    gallery: PositiveInt = 24
    """Pairs shown in each gallery."""


class Config(Section):
    """The whole config of a run."""

    out: str = "runs/default"
    """The run's folder: a path or an fsspec URL."""
    seed: int = 0
    """Decides every random choice of the run."""
    data: DataConfig
    target: TargetConfig = TargetConfig()
    reference: ReferenceConfig = ReferenceConfig()
    proxy: ProxyConfig = ProxyConfig()
    score: ScoreConfig = ScoreConfig()
    engine: EngineConfig = EngineConfig()
    select: SelectConfig = SelectConfig()
    emit: EmitConfig = EmitConfig()
    evaluate: EvaluateConfig | None = None
    validation: ValidateConfig = ValidateConfig()
    track: TrackConfig = TrackConfig()
    report: ReportConfig = ReportConfig()


def load_config(path: str | os.PathLike[str], overrides: list[str] | None = None, out: str | None = None) -> Config:
    """Read a YAML config, apply `a.b=c` overrides (values are YAML) and check everything.

    Relative shard paths are relative to the working directory, as on any command line.
    Raises `ConfigError` for whatever is wrong.
    """
    name = os.fspath(path)
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("expected a config file, found nothing there", file=name) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"expected readable YAML: {error}", file=name) from None
    if not isinstance(tree, dict):
        raise ConfigError("expected a mapping of sections", file=name, found=tree)
    for override in overrides or []:
        _override(tree, override)
    if out is not None:
        tree["out"] = out
    return parse_config(tree, file=name)


def parse_config(tree: dict[str, Any], file: str = "") -> Config:
    """Check a config given as nested dictionaries. Raises `ConfigError` on the first problem."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(("function-", "constrained-")))
        if problem["type"] == "extra_forbidden":
            raise ConfigError(f"expected a known key{_close_match(key)}", file=file, key=key) from None
        expected = problem["msg"].removeprefix("Value error, ").replace("Input should be ", "expected ")
        if problem["type"] == "missing":
            expected = "expected a value, this key is needed"
        elif not expected.startswith("expected"):
            expected = f"expected {expected[0].lower()}{expected[1:]}"
        found = None if problem["type"] == "missing" else problem["input"]
        raise ConfigError(expected, file=file, key=key, found=found) from None


def dump_config(config: Config) -> str:
    """The config as YAML that `load_config` reads back to an equal tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError("expected KEY=VALUE", key="--set", found=override)
    node: Any = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError("expected a section to set a key in", key=f"--set {key}", found=node)
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError("expected a YAML value", key=f"--set {key}", found=text) from None


def _close_match(key: str) -> str:
    import difflib

    section: type[BaseModel] = Config
    *parents, leaf = key.split(".")
    for parent in parents:
        annotation = section.model_fields[parent].annotation if parent in section.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ""
        section = annotation
    close = difflib.get_close_matches(leaf, list(section.model_fields), n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" ({', '.join(section.model_fields)})"

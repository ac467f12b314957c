"""The sections that decide the scores, and the one for the workers that compute them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Fraction, PositiveInt, Section, Shards
from pipeline.literals import (
    EqualCaptions,
    EstimatorName,
    Family,
    Method,
    OptimizerName,
    PairLoss,
    Precision,
    Precondition,
    ReplayForm,
    SelfForm,
    TargetLoss,
)

#: Pixels of the largest image that is decoded, where a config does not say.
MAX_PIXELS = 64_000_000


class DataConfig(Section):
    """The pairs that are to be scored and pruned."""

    shards: Shards
    """WebDataset tars: a brace pattern, a glob, a local folder, a list, a `.txt` file of URLs, `::`-joined patterns;
    paths or fsspec URLs. `demo:train` is the built-in demo data."""
    caption: str = "txt"
    """Where the caption is: `txt`, or `json:KEY` for a key of the sample's json. What is handed over for training has
    it as `txt`."""
    max_pixels: PositiveInt = MAX_PIXELS
    """Images with more pixels than this are rejected before they are decoded (decompression bombs)."""
    draft: Annotated[float, Field(ge=1)] | None = None
    """Decode JPEGs at a half, a quarter or an eighth of their size where this many times what they are then resized to
    is left: large photos are decoded faster, and the pixels differ from those of the model's own transform, with 2 a
    little, with 1 more. Null decodes them whole."""
    source: str = "url"
    """The json key whose domain (for URLs) or value names the source of a pair in plans and reports."""

    @field_validator("caption")
    @classmethod
    def _known_caption(cls, value: str) -> str:
        return known_caption(value)

    @property
    def pixels(self) -> dict[str, float]:
        """What decides the pixels of a pair, and whether it has any: a part of fingerprints, so that without `draft` it
        is what it was before there was one."""
        return {"max_pixels": self.max_pixels} | ({} if self.draft is None else {"draft": self.draft})


def known_caption(value: str) -> str:
    """The value if it says where captions are. Raises `ValueError`."""
    if value != "txt" and not (value.startswith("json:") and len(value) > len("json:")):
        raise ValueError("expected 'txt' or 'json:KEY'")
    return value


class TargetConfig(Section):
    """The target set V: the pairs whose loss the kept data should lower."""

    kind: Literal["holdout", "shards", "train"] = "holdout"
    """`holdout`: a seeded part of the training pairs, left out of the proxy run; `shards`: other pairs; `train`:
    the training pairs themselves."""
    shards: Shards | None = None
    """With `kind: shards`: where the target pairs are (forms as in `data.shards`; `demo:target` of the demo data)."""
    caption: str | None = None
    """With `kind: shards`: where the captions are, as in `data.caption`; null takes that. For a labelled set
    `json:KEY` names the key with the class's name."""
    prompt: str = "{}"
    """With `kind: shards`: the caption takes the place of `{}`. With class names as captions, `a photo of a {}` makes
    the zero-shot prompts of a classification set; `reference.equal_captions: ignore` belongs to it."""
    pairs: PositiveInt = 512
    """How many target pairs are used, drawn by the run's seed."""
    loss: TargetLoss = "contrastive"
    """What of the target the kept data should lower: its contrastive loss as in the paper, or minus its `margin`, the
    mean similarity of matching pairs less that of all, which does not turn with the model's confidence."""

    @property
    def of_pairs(self) -> dict[str, Any]:
        """What decides which pairs are the target, for fingerprints."""
        return self.model_dump(mode="json", exclude={"loss"})

    @property
    def of_loss(self) -> dict[str, Any]:
        """What of them is differentiated, for fingerprints: what was made before there was a choice stays valid."""
        return {} if self.loss == "contrastive" else {"target_loss": self.loss}

    @field_validator("caption")
    @classmethod
    def _known_caption(cls, value: str | None) -> str | None:
        return None if value is None else known_caption(value)

    @field_validator("prompt")
    @classmethod
    def _place_for_the_caption(cls, value: str) -> str:
        if "{}" not in value:
            raise ValueError("expected a {} where the caption goes")
        return value

    @model_validator(mode="after")
    def _shards_given(self) -> TargetConfig:
        if (self.kind == "shards") != (self.shards is not None):
            raise ValueError("expected target.shards with, and only with, target.kind: shards")
        if self.kind != "shards" and (self.caption is not None or self.prompt != "{}"):
            raise ValueError("expected target.caption and target.prompt only with target.kind: shards")
        return self


class ReferenceConfig(Section):
    """The seeded batches of training pairs that a pair's loss is measured against."""

    pairs: PositiveInt = 256
    """Pairs in R, the negatives of the loss of one pair."""
    gradient_pairs: PositiveInt = 1024
    """Pairs in B, whose mean loss gives `G_B` and `H_B` of Eq. 9 (and `G_D` for `moso`)."""
    equal_captions: EqualCaptions = "negative"
    """Whether pairs with the same caption are each other's negatives, in training and in scores."""


class ProxyConfig(Section):
    """The proxy CLIP model: trained here, or given as checkpoints."""

    model: str = "ViT-B-32"
    """An open_clip model name, or a `.json` file with an open_clip model config, or one of the small configs
    shipped here (`tiny-vit`, ...; the page on the configuration lists them)."""
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
    loss: Family = "clip"
    """The contrastive loss the model trains with, and is scored with."""
    optimizer: OptimizerName = "adamw"
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
    precision: Precision = "fp32"
    """Products of training: `tf32` on a GPU, or `bf16` (mixed precision, as open_clip's `amp_bf16`) there and on
    processors that multiply bfloat16. Weights, sums, norms and losses are always float32."""
    workers: PositiveInt = 1
    """Training workers per run; above 1 the run goes through `ray.train`."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """GPUs of a training worker, those of `evaluate` included; null takes one where the cluster has GPUs. With a GPU
    go up to 4 CPUs, which crop its pairs, but no more than half of its share of a machine."""
    resume_every: PositiveInt = 200
    """Steps between the resume points of an interrupted proxy run."""

    @field_validator("checkpoints", "checkpoint_at")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("expected at least one entry")
        return value

    @model_validator(mode="after")
    def _whole_gpus(self) -> ProxyConfig:
        if self.workers > 1 and self.gpus_per_worker is not None and self.gpus_per_worker % 1:
            raise ValueError("expected a whole gpus_per_worker with workers above 1, which cannot share a GPU")
        return self

    @model_validator(mode="after")
    def _plain_checkpoints(self) -> ProxyConfig:
        for name in ("checkpoint_steps", "checkpoint_rates"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.checkpoints or []):
                raise ValueError(f"expected one entry of {name} per checkpoint")
        if self.within is not None and self.checkpoints is not None:
            raise ValueError("expected either within or checkpoints: these are trained already")
        return self


class ScoreConfig(Section):
    """What is computed for each pair."""

    estimator: EstimatorName = "diff-in"
    """The estimator; `diffprune estimators` lists them with their costs."""
    method: Method = "auto"
    """How Diff-In's bracket is computed: `exact` by a Hessian-vector product and a mixed second derivative, `central`
    by a central difference of two tangent passes, `forward` by differences of losses. `auto` is `exact` with
    `parameters: projections`, else `central`. `forward` also replaces the tangent pass of `tracin` and `moso` by two
    forward passes."""
    loss: PairLoss = "marginal"
    """The loss of one pair against R: with what it does to the others as a negative, or without."""
    parameters: str = "all"
    """Parameters that directions live on: `all`, `projections`, or `last-K-blocks` with K from 1."""
    precondition: Precondition = "auto"
    """AdamW's preconditioner in Eq. 9; `auto` uses it where the checkpoint carries Adam's state."""
    held_out: bool = False
    """Score each pair only with the proxy runs that did not train on it; needs `proxy.subset` below 1 and runs that
    leave every pair out once (two with `subset: 0.5`)."""
    batch_size: PositiveInt = 1024
    """Pairs per tangent pass: on a CPU at most 32 to 128, by the model, on a GPU halved until its memory holds them. It
    changes speed and memory, not the scores (to rounding)."""
    precision: Precision = "fp32"
    """Products of the passes: `tf32` on a GPU, `bf16` there and on processors that multiply bfloat16. Sums, softmax,
    norms and losses are always float32. Rankings of `tracin` survive both, those of `diff-in` `tf32`."""
    compile: bool = False
    """Compile passes with derivatives by torch's compiler, which on a CPU needs g++; small models gain most. Workers
    wait 10 to 60 s for each multiple of 8 tokens in their captions, less where this machine's cache has them. This
    changes speed, not the scores (to rounding); `diffprune plan` does not count on it."""
    embeddings: bool = False
    """Store the normalised embedding of the last checkpoint (image and text, float16) in the score files. Needed by
    `select.policy: infomax`, `select.balance.by: cluster`, `select.dedup.cosine` and `select.fill: representative` or
    `diverse`, unless `select.embeddings` names a joined run that has them."""
    projections: PositiveInt = 64
    """Random directions of the projected forms of `diff-in-self`, `tracin-self` and `grand`."""
    eigenpairs: PositiveInt = 16
    """Leading eigenpairs of `H_B` (Lanczos) for `diff-in-self`."""
    self_form: SelfForm = "projected"
    """How self-influences are computed; `exact` takes a gradient per pair (small models)."""
    replay: ReplayForm = "checkpoints"
    """`unrolled`: back through every recorded step, or with each checkpoint's own Hessian in between."""
    sample: Fraction = 1.0
    """Share of the pairs, drawn by their uids, that is scored; the others' scores are predicted from one forward pass
    per proxy run. 1 scores every pair."""
    min_correlation: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """With `sample` below 1: the least rank correlation of predicted with computed scores, on pairs that were not
    fitted on; below it the stage is refused."""

    @field_validator("parameters")
    @classmethod
    def _known_parameters(cls, value: str) -> str:
        if not re.fullmatch(r"all|projections|last-0*[1-9]\d*-blocks", value, re.ASCII):
            raise ValueError("expected 'all', 'projections' or 'last-K-blocks'")
        return value

    @model_validator(mode="after")
    def _precise_differences(self) -> ScoreConfig:
        if self.method == "forward" and self.precision != "fp32":
            raise ValueError(
                f"expected precision: fp32 with method: forward, whose differences {self.precision} rounds away"
            )
        return self


class EngineConfig(Section):
    """Workers, retries and what a restart does."""

    workers: PositiveInt | None = None
    """Scoring actors, whether or not there is room for all of them yet: an autoscaling cluster grows to fit them. Null
    takes as many as fit: one per GPU, or without GPUs at most 8 on each machine (more with a small `cpus_per_worker`).
    On a cluster that was joined twice as many are asked for, so that one that can grow does."""
    cpus_per_worker: Annotated[float, Field(gt=0)] | None = None
    """CPUs of an actor; null divides a machine's CPUs evenly among its GPUs (less than one each where there are more
    GPUs), or without GPUs among 8 actors (one CPU each where there are fewer). Where machines differ, the smallest
    share counts."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """GPUs of an actor, and of a task that computes directions; null takes one where the cluster has GPUs. A part of a
    GPU is a part of its memory, too."""
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
    """Seconds without news from a worker that has shards in hand, after which it is considered hung, killed and
    started anew; null takes 20 times the longest shard so far and half an hour at least, and 6 hours before the first
    shard is back. It holds for the tasks of `inventory` and `emit`, too."""
    start_timeout: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds that a scoring worker may take to load model, checkpoints and directions; one that takes longer is killed
    and started anew, `retries` times."""
    storage_timeout: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds that storage may be away in the middle of a stage (shard after shard fails because it does not answer)
    before the stage ends with an error. Meanwhile shards wait, and no try counts."""
    task_timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds without news from the tasks of `train`, `directions`, `evaluate` and `validate` (a task ended, a training
    step, a shard decoded for training), after which those in hand are killed and started anew, `retries` times. Null
    takes 20 times the longest silence so far, and at least half an hour in `train` (6 hours before its first news),
    6 hours in the others (a day before their first news)."""
    allowed_failures: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the shards that may fail for good without failing the run."""
    stale: Literal["refuse", "redo"] = "refuse"
    """What happens to finished results that were made with other settings."""
    address: str | None = None
    """A running Ray cluster (`auto`, `ray://...`); null joins the cluster of the submitted job or of `RAY_ADDRESS`, and
    without either starts a Ray on this machine."""

"""Time, GPU hours, memory and storage of a run's stages, from rates that were measured and counts that are known."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from pipeline.config import Config
from pipeline.estimators import facts_of
from pipeline.literals import WHOLE_RUN

#: Bytes of a score file per pair without embeddings (measured: docs/operations.md).
SCORE_BYTES = 90
#: Bytes of the keep list, of `uids.npy` and of the manifest per kept pair.
KEEP_BYTES = 60
#: Selecting and listing, rows per second of one process (docs/performance.md).
SELECT_RATE = 600_000
#: Copying kept members into new tars: bytes per second of one CPU, about half of what copying a file does.
RESHARD_RATE = 150e6
#: Steps of an exact replay, in training steps: the step itself and a Hessian product.
REPLAY_STEPS = 4
#: Reading, resident: interpreter, torch, open_clip, and activations of a small model.
PROCESS_BYTES = 800 << 20
#: Processes that read shards or train at once take this many CPUs each.
TASK_CPUS = 1


@dataclass(frozen=True)
class Rates:
    """Seconds of one process, while others do the same.

    Attributes:
        start: from asking for a worker until it has built the model.
        count: per sample, to count the samples of a shard.
        decode: per pair, read and decoded by the threads of one worker.
        checkpoint: per pair, one checkpoint's terms.
        last: per pair, the terms of a run's last checkpoint, with its loss and similarity.
        observe: per pair, these alone: the forward pass at a run's last checkpoint.
        directions: all of one run's checkpoints.
        step: a training step at the config's batch size.
        parameters: of the model.
        directed: values of the vectors at one checkpoint.
        random: bytes of the random vectors that are in memory at a time.
        pixels: bytes of a decoded image.
        tokens: of a caption.
        embedding: values of one pair's embedding, both towers.
    """

    start: float
    count: float
    decode: float
    checkpoint: float
    last: float
    observe: float
    directions: float
    step: float
    parameters: int
    directed: int
    random: int
    pixels: int
    tokens: int
    embedding: int


@dataclass(frozen=True)
class Volume:
    """What a run has to deal with: shards, pairs (all counted, or estimated from a few shards) and bytes of the input,
    whether tars are compressed, and the machines' CPUs and GPUs."""

    shards: int
    pairs: int
    exact: bool
    bytes: int
    compressed: bool
    cpus: int
    gpus: int
    workers: int
    steps: int
    checkpoints: int
    runs: int


@dataclass(frozen=True)
class StageCost:
    """One stage: seconds, hours of all GPUs it holds, bytes in memory of its largest process, bytes on storage."""

    stage: str
    seconds: float
    gpu_hours: float
    memory: int
    storage: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def costs(config: Config, rates: Rates, volume: Volume) -> list[StageCost]:
    """The stages in order. `volume.checkpoints` counts those of one run, `volume.steps` a run's steps."""
    return [
        _inventory(rates, volume),
        _train(config, rates, volume),
        _directions(config, rates, volume),
        _score(config, rates, volume),
        _select(config, volume),
        _emit(config, volume),
    ]


def _at_once(count: int, places: int) -> int:
    """Rounds in which `count` equal pieces of work are done in `places` places."""
    return ceil(count / max(min(count, places), 1)) if count else 0


def _inventory(rates: Rates, volume: Volume) -> StageCost:
    shard = rates.count * volume.pairs / max(volume.shards, 1)
    seconds = rates.start + shard * _at_once(volume.shards, volume.cpus // TASK_CPUS)
    return StageCost("inventory", seconds, 0.0, PROCESS_BYTES, 100 * volume.shards)


def _train(config: Config, rates: Rates, volume: Volume) -> StageCost:
    model = 4 * rates.parameters
    adam = 3 if config.proxy.optimizer == "adamw" else 1
    storage = model * adam * volume.checkpoints * volume.runs
    if config.proxy.checkpoints is not None:
        return StageCost("train", 0.0, 0.0, PROCESS_BYTES, storage)
    share = config.proxy.subset * config.proxy.runs
    cached = volume.pairs if share >= 0.5 else share * volume.pairs
    cache = rates.start + rates.decode * cached * volume.workers / max(volume.cpus, 1)
    places = volume.gpus or volume.cpus // TASK_CPUS
    if config.proxy.workers > 1:
        steps = volume.runs * volume.steps * rates.step / min(config.proxy.workers, max(places, 1))
    else:
        steps = _at_once(volume.runs, places) * volume.steps * rates.step
    hours = (cache + steps) / 3600 * min(volume.gpus, volume.runs * config.proxy.workers)
    batch = config.proxy.batch_size * rates.pixels * 4
    stored = storage + cached * (rates.pixels + 4 * rates.tokens + 24)
    return StageCost("train", cache + steps, hours, PROCESS_BYTES + 4 * model + batch, int(stored))


def _directions(config: Config, rates: Rates, volume: Volume) -> StageCost:
    m = volume.checkpoints * volume.runs
    whole_run = config.score.estimator in WHOLE_RUN
    places = volume.gpus or volume.cpus // TASK_CPUS
    pieces = volume.runs if whole_run else m
    piece = rates.directions if whole_run else rates.directions / volume.checkpoints
    if config.score.estimator == "unrolled" and config.score.replay == "exact":
        piece = volume.steps * rates.step * REPLAY_STEPS
    drawn = config.reference.pairs + config.reference.gradient_pairs
    drawn += config.target.pairs
    # R, B and V are drawn from all shards; compressed ones are read up to the last pair that is wanted.
    walked = min(volume.pairs, drawn / max(volume.shards, 1) * volume.pairs) if volume.compressed else 0
    read = 2 * rates.count * walked
    seconds = rates.start + read + rates.decode * drawn + piece * _at_once(pieces, places)
    memory = PROCESS_BYTES + 4 * (6 * rates.parameters + rates.directed) + rates.random
    storage = 4 * rates.directed * m + drawn * (rates.pixels + 8 * rates.tokens + 16)
    return StageCost("directions", seconds, seconds / 3600 * volume.gpus, memory, int(storage))


def _score(config: Config, rates: Rates, volume: Volume) -> StageCost:
    m, sample = volume.checkpoints * volume.runs, config.score.sample
    facts = facts_of(config.score.estimator)
    terms = rates.checkpoint * m if facts.tangents or facts.forwards else 0.0
    seen = rates.observe * volume.runs
    # A pass with tangents gives loss and similarity, too; a difference of passes does not.
    every = rates.last * volume.runs + terms * (1 - 1 / volume.checkpoints)
    device = every if sample == 1 else sample * terms + seen
    # Without a GPU decoding takes the same cores as the passes; with one it overlaps them.
    pair = max(device, rates.decode) if volume.gpus else device + rates.decode
    reference = (terms + seen) * config.reference.pairs
    rounds = _at_once(volume.shards, volume.workers)
    seconds = rates.start + reference + rounds * pair * volume.pairs / max(volume.shards, 1)
    stored = SCORE_BYTES + (2 * rates.embedding if config.score.embeddings else 0)
    if sample < 1:
        seconds += 2 * rates.start  # the fit, and the workers that predict
        stored += SCORE_BYTES + 2 * rates.embedding * volume.runs
    weights = 4 * (rates.parameters * (2 + m) + rates.directed * m)
    shard = volume.pairs / max(volume.shards, 1) * (rates.pixels + 8 * rates.tokens)
    memory = PROCESS_BYTES + weights + rates.random + (config.engine.prefetch + 1) * shard
    hours = seconds / 3600 * min(volume.gpus, volume.workers)
    return StageCost("score", seconds, hours, int(memory), int(stored * volume.pairs))


def _select(config: Config, volume: Volume) -> StageCost:
    kept = int(KEEP_BYTES * _kept(config, volume.pairs))
    return StageCost("select", volume.pairs / SELECT_RATE, 0.0, PROCESS_BYTES, kept)


def _emit(config: Config, volume: Volume) -> StageCost:
    share = _kept(config, volume.pairs) / max(volume.pairs, 1)
    copied = share * volume.bytes if config.emit.materialize else 0
    seconds = volume.pairs * share / SELECT_RATE + copied / RESHARD_RATE / max(volume.cpus, 1)
    return StageCost("emit", seconds, 0.0, PROCESS_BYTES, int(copied + 16 * share * volume.pairs))


def _kept(config: Config, pairs: int) -> float:
    """Pairs that a fraction or count keeps; of a threshold or a band all, which is the most it can be."""
    keep = config.select.keep
    if isinstance(keep, float):
        return keep * pairs
    return min(keep, pairs) if isinstance(keep, int) else pairs

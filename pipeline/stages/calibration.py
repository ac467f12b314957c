"""What a process of a plan's calibration does: a few seconds of each kind of work, in a task of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import numpy as np
import torch

from pipeline.config import Config
from pipeline.data.decode import Decoder
from pipeline.data.reader import ShardReader, read_shard
from pipeline.device import device_of_this_task
from pipeline.engine.connect import reserved_here
from pipeline.engine.resources import decode_threads
from pipeline.errors import InputError
from pipeline.influence import Batches, ProbePlan, Scorer, Settings, prepare_run
from pipeline.influence.scorer import random_bytes
from pipeline.models.clip import PairModel, build_model, split_state
from pipeline.prepared import settings_of
from pipeline.replay.schedule import TrainingSettings, data_order
from pipeline.replay.train import InMemory, Trainer
from pipeline.stages.costs import Rates
from pipeline.types import AdamState, Checkpoint, PairBatch

#: Pairs that are decoded, and the most that later measurements work on.
PAIRS = 512
#: More training steps than even a small model takes in the time that they are measured for.
MOST_STEPS = 10_000
#: Fewest pairs of a measurement: below it a pass costs more per pair than in a run.
FEWEST = 8


def measure(config: Config, url: str, checkpoints: int, seconds: float, asked: float) -> Rates:
    """Seconds of each kind of work in this process, which is like those that score; all but the training step.

    Args:
        config: the run's.
        url: the shard that is read.
        checkpoints: recorded ones per run.
        seconds: how long each kind of work is measured for, about.
        asked: when this process was asked for, since 1970.

    Raises `InputError` when too few of the shard's pairs can be decoded.
    """
    device, model = device_of_this_task(config.score.precision), build_model(config.proxy.model, loss=config.proxy.loss)
    start = time.time() - asked
    count = _seconds_per_sample(url)
    begin = time.perf_counter()
    pairs = _first_pairs(config, url, model)
    decode = (time.perf_counter() - begin) / len(pairs)
    points = [_checkpoint(model, number, config) for number in range(2)]
    settings = settings_of(config)
    directions, plans = _directions(model.to(device), points, pairs, settings, config, checkpoints, seconds)
    few = pairs[: config.reference.pairs]
    last, both = (
        Scorer(model, list(zip(points, plans, strict=True))[-n:], few, settings, device, config.score.batch_size)
        for n in (1, 2)
    )
    size = min(config.score.batch_size, len(pairs))

    def per_pair(work: Callable[[PairBatch], object]) -> float:
        return seconds_of(lambda n: work(pairs[:n]), size, size, seconds) / size

    one, two, observe = per_pair(last.score), per_pair(both.score), per_pair(last.observe)
    return Rates(
        start=start,
        count=count,
        decode=decode,
        checkpoint=max(two - one, 0.0),
        last=one,
        observe=observe,
        directions=directions,
        step=0.0,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        directed=sum(value.numel() for tree in plans[-1].vectors.values() for value in tree.values()),
        random=random_bytes(plans[-1]),
        pixels=pairs.images[0].numel(),
        tokens=pairs.tokens.shape[1],
        embedding=last.observe(pairs[:1]).embedding.shape[2],
    )


def _first_pairs(config: Config, url: str, model: PairModel) -> PairBatch:
    threads = decode_threads(config.engine, *reserved_here())
    decoder = Decoder.configured(model.image_spec, model.tokenize, config.data)
    with read_shard(url, caption=config.data.caption) as reader:
        pairs = decoder.decode_shard(islice(iter(reader), PAIRS), threads).batch
    if len(pairs) < FEWEST:
        raise InputError(f"{url}: expected at least {FEWEST} readable pairs to calibrate with, found {len(pairs)}")
    return pairs


def seconds_of(work: Callable[[int], object], target: int, most: int, seconds: float) -> float:
    """Seconds of `work(target)`, after a few calls with smaller sizes.

    Sizes are doubled, once at least, until a call takes `seconds` or `most` is reached; from there on it goes by the
    slope between the last two, since a call costs something whatever its size. The last size is called until `seconds`
    are over, the mean counts.
    """
    size = min(FEWEST, most, target)
    work(size)
    before = (0, 0.0)
    taken = _called(work, size, 0.0)
    while (taken < seconds or before[0] == 0) and size < min(most, target):
        before = (size, taken)
        size = min(2 * size, most, target)
        taken = _called(work, size, 0.0)
    taken = _called(work, size, seconds)
    slope = max((taken - before[1]) / (size - before[0]), 0.0)
    return taken + slope * (target - size)


def _called(work: Callable[[int], object], size: int, seconds: float) -> float:
    """Mean seconds of `work(size)`, called until `seconds` are over, once at least."""
    _wait_for_the_gpu()
    calls, begin = 0, time.perf_counter()
    while not calls or time.perf_counter() - begin < seconds:
        work(size)
        calls += 1
    _wait_for_the_gpu()
    return (time.perf_counter() - begin) / calls


def _wait_for_the_gpu() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _seconds_per_sample(url: str) -> float:
    begin = time.perf_counter()
    with ShardReader(url) as reader:
        samples, _ = reader.locate()
    return (time.perf_counter() - begin) / max(samples, 1)


def training_step(config: Config, url: str, seconds: float) -> float:
    """Seconds of a step in this process, which is like those of a proxy run."""
    device, model = device_of_this_task(config.proxy.precision), build_model(config.proxy.model, loss=config.proxy.loss)
    pairs = _first_pairs(config, url, model)
    trainers: dict[int, Trainer] = {}

    def step(size: int) -> None:
        if size not in trainers:
            trainers[size] = _trainer(model, pairs, size, config, device)
        trainers[size].advance()

    return seconds_of(step, config.proxy.batch_size, len(pairs), seconds)


def _trainer(model: PairModel, pairs: PairBatch, size: int, config: Config, device: str) -> Trainer:
    proxy = config.proxy.model_copy(update={"batch_size": size, "workers": 1})
    settings = replace(TrainingSettings.of(config.model_copy(update={"proxy": proxy}), size), steps=MOST_STEPS, lr=1e-6)
    return Trainer(model, InMemory(pairs), data_order(np.arange(len(pairs)), settings), settings, device)


def _checkpoint(model: PairModel, number: int, config: Config) -> Checkpoint:
    """The model as a recorded checkpoint, with Adam's state where a run has it."""
    params, buffers = split_state(model)
    params = {name: value.detach().clone() for name, value in params.items()}
    adam = None
    if config.proxy.optimizer == "adamw":
        mean, square = ({name: torch.full_like(value, 1e-3) for name, value in params.items()} for _ in range(2))
        adam = AdamState(10, mean, square, config.proxy.beta1, config.proxy.beta2, config.proxy.eps)
    return Checkpoint(10 * (number + 1), config.proxy.lr, 0, params, dict(buffers), adam)


def _directions(
    model: PairModel,
    points: list[Checkpoint],
    pairs: PairBatch,
    settings: Settings,
    config: Config,
    checkpoints: int,
    seconds: float,
) -> tuple[float, list[ProbePlan]]:
    """Seconds for all checkpoints of a run, and plans of the two."""
    gradient, target = config.reference.gradient_pairs, config.target.pairs
    reference = pairs[: config.reference.pairs]
    how = replace(settings, replay="checkpoints")

    def plans(size: int) -> list[ProbePlan]:
        # B and V overlap here, which changes no cost.
        parts = (pairs[: max(2, round(size * share / (gradient + target)))] for share in (gradient, target))
        return prepare_run(model, points, Batches(reference, *parts), how, dataset_size=1000)

    taken = seconds_of(plans, gradient + target, len(pairs), seconds)
    return taken * checkpoints / len(points), plans(FEWEST)

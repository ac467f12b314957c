"""`diffprune plan`: what a run will take, from a look at its shards and a short calibration on its machines."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

import ray
from rich.console import Console
from rich.table import Table

from pipeline.config import Config
from pipeline.data.demo import make_demo
from pipeline.data.inventory import ShardInfo, inspect_shard, read_inventory
from pipeline.data.shards import expand
from pipeline.data.stream import describe
from pipeline.device import gpus_for_a_task
from pipeline.engine.connect import alive_nodes, cluster_address, connect
from pipeline.engine.progress import say
from pipeline.engine.resources import plan_workers
from pipeline.errors import InputError, StageError
from pipeline.patience import kill
from pipeline.replay.schedule import TrainingSettings
from pipeline.stages.checks import check_ahead, check_given
from pipeline.stages.costs import Rates, StageCost, Volume, costs
from pipeline.stages.job import Job, demo_folder, open_job, uses_demo
from pipeline.store import storage
from pipeline.text import count, plural, rough_duration, size

#: Shards whose samples are counted where there is no inventory yet, and those whose sizes are asked for.
COUNTED, SIZED = 8, 200

#: Seconds that each kind of work is measured for, about.
SECONDS = 2.0

#: Seconds after which a wait for room in the cluster is told, and given up: an autoscaler starts machines in minutes.
WAITS, WAITS_AT_MOST = 10.0, 900.0


def plan(config: Config) -> tuple[list[StageCost], Rates, Volume]:
    """Calibrate on the cluster that a run of this config would use. Nothing is written to the run's folder.

    Raises `ConfigError` where that run would be refused before any work.
    """
    check_given(config)
    check_ahead(config)
    with _open(config) as job:
        return _plan(job)


@contextmanager
def _open(config: Config) -> Iterator[Job]:
    """The run's job; where it is for demo data that are not written yet, one in a temporary folder that has them."""
    job = open_job(config)
    if not uses_demo(config) or storage.exists(demo_folder(config)):
        yield job
        return
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = config.model_copy(update={"out": folder})
        make_demo(demo_folder(elsewhere), seed=config.seed)
        yield open_job(elsewhere)


def _plan(job: Job) -> tuple[list[StageCost], Rates, Volume]:
    config = job.config
    urls = expand(config.data.shards, "data.shards")
    known = _inventory(job, urls)
    with connect(config.engine):
        nodes = alive_nodes()
        asked = plan_workers(config.engine, nodes)
        if not asked.fitting:
            _wait_for_room(asked.options())
            nodes = alive_nodes()
            asked = plan_workers(config.engine, nodes)
        there = min(max(asked.fitting, 1), asked.workers, len(urls))
        # A cluster that was joined may grow to what is asked for; this machine alone does not.
        workers = min(asked.workers, len(urls)) if cluster_address(config.engine) is not None else there
        checkpoints, runs = _checkpoints(config)
        seen = max(round(known[0] * config.proxy.subset), config.proxy.batch_size)
        volume = Volume(
            shards=len(urls),
            pairs=known[0],
            exact=known[2],
            bytes=known[1],
            compressed=any(not url.endswith(".tar") for url in urls),
            cpus=_grown(nodes, "CPU", workers * asked.cpus),
            gpus=_grown(nodes, "GPU", workers * asked.gpus),
            workers=workers,
            steps=TrainingSettings.of(config, seen).steps,
            checkpoints=checkpoints,
            runs=runs,
        )
        kinds = f"measuring each kind of work with {plural(there, 'worker')}"
        more = f"; the plan is for the {workers} asked for" if workers > there else ""
        say("plan", f"{kinds}, which takes a minute or so{more}")
        rates = _calibrate(config, [urls[n] for n in range(there)], asked.options(), checkpoints)
    return costs(config, rates, volume), rates, volume


def _grown(nodes: Sequence[dict[str, float]], kind: str, asked: float) -> int:
    """What the machines have, or will have once they hold all workers."""
    return max(int(sum(node.get(kind, 0) for node in nodes)), math.ceil(asked - 1e-6))


def _calibrate(config: Config, urls: Sequence[str], options: dict[str, Any], checkpoints: int) -> Rates:
    """Measure in one process for each of `urls` at once, its shard; means over them.

    Raises `InputError` when no pair of these shards can be decoded, `StageError` when no machine has room.
    """
    # Proxy runs are fewer processes, which share the machine with less.
    training = {"num_cpus": 1, "num_gpus": gpus_for_a_task(config.proxy.gpus_per_worker)}
    _wait_for_room(options)
    found: list[Rates] = _at_once(_measure, [(config, url, checkpoints, SECONDS, time.time()) for url in urls], options)
    _wait_for_room(training)
    runs = urls[: config.proxy.runs]
    steps: list[float] = _at_once(_training_step, [(config, url, SECONDS) for url in runs], training)
    times = ("start", "count", "decode", "checkpoint", "last", "observe", "directions")
    means: dict[str, Any] = {name: fmean(getattr(rates, name) for rates in found) for name in times}
    return replace(found[0], **means, step=fmean(steps))


def _at_once(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], options: dict[str, Any]) -> list[Any]:
    """What the calls return, each in a task that asks for `options`."""
    task = ray.remote(function).options(max_retries=0, **options)
    try:
        returned: list[Any] = ray.get([task.remote(*arguments) for arguments in calls])
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, InputError) else error from None
    return returned


def _wait_for_room(options: dict[str, Any]) -> None:
    """Until a task that asks for `options` has run. Raises `StageError` after `WAITS_AT_MOST` seconds."""
    probe = ray.remote(_nothing).options(max_retries=0, **options).remote()
    if ray.wait([probe], timeout=WAITS)[0]:
        return
    asked = ", ".join(f"{key}={value:g}" for key, value in options.items() if value)
    say("plan", f"no machine has room for a process with {asked}; the cluster is asked for it")
    if not ray.wait([probe], timeout=WAITS_AT_MOST)[0]:
        kill([probe])
        raise StageError(f"plan: no machine had room for a process with {asked} within {rough_duration(WAITS_AT_MOST)}")


def _nothing() -> None:
    """Runs where there is room."""


def _measure(*arguments: Any) -> Rates:
    from pipeline.stages.calibration import measure

    return measure(*arguments)


def _training_step(*arguments: Any) -> float:
    from pipeline.stages.calibration import training_step

    return training_step(*arguments)


def _inventory(job: Job, urls: Sequence[str]) -> tuple[int, int, bool]:
    """Pairs and bytes of the input, from the inventory where there is one, else from a few shards; whether exact."""
    if storage.exists(job.folder.inventory):
        infos = read_inventory(job.folder.inventory)
        if [info.url for info in infos] == list(urls):
            return sum(info.samples for info in infos), sum(info.bytes for info in infos), True

    def some(number: int) -> list[str]:
        return [urls[place * len(urls) // min(number, len(urls))] for place in range(min(number, len(urls)))]

    with ThreadPoolExecutor(16) as pool:
        sizes = list(pool.map(lambda url: describe(url)[0], some(SIZED)))
        counted: list[ShardInfo] = list(pool.map(inspect_shard, range(COUNTED), some(COUNTED)))
    total = round(sum(sizes) / len(sizes) * len(urls))
    pairs = sum(info.samples for info in counted)
    if len(counted) == len(urls):
        return pairs, total, True
    return round(total * pairs / max(sum(info.bytes for info in counted), 1)), total, False


def _checkpoints(config: Config) -> tuple[int, int]:
    """Checkpoints of one run, and runs."""
    proxy = config.proxy
    if proxy.checkpoints is not None:
        return len(proxy.checkpoints), 1
    return len(proxy.checkpoint_at) if isinstance(proxy.checkpoint_at, list) else proxy.num_checkpoints, proxy.runs


def show_plan(config: Config, *, as_json: bool = False) -> None:
    """Print the plan of a run as a table, or as JSON."""
    stages, rates, volume = plan(config)
    if as_json:
        print(json.dumps({
            "stages": [stage.to_dict() for stage in stages],
            "rates": asdict(rates),
            "volume": asdict(volume),
        }, indent=2))  # fmt: skip
        return
    console = Console()
    machine = f"{plural(volume.cpus, 'CPU')}, {plural(volume.gpus, 'GPU') if volume.gpus else 'no GPU'}"
    pairs = f"{'' if volume.exact else 'about '}{plural(volume.pairs, 'pair')}"
    console.print(
        f"{pairs} in {plural(volume.shards, 'shard')} ({size(volume.bytes)}); "
        f"{plural(volume.workers, 'worker')} on {machine}",
        highlight=False,
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("stage", "time", "GPU hours", "memory per process", "storage"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in stages:
        table.add_row(*_row(stage))
    total = StageCost(
        "all",
        math.fsum(stage.seconds for stage in stages),
        math.fsum(stage.gpu_hours for stage in stages),
        max(stage.memory for stage in stages),
        sum(stage.storage for stage in stages),
    )
    table.add_row(*_row(total), style="bold")
    console.print(table)
    console.print(
        f"measured: {1 / rates.decode:,.0f} pairs/s decoded, {1 / rates.observe:,.0f} pairs/s forward, "
        f"{count(round(rates.step * 1000))} ms per training step, by each of {plural(volume.workers, 'worker')}",
        highlight=False,
    )


def _row(stage: StageCost) -> tuple[str, ...]:
    hours = f"{stage.gpu_hours:.1f}" if stage.gpu_hours else "0"
    return stage.stage, rough_duration(stage.seconds), hours, size(stage.memory), size(stage.storage)

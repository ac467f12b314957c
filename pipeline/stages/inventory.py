"""The inventory stage: which shards there are, and how many samples each of them has."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pipeline.data.inventory import ShardInfo, inspect_shard, read_inventory, write_inventory
from pipeline.data.shards import expand
from pipeline.engine.progress import say
from pipeline.engine.tasks import run_tasks
from pipeline.errors import FingerprintError, InputError
from pipeline.patience import Patience
from pipeline.stages.job import Job
from pipeline.stages.versions import changed_since
from pipeline.store import storage
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.task_marks import TaskMarks
from pipeline.text import plural

#: What to do where a run's folder holds results of other shards.
_WAYS_OUT = "use another run folder, or engine.stale=redo to replace what was made of them"


def take_inventory(job: Job) -> None:
    """Write `inventory.parquet`: one row per shard; shards counted by an interrupted call are not read again."""
    urls = expand(job.config.data.shards)
    found = _known_shards(job, urls)
    left = [number for number in range(len(urls)) if number not in found]
    if not left:
        return

    def keep(number: int, info: list[Any]) -> None:
        found[left[number]] = ShardInfo(*info)

    # Every mark holds the parts of its fingerprint, and every task its marks: a digest, not the list of all shards.
    counted = Fingerprint({"shards": Fingerprint({"urls": urls, "left": left}).digest})
    marks = TaskMarks(storage.join(job.folder.root, "scratch", "inventory"), counted)
    outcome = run_tasks(
        _inspect,
        [(number, urls[number], job.folder.places(number)) for number in left],
        run=job.folder,
        stage="inventory",
        config=job.config.engine,
        on_result=keep,
        name=lambda item: item[1],
        marks=marks if len(left) > 1 else None,
        unit="shards",
        patience=Patience(job.config.engine.shard_timeout),
    )
    outcome.check("inventory")
    if not any(info.samples for info in found.values()):
        first = found[0]
        reason = f" ({first.end_error})" if first.end_error else ""
        raise InputError(f"{first.url}: expected image-text pairs, found none here{reason} or in any other shard")
    write_inventory(job.folder.inventory, [found[number] for number in range(len(urls))])
    storage.remove_folder(marks.folder)
    _warn_of_equal_names(urls)


def _warn_of_equal_names(urls: list[str]) -> None:
    """Say so where shards of different folders have one file name: a made-up uid consists of file name and key."""
    name, shards = Counter(map(storage.basename, urls)).most_common(1)[0]
    if shards > 1:
        say(
            "inventory",
            f"warning: {plural(shards, 'shard')} are named {name}: pairs in them that have one key and no uid of "
            "their own are taken for one pair wherever uids count (uids.npy, draws, evaluate.truth); give them names "
            "of their own",
        )


def _known_shards(job: Job, urls: list[str]) -> dict[int, ShardInfo]:
    """Shards of the inventory that need not be counted again: those of the same list that are as they were.

    Raises `FingerprintError` where one has changed, or where checkpoints or scores were made of another list, with
    `engine.stale: refuse`.
    """
    if not storage.exists(job.folder.inventory):
        return {}
    refuse = job.config.engine.stale == "refuse"
    known = read_inventory(job.folder.inventory)
    before = [info.url for info in known]
    if before != urls:
        if refuse and _is_used(job):
            raise FingerprintError(
                f"{job.folder.inventory} lists other shards than the config ({_difference(before, urls)}), and "
                f"checkpoints or scores were made of them: {_WAYS_OUT}"
            )
        return {}
    changed = changed_since(known, "inventory", job.config.engine)
    if changed and refuse:
        others = f", and so for {plural(len(changed) - 1, 'other shard')}" if len(changed) > 1 else ""
        raise FingerprintError(f"{changed[0][1]}{others}: put them back, or {_WAYS_OUT}")
    numbers = {info.index for info, _ in changed}
    return {info.index: info for info in known if info.index not in numbers}


def _is_used(job: Job) -> bool:
    """Whether something was made of the shards of the inventory."""
    return storage.exists(job.folder.checkpoint_manifest) or bool(storage.list_files(job.folder.scores, ".json"))


def _difference(before: list[str], now: list[str]) -> str:
    """How two lists of shards differ, with an example."""
    lost, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
    found = [f"{len(urls):,} {verb}, {urls[0]} for one" for urls, verb in ((lost, "left out"), (new, "added")) if urls]
    return "; ".join(found) or "the same ones in another order"


def _inspect(item: tuple[int, str, str]) -> list[Any]:
    info = inspect_shard(*item)
    return [info.index, info.url, info.name, info.samples, info.bytes, info.etag, info.end_error]

"""Hands a finished selection over: writes every file that a training run, or a person, needs to use it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.config import Config
from pipeline.data.inventory import ShardInfo, changed_shards
from pipeline.emit.captions import caption_part
from pipeline.emit.card import render_card
from pipeline.emit.keys import keys_repeat
from pipeline.emit.manifest import ManifestLine, SelectionFolder, build_manifest, write_manifest
from pipeline.emit.plan import Input, Plan
from pipeline.emit.reshard import FORMAT, ShardStats, reshard
from pipeline.emit.summary import account
from pipeline.emit.train_script import (
    TrainCommand,
    consumer_model,
    consumer_url,
    is_our_model,
    join_urls,
    most_loaders,
    shard_pattern,
)
from pipeline.emit.uids import read_uids, write_uids
from pipeline.errors import InputError, StageError
from pipeline.run import RunFolder
from pipeline.selection.summary import SelectionSummary, read_summary
from pipeline.selection.tasks import MapTasks
from pipeline.store import marks, storage
from pipeline.store.commits import read_marks
from pipeline.store.fingerprint import Fingerprint


@dataclass(frozen=True)
class EmitSummary:
    """What was handed over.

    Attributes:
        selection: its name.
        counts: pairs in, kept, pruned and rejected by reason (`summary.account`).
        uids: distinct uids among the kept pairs.
        tars: pruned tars, 0 where none were asked for.
        bytes: of all pruned tars.
        suffixed: whether keys got the number of their input shard, because they repeat.
        json_added: pairs that got a `json` member with their uid, having none.
        json_without_uid: pairs whose own `json` holds no uid.
        warnings: what to know before training.
    """

    selection: str
    counts: dict[str, Any]
    uids: int
    tars: int
    bytes: int
    suffixed: bool
    json_added: int
    json_without_uid: int
    warnings: list[str]


#: Calls a picklable function with one item, in this process or another, and gives its result.
Apart = Callable[[Callable[[Any], Any], Any], Any]


def here(function: Callable[[Any], Any], item: Any) -> Any:
    """Call it in this process."""
    return function(item)


def emit(
    run: RunFolder,
    config: Config,
    inventory: Sequence[ShardInfo],
    *,
    map_tasks: MapTasks = map,
    apart: Apart = here,
    command: str = "",
) -> EmitSummary:
    """Write manifest, uids, training command, card and, if asked for, pruned tars of `config.select.name`.

    Called again it does only what is missing or was made of another selection; `emit.json` is written last.

    Args:
        map_tasks: like `map`: applies a function to items, anywhere, and gives the results in order.
        apart: calls a function with an item, anywhere: for the two passes over all uids and keys.
        command: the command line, for the card.

    Raises `StageError` when the selection is not finished or keeps nothing, `InputError` when a shard is no longer
    what was scored.
    """
    selection = read_summary(run, config.select.name)
    if not selection.kept:
        raise StageError(f"selection {selection.name!r} keeps no pair: expected at least one to hand over")
    for shard in selection.shards:
        info = inventory[shard.shard] if shard.shard < len(inventory) else None
        if info is None or (info.name, info.samples) != (storage.basename(shard.url), shard.rows):
            raise StageError(
                f"selection {selection.name!r} was made of other shards than there are now, {shard.url} for one: score "
                "and select again"
            )
    folder = SelectionFolder(run.selection(selection.name))
    fingerprint = emit_fingerprint(config, inventory, selection)
    earlier = marks.read_mark(folder.mark)
    if earlier is not None and earlier["fingerprint"] == fingerprint.digest and _complete(folder, earlier):
        return parse_mark(earlier)
    storage.remove(folder.mark)

    lines = build_manifest(inventory, selection)
    write_manifest(folder.manifest, lines)
    keep_files = [storage.join(folder.root, line.keep) for line in lines if line.keep is not None]
    summary = EmitSummary(
        selection=selection.name,
        counts=account(selection),
        uids=apart(_write_uids, (folder.uids, keep_files)),
        tars=0,
        bytes=0,
        suffixed=False,
        json_added=0,
        json_without_uid=0,
        warnings=[],
    )
    stats: list[ShardStats] = []
    if config.emit.materialize:
        apart(_check_unchanged, [info for info, line in zip(inventory, lines, strict=True) if line.num_kept])
        plan = make_plan(run, config, inventory, lines, fingerprint.digest, apart)
        stats = reshard(plan, map_tasks)
        summary = replace(
            summary,
            tars=plan.shards,
            bytes=sum(entry.bytes for entry in stats),
            suffixed=plan.suffix_keys,
            json_added=sum(entry.json_added for entry in stats),
            json_without_uid=sum(entry.json_without_uid for entry in stats),
        )
    else:
        storage.remove_folder(folder.shards)  # of an earlier hand-over
    train = train_command(config, folder, lines, [entry.successes for entry in stats])
    summary = replace(summary, warnings=[*_of_repeated_uids(selection.kept, summary.uids), *train.warnings()])
    storage.write_bytes(folder.train_script, train.render().encode())
    storage.write_bytes(folder.card, _card(run, config, inventory, selection, summary, command).encode())
    marks.write_mark(folder.mark, fingerprint, asdict(summary))
    return summary


def _of_repeated_uids(kept: int, uids: int) -> list[str]:
    if uids == kept:
        return []
    return [
        f"uids.npy names {uids:,} uids for {kept:,} kept pairs, as some have the uid of another (repeated in their "
        "json, or shards of one file name); everything else has each of them"
    ]


def _check_unchanged(shards: Sequence[ShardInfo]) -> None:
    for _, problem in changed_shards(shards):
        raise InputError(problem)


def _write_uids(files: tuple[str, list[str]]) -> int:
    url, keep_files = files
    return write_uids(url, read_uids(keep_files))


def emit_fingerprint(config: Config, inventory: Sequence[ShardInfo], selection: SelectionSummary) -> Fingerprint:
    """What decides the files that are handed over: the selection, the input shards, the settings."""
    return Fingerprint(
        {
            **selection_digests(inventory, selection),
            "format": FORMAT,
            "emit": config.emit.model_dump(mode="json"),
            "model": config.proxy.model,
            "seed": config.seed,
            **caption_part(config.data.caption),
        }
    )


def selection_digests(inventory: Sequence[ShardInfo], selection: SelectionSummary) -> dict[str, str]:
    """The parts of the fingerprint that can be checked without the config: which pairs, of which shards."""
    shards = [[info.url, info.bytes, info.etag] for info in inventory]
    return {"selection": _digest(selection), "inventory": storage.checksum(json.dumps(shards).encode())}


def _digest(selection: SelectionSummary) -> str:
    chosen = {name: value for name, value in vars(selection).items() if name not in ("seconds", "folder")}
    return storage.checksum(json.dumps(chosen, sort_keys=True, default=vars).encode())


def is_emitted(run: RunFolder, name: str) -> bool:
    """Whether the finished selection `name`, as it is now, was handed over."""
    mark = marks.read_mark(SelectionFolder(run.selection(name)).mark)
    return mark is not None and mark.get("parts", {}).get("selection") == _digest(read_summary(run, name))


def parse_mark(mark: dict[str, Any]) -> EmitSummary:
    """The summary in `emit.json`. Raises `KeyError` when something is missing."""
    return EmitSummary(**{name: mark[name] for name in EmitSummary.__dataclass_fields__})


def make_plan(
    run: RunFolder,
    config: Config,
    inventory: Sequence[ShardInfo],
    lines: Sequence[ManifestLine],
    fingerprint: str,
    apart: Apart = here,
) -> Plan:
    """Which kept pair goes to which pruned tar."""
    folder = SelectionFolder(run.selection(config.select.name))
    inputs = tuple(
        Input(
            number=info.index,
            name=info.name,
            url=info.url,
            keep=storage.join(folder.root, line.keep),
            kept=line.num_kept,
            places=run.places(info.index),
        )
        for info, line in zip(inventory, lines, strict=True)
        if line.keep is not None and line.num_kept
    )
    return Plan(
        folder=folder.shards,
        inputs=inputs,
        pairs_per_shard=config.emit.pairs_per_shard,
        seed=config.seed if config.emit.shuffle else None,
        suffix_keys=apart(keys_repeat, [item.keep for item in inputs]),
        fingerprint=fingerprint,
        caption=config.data.caption,
    )


def train_command(
    config: Config, folder: SelectionFolder, lines: Sequence[ManifestLine], tars: Sequence[int]
) -> TrainCommand:
    """The open_clip command for the pruned tars, or without them for the input shards read through the keep lists.

    `tars` are the pairs of each pruned tar.
    """
    local = storage.is_local(folder.root)
    used = [line for line in lines if line.num_kept]
    kept = sum(line.num_kept for line in used)
    if tars and local:
        data = f'"{shard_pattern("$here/shards", len(tars))}"'
    elif tars:
        data = shlex.quote(join_urls([consumer_url(f"{folder.shards}/{tar:05d}.tar") for tar in range(len(tars))]))
    else:
        data = shlex.quote(join_urls([consumer_url(line.url) for line in used]))
    batch_size = min(config.emit.train_batch_size, kept)
    keep = '--keep "$here"' if local else f"--keep {shlex.quote(folder.root)}"
    return TrainCommand(
        module="open_clip_train.main" if tars and not is_our_model(config.proxy.model) else "pipeline.loader",
        options="" if tars else keep,
        train_data=data,
        num_samples=kept,
        loaders=most_loaders(tars or [line.num_kept for line in used], batch_size),
        model=consumer_model(config.proxy.model),
        batch_size=batch_size,
        epochs=config.emit.train_epochs,
        seed=config.seed,
    )


def _complete(folder: SelectionFolder, mark: dict[str, Any]) -> bool:
    """Whether the files that a mark speaks of are still there."""
    tars = [storage.join(folder.shards, f"{number:05d}.tar") for number in range(mark.get("tars", 0))]
    needed = {*tars, storage.join(folder.shards, "sizes.json")} if tars else set()
    files = [folder.manifest, folder.uids, folder.train_script, folder.card]
    return all(storage.exists(url) for url in files) and needed.issubset(storage.list_files(folder.shards))


def _card(
    run: RunFolder,
    config: Config,
    inventory: Sequence[ShardInfo],
    selection: SelectionSummary,
    summary: EmitSummary,
    command: str,
) -> str:
    mark = next(read_marks(run), None)
    scored_by = {} if mark is None else mark.settings
    names = ("uids", "tars", "suffixed", "json_added", "json_without_uid")
    return render_card(
        config,
        inventory,
        selection,
        counts=summary.counts,
        scored_by=scored_by,
        command=command,
        files={name: getattr(summary, name) for name in names},
    )

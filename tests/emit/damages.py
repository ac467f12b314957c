"""What can happen to the files of a finished run, and what `verify` says of each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_table(path: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def edit_uids(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(path, change(np.load(path)))


def fullest(run: Path) -> Path:
    """The longest keep list."""
    return max(sorted((run / "pruned" / "keep").iterdir()), key=lambda path: pq.read_metadata(path).num_rows)


def truncate(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:-cut])


def set_value(name: str, value: Any) -> Callable[[Any], None]:
    return lambda tree: tree.__setitem__(name, value)


def keep_a_rejected_pair(run: Path) -> None:
    (row,) = pq.read_table(run / "scores" / "00003.parquet", columns=["uid", "key", "index", "utility"]).to_pylist()
    edit_table(run / "pruned" / "keep" / "00003.parquet", lambda rows: rows.append(row))


def exchange_a_pair(run: Path) -> None:
    tar = run / "pruned" / "shards" / "00002.tar"
    key = pq.read_table(tar.with_suffix(".parquet"))["key"][1].as_py()
    tar.write_bytes(tar.read_bytes().replace(f"{key}.".encode(), b"99999999."))


Damage = Callable[[Path], None]

DAMAGES: dict[str, tuple[Damage, str]] = {
    "a score file is missing": (
        lambda run: (run / "scores" / "00001.parquet").unlink(),
        r"scores/00001\.parquet: missing, though its commit mark is there",
    ),
    "scores and mark of a shard are missing": (
        lambda run: [(run / "scores" / f"00001.{end}").unlink() for end in ("parquet", "json")] and None,
        r"scores/00001\.json: missing or unreadable: .*00001\.tar has no finished scores",
    ),
    "a score file changed": (
        lambda run: edit_table(run / "scores" / "00002.parquet", lambda rows: rows[3].update(utility=9.0)),
        r"scores/00002\.parquet: changed since it was committed",
    ),
    "a flipped bit in a score file": (
        lambda run: (run / "scores" / "00000.parquet").write_bytes(
            bytes([(data := (run / "scores" / "00000.parquet").read_bytes())[0], *data[1:30], data[30] ^ 1, *data[31:]])
        )
        and None,
        r"scores/00000\.parquet: changed since it was committed",
    ),
    "a count in a mark is off by one": (
        lambda run: edit_json(run / "scores" / "00000.json", set_value("rows", 9)),
        r"scores/00000\.json: expected the 8 samples of the inventory, found 9",
    ),
    "ok in a mark is off by one": (
        lambda run: edit_json(run / "scores" / "00000.json", set_value("ok", 7)),
        r"scores/00000\.json: expected ok and rejected pairs to add up to 8, found 7",
    ),
    "a stale fingerprint": (
        lambda run: edit_json(
            run / "scores" / "00002.json", lambda mark: mark["parts"]["score"].update(loss="row")
        ),
        r"scores/00002\.json: stale: .*score\.loss: \"row\" there, \"marginal\" now",
    ),
    "a fingerprint that is not its parts'": (
        lambda run: edit_json(run / "scores" / "00002.json", set_value("fingerprint", "0" * 32)),
        r"scores/00002\.json: its fingerprint 0+ is not the one of the values",
    ),
    "an input shard that changed after scoring": (
        lambda run: edit_table(run / "inventory.parquet", lambda rows: rows[1].update(etag="other")),
        r"scores/00001\.json: stale: .*shard\.etag",
    ),
    "an entry of a mark is missing": (
        lambda run: edit_json(run / "scores" / "00002.json", lambda mark: mark.pop("ok")),
        r"scores/00002\.json: expected the entry 'ok', found none",
    ),
    "a score file that is none": (
        lambda run: (run / "scores" / "00002.parquet").write_bytes(b"no table") and None,
        r"scores/00002\.parquet: cannot be read: ",
    ),
    "scores out of order": (
        lambda run: edit_table(run / "scores" / "00002.parquet", lambda rows: rows[0].update(index=5)),
        r"scores/00002\.parquet: expected the rows in input order, indices 0 to 7",
    ),
    "scores of no shard": (
        lambda run: shutil.copy(run / "scores" / "00000.parquet", run / "scores" / "00009.parquet") and None,
        r"scores/00009\.parquet: belongs to no shard",
    ),
    "a keep list is missing": (
        lambda run: (run / "pruned" / "keep" / "00001.parquet").unlink(),
        r"pruned/keep/00001\.parquet: missing",
    ),
    "a keep list that is none": (
        lambda run: fullest(run).write_bytes(b"no table") and None,
        r"pruned/keep/0000\d\.parquet: cannot be read: ",
    ),
    "a keep list names a uid that is not there": (
        lambda run: edit_table(fullest(run), lambda rows: rows[1].update(uid="f" * 32)),
        r"keep/0000\d\.parquet: row 1: expected the uid '[0-9a-f]{32}' of sample \d in .*scores.*, found 'f{32}'",
    ),
    "a keep list with another utility": (
        lambda run: edit_table(fullest(run), lambda rows: rows[0].update(utility=77.0)),
        r"row 0: expected the utility .* found 77\.0",
    ),
    "a keep list one row short": (
        lambda run: edit_table(fullest(run), lambda rows: rows.pop()),
        r"keep/0000\d\.parquet: expected the \d rows of the selection, found \d",
    ),
    "a keep list with a row twice": (
        lambda run: edit_table(fullest(run), lambda rows: rows.append(rows[-1])),
        r"expected ascending indices, each once",
    ),
    "a keep list with an index beyond the shard": (
        lambda run: edit_table(fullest(run), lambda rows: rows[-1].update(index=8)),
        r"expected indices below 8, found 8",
    ),
    "a keep list that keeps a rejected pair": (
        keep_a_rejected_pair,
        r"keep/00003\.parquet: row 0: a pair that was rejected \(no-caption\) is kept",
    ),
    "a keep list of no shard": (
        lambda run: shutil.copy(fullest(run), run / "pruned" / "keep" / "00044.parquet") and None,
        r"keep/00044\.parquet: belongs to no shard of the selection",
    ),
    "a selection of other scores": (
        lambda run: edit_json(run / "pruned" / "selection.json", set_value("scores", "0" * 32)),
        r"pruned: stale: selected from other scores",
    ),
    "a selection whose counts are off by one": (
        lambda run: edit_json(run / "pruned" / "selection.json", set_value("kept", 13)),
        r"selection 'default': .*expected kept \+ pruned \+ rejected to be the 25 pairs in, found 13",
    ),
    "another selection's keep list": (
        lambda run: edit_table(
            run / "selections" / "quarter" / "keep" / "00000.parquet", lambda rows: rows.clear()
        ),
        r"selections/quarter/keep/00000\.parquet: expected the \d rows",
    ),
    "an interrupted selection": (
        lambda run: (run / "pruned" / "selection.json").unlink(),
        r"selection 'default': .*diffprune select",
    ),
    "an interrupted hand-over": (
        lambda run: (run / "pruned" / "emit.json").unlink(),
        r"emit\.json: missing: the hand-over was begun and not finished",
    ),
    "a hand-over of another selection": (
        lambda run: edit_json(run / "pruned" / "emit.json", lambda mark: mark["parts"].update(selection="0" * 32)),
        r"emit\.json: stale: made of another selection",
    ),
    "a hand-over with other captions than were scored": (
        lambda run: edit_json(
            run / "pruned" / "emit.json", lambda mark: mark["parts"].update(caption="json:caption")
        ),
        r"emit\.json: stale: its captions are at json:caption, expected txt as in the scores",
    ),
    "a manifest line off by one": (
        lambda run: (path := run / "pruned" / "manifest.jsonl").write_text(
            path.read_text().replace('"num_samples": 8', '"num_samples": 9', 1)
        )
        and None,
        r"manifest\.jsonl: line 1: expected .*num_samples=8.*found .*num_samples=9",
    ),
    "a manifest line short": (
        lambda run: (path := run / "pruned" / "manifest.jsonl").write_text(
            "".join(path.read_text().splitlines(True)[:-1])
        )
        and None,
        r"manifest\.jsonl: expected 4 lines, one per input shard, found 3",
    ),
    "no manifest": (
        lambda run: (run / "pruned" / "manifest.jsonl").unlink(),
        r"pruned/manifest\.jsonl: missing",
    ),
    "a mark of the hand-over without its numbers": (
        lambda run: edit_json(run / "pruned" / "emit.json", lambda mark: mark.pop("tars")),
        r"pruned/emit\.json: expected the entry 'tars', found none",
    ),
    "a broken manifest": (
        lambda run: truncate(run / "pruned" / "manifest.jsonl", 9),
        r"manifest\.jsonl: expected one JSON object per input shard",
    ),
    "uids missing": (lambda run: (run / "pruned" / "uids.npy").unlink(), r"uids\.npy: missing"),
    "uids out of order": (
        lambda run: edit_uids(run / "pruned" / "uids.npy", lambda uids: uids[[1, 0, *range(2, len(uids))]]),
        r"uids\.npy: expected rising uids, each once: entries 0 and 1 are not",
    ),
    "a uid twice": (
        lambda run: edit_uids(run / "pruned" / "uids.npy", lambda uids: uids[[0, *range(len(uids))]]),
        r"uids\.npy: expected rising uids, each once: entries 0 and 1 are not",
    ),
    "a uid too few": (
        lambda run: edit_uids(run / "pruned" / "uids.npy", lambda uids: uids[:-1]),
        r"uids\.npy: expected the 12 distinct uids of the keep lists, found 11",
    ),
    "a uid that is not kept": (
        lambda run: edit_uids(
            run / "pruned" / "uids.npy", lambda uids: np.concatenate([uids[:-1], np.full(1, 2**64 - 1, uids.dtype)])
        ),
        r"uids\.npy: entry 11: expected [0-9a-f]{32} of the keep lists, found f{32}",
    ),
    "uids of another dtype": (
        lambda run: edit_uids(run / "pruned" / "uids.npy", lambda uids: uids["f0"]),
        r"uids\.npy: expected dtype u8,u8, found uint64",
    ),
    "uids cut short": (lambda run: truncate(run / "pruned" / "uids.npy", 5), r"uids\.npy: expected a numpy array"),
    "a pruned tar is missing": (
        lambda run: (run / "pruned" / "shards" / "00001.tar").unlink(),
        r"shards/00001\.tar: missing",
    ),
    "a truncated tar": (
        lambda run: truncate(run / "pruned" / "shards" / "00001.tar", 9000),
        r"shards/00001\.tar: truncated or changed: expected \d+ bytes, found \d+",
    ),
    "a pair in a tar exchanged": (
        exchange_a_pair,
        r"shards/00002\.tar: expected the 4 pairs of .*00002\.parquet, found 4, others from 1 on",
    ),
    "a mark of a tar is missing": (
        lambda run: (run / "pruned" / "shards" / "00000_stats.json").unlink(),
        r"00000_stats\.json: missing or not what was written",
    ),
    "a tar of another hand-over": (
        lambda run: edit_json(run / "pruned" / "shards" / "00000_stats.json", set_value("fingerprint", "x")),
        r"00000_stats\.json: stale",
    ),
    "successes off by one": (
        lambda run: edit_json(run / "pruned" / "shards" / "00000_stats.json", set_value("successes", 5)),
        r"shards/00000\.parquet: expected 5 rows, found 4",
    ),
    "the sources of a tar are missing": (
        lambda run: (run / "pruned" / "shards" / "00000.parquet").unlink(),
        r"shards/00000\.parquet: missing",
    ),
    "the sources of a tar name another uid": (
        lambda run: edit_table(run / "pruned" / "shards" / "00000.parquet", lambda rows: rows[0].update(uid="0" * 32)),
        r"uids\.npy: entry 0: expected 0{32} of the pruned tars",
    ),
    "sizes off by one": (
        lambda run: edit_json(run / "pruned" / "shards" / "sizes.json", set_value("00000.tar", 5)),
        r"sizes\.json: expected the pairs of each tar",
    ),
    "no sizes": (
        lambda run: (run / "pruned" / "shards" / "sizes.json").unlink(),
        r"shards/sizes\.json: missing or no JSON",
    ),
    "a tar too many": (
        lambda run: shutil.copy(run / "pruned" / "shards" / "00000.tar", run / "pruned" / "shards" / "00003.tar")
        and None,
        r"shards/00003\.tar: belongs to no pruned tar",
    ),
    "a training command with another number": (
        lambda run: (path := run / "pruned" / "train.sh").write_text(path.read_text().replace(" 12 ", " 13 ")) and None,
        r"train\.sh: expected --train-num-samples 12, found 13",
    ),
    "no training command": (
        lambda run: (run / "pruned" / "train.sh").unlink(),
        r"pruned/train\.sh: missing",
    ),
    "a summary that is none": (
        lambda run: (run / "summary.json").write_text("{") and None,
        r"summary\.json: expected JSON: ",
    ),
    "a summary without counts": (
        lambda run: (run / "summary.json").write_text('{"counts": 3}') and None,
        r"summary\.json: expected an object with counts",
    ),
    "a summary off by one": (
        lambda run: edit_json(run / "summary.json", lambda summary: summary["counts"].update(kept=13)),
        r"summary\.json: counts\.kept: expected 12 as in the selection, found 13",
    ),
    "a temporary file": (
        lambda run: (run / "scores" / ".tmp-123-00001.parquet").write_bytes(b"half") and None,
        r"scores/\.tmp-123-00001\.parquet: left over from an interrupted write",
    ),
    "a temporary folder": (
        lambda run: (run / "pruned" / "shards" / ".tmp-parts-9" / "x").mkdir(parents=True),
        r"shards/\.tmp-parts-9: left over from an interrupted write",
    ),
}  # fmt: skip

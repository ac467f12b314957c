"""Score files for the tests of selections, and the plain in-memory answer they are compared with."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.run import RunFolder
from pipeline.selection.select import select
from pipeline.store import storage
from pipeline.store.scores import score_schema

Row = dict[str, Any]


def uid(number: int) -> str:
    return hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest()


def row(number: int, utility: float | None, **columns: Any) -> Row:
    """A row with defaults for what a test does not care about."""
    base: Row = {
        "uid": uid(number), "key": f"key{number}", "status": "ok", "error": "", "utility": utility,
        "utility_std": None, "score": None if utility is None else -utility,
        "terms": [] if utility is None else [-utility], "predicted": False, "loss": 1.0, "similarity": 0.5,
        "width": 64, "height": 48, "caption_length": 10, "source": "a.org", "content": uid(number + 10**9),
        "caption_id": number,
    }  # fmt: skip
    return {**base, **columns}


def write_run(root: Path, shards: Sequence[Sequence[Row]], embedding_size: int = 0, group_rows: int = 7) -> RunFolder:
    """A run's committed scores: one file and mark per list of rows; several row groups each."""
    run = RunFolder(str(root))
    schema = score_schema(embedding_size)
    for number, rows in enumerate(shards):
        full = [{**entry, "shard": f"{number}.tar", "index": place} for place, entry in enumerate(rows)]
        table = pa.Table.from_pylist(full, schema=schema)
        url = run.score_file(number)
        storage.make_folder(run.scores)
        pq.write_table(table, url, row_group_size=group_rows)
        mark = {
            "shard": number, "url": f"/in/{number}.tar", "rows": len(rows), "ok": 0, "reasons": {}, "end_error": "",
            "bytes": 0, "checksum": storage.file_checksum(url), "seconds": {}, "finished": 0.0, "worker": "",
            "fingerprint": "f", "parts": {"shard": {"name": f"{number}.tar", "bytes": 1, "etag": "v"}},
        }  # fmt: skip
        storage.write_json(run.score_mark(number), mark)
    return run


def kept(run: RunFolder, name: str = "default") -> list[tuple[int, int]]:
    """(shard, index) of everything in the keep lists of a selection, in their order."""
    found = []
    for url in storage.list_files(storage.join(run.selection(name), "keep"), ".parquet"):
        shard = int(Path(url).stem)
        found += [(shard, index) for index in pq.read_table(url)["index"].to_pylist()]
    return found


def pickling_map(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
    """`map`, with everything pickled on its way as between processes."""
    for item in items:
        sent_function, sent_item = pickle.loads(pickle.dumps((function, item)))
        yield pickle.loads(pickle.dumps(sent_function(sent_item)))


def ranking(shards: Sequence[Sequence[Row]], column: str = "utility") -> list[tuple[int, int]]:
    """(shard, index) of all pairs with a finite score, best first: the total order that selections promise."""
    order = []
    for shard, rows in enumerate(shards):
        for index, entry in enumerate(rows):
            value = entry[column]
            if entry["status"] == "ok" and value is not None and np.isfinite(np.float32(value)):
                order.append((-float(np.float32(value)), int(entry["uid"], 16), shard, index))
    return [(shard, index) for _, _, shard, index in sorted(order)]


__all__ = ["kept", "pickling_map", "ranking", "row", "select", "uid", "write_run"]

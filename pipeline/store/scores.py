"""The score file: its columns, and their deterministic bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = 2

#: Rows per row group: small enough that a filter on `utility` or `status` skips most of a file.
ROW_GROUP_ROWS = 4096

#: Columns of few distinct values. Others are written without a dictionary, which would only add its indices to them
#: and make embeddings several times slower to read.
_REPEATING = ["shard", "status", "error", "width", "height", "caption_length", "source"]

#: How score files are written.
PARQUET_OPTIONS: dict[str, Any] = {
    "row_group_size": ROW_GROUP_ROWS,
    "compression": "zstd",
    "compression_level": 3,
    "use_dictionary": _REPEATING,
    "write_page_index": True,
}

_COLUMNS: list[tuple[str, pa.DataType, bool, str]] = [
    ("uid", pa.string(), False, "the pair's identity, 32 hex digits"),
    ("key", pa.string(), False, "name of the sample within its shard"),
    ("shard", pa.string(), False, "file name of the input shard"),
    ("index", pa.int32(), False, "place of the sample within its shard, from 0"),
    ("status", pa.string(), False, "ok, or the reason why there is no score"),
    ("error", pa.string(), False, "details of a rejection, else empty"),
    ("utility", pa.float32(), True, "higher means keep; null unless status is ok"),
    ("utility_std", pa.float32(), True, "standard error of utility over proxy runs; null with one run"),
    ("score", pa.float32(), True, "the estimator's value in its published sign; null unless status is ok"),
    (
        "terms",
        pa.list_(pa.float32()),
        True,
        "one per checkpoint, null where its run is not held out; they add up to score",
    ),
    ("predicted", pa.bool_(), False, "whether score and terms were predicted rather than computed (score.sample)"),
    ("loss", pa.float32(), True, "the pair's loss at the last checkpoint, mean over runs"),
    ("similarity", pa.float32(), True, "cosine similarity of image and text at the last checkpoint, mean over runs"),
    ("width", pa.int32(), True, "of the original image, pixels; null where it could not be read"),
    ("height", pa.int32(), True, "of the original image, pixels; null where it could not be read"),
    ("caption_length", pa.int32(), True, "characters; 0 where there is no caption"),
    ("source", pa.string(), True, "where the pair comes from (domain of its url)"),
    ("content", pa.string(), True, "BLAKE2b-128 of image bytes and caption: equal for exact duplicates"),
    ("caption_id", pa.int64(), True, "64-bit hash of the caption: equal for equal captions"),
]


def score_schema(embedding_size: int = 0) -> pa.Schema:
    """The columns of a score file; with `embedding_size` values (image, then text) of `embedding` as the last."""
    columns = list(_COLUMNS)
    if embedding_size:
        kind = pa.list_(pa.float16(), embedding_size)
        columns.append(("embedding", kind, True, "unit-length image embedding, then text, at the last checkpoint"))
    return pa.schema([pa.field(name, kind, nullable, {"description": text}) for name, kind, nullable, text in columns])


def embedding_column(values: np.ndarray, rows: np.ndarray, total: int) -> pa.Array:
    """The `embedding` column of `total` rows.

    Args:
        values: float16 `[n, d]`.
        rows: int64 `[n]`, the rows that they belong to; the others are null.
        total: number of rows.
    """
    size = values.shape[1]
    spread = np.zeros((total, size), dtype=np.float16)
    spread[rows] = values
    missing = np.ones(total, dtype=bool)
    missing[rows] = False
    return pa.FixedSizeListArray.from_arrays(
        pa.array(spread.reshape(-1)), type=pa.list_(pa.float16(), size), mask=pa.array(missing)
    )


def score_table(columns: Mapping[str, Any], embedding: pa.Array | None = None) -> pa.Table:
    """A table with the schema of score files from one sequence per column (None or a masked value is null).

    Raises `ValueError` where a column is missing or too long, `pyarrow.ArrowInvalid` for values that do not fit.
    """
    schema = score_schema(embedding.type.list_size if embedding is not None else 0)
    given = dict(columns)
    if embedding is not None:
        given["embedding"] = embedding
    if set(given) != set(schema.names):
        raise ValueError(f"score columns: expected {schema.names}, found {sorted(given)}")
    arrays = [
        value if isinstance(value, pa.Array) else pa.array(value, type=field.type)
        for field, value in ((field, given[field.name]) for field in schema)
    ]
    table = pa.Table.from_arrays(arrays, schema=schema)
    table.validate(full=True)
    for field in schema:
        if not field.nullable and table[field.name].null_count:
            raise ValueError(f"score column {field.name}: expected a value in each row, found nulls")
    return table


def serialise(table: pa.Table, *, estimator: str, fingerprint: str) -> bytes:
    """A score file's bytes. Equal tables give equal bytes, whoever writes them and when."""
    metadata = {"estimator": estimator, "fingerprint": fingerprint, "schema_version": str(SCHEMA_VERSION)}
    sink = pa.BufferOutputStream()
    pq.write_table(table.combine_chunks().replace_schema_metadata(metadata), sink, **PARQUET_OPTIONS)
    return bytes(sink.getvalue().to_pybytes())

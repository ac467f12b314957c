"""The sample of amortised scoring: which pairs are in it, and reading back what the pass that scores it has left."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import Config
from pipeline.data.inventory import ShardInfo
from pipeline.errors import InputError
from pipeline.influence import Observed
from pipeline.influence.hashing import uniform
from pipeline.run import RunFolder
from pipeline.selection.standardise import terms_matrix
from pipeline.store import marks
from pipeline.store.fingerprint import Fingerprint

#: Offset to the run's seed, so that the sample is independent of the `random` estimator.
SAMPLE_SEED = 106


def draws(ids: Tensor, config: Config) -> Tensor:
    """For each pair where in the sample it is, float64 `[n]`, evenly spread over [0, 1); 1 and above: not in it."""
    return uniform(ids, (config.seed + SAMPLE_SEED) % 2**63) / config.score.sample


def in_sample(ids: Tensor, config: Config) -> Tensor:
    """Which pairs are scored rather than predicted, bool `[n]`: by their ids and the run's seed alone."""
    return draws(ids, config) < 1


def read_sampled(run: RunFolder, shard: ShardInfo, fingerprint: Fingerprint) -> tuple[pa.Table, str]:
    """The table that the first pass left of a shard, and how its tar ended.

    Raises `InputError` where it is missing, of other settings, or damaged; what is damaged has no mark from then on.
    """
    folder = RunFolder(run.sample)
    url, mark_url = folder.score_file(shard.index), folder.score_mark(shard.index)
    mark = marks.read_mark(mark_url)
    if mark is None or mark["fingerprint"] != fingerprint.of_shard(shard.name, shard.bytes, shard.etag).digest:
        raise InputError(
            f"{url}: expected the finished sample of {shard.url}, found none with the present settings; the same "
            "command makes it"
        )
    return pq.read_table(io.BytesIO(marks.read_committed(url, mark_url, mark["checksum"]))), str(mark["end_error"])


def observed(table: pa.Table, places: NDArray[np.int64], runs: NDArray[np.int64]) -> Observed:
    """What the forward pass showed of the rows `places` of a table of the first pass; `runs` has each term's run."""
    rows = table.select(["embedding", "terms", "loss", "similarity"]).take(pa.array(places)).combine_chunks()
    names = np.unique(runs)
    column = rows["embedding"].combine_chunks()
    size = column.type.list_size
    values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(places), len(names), size // len(names))
    finite = np.isfinite(terms_matrix(rows["terms"].combine_chunks(), runs))
    counts = np.stack([finite[:, runs == run].all(1) for run in names], 1)
    loss, similarity = (torch.from_numpy(rows[n].to_numpy().astype(np.float32)) for n in ("loss", "similarity"))
    return Observed(torch.from_numpy(values.astype(np.float16)), torch.from_numpy(counts), loss, similarity)

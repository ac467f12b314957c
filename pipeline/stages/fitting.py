"""The task that fits the regressor of amortised scoring; it imports no model, so that its process starts quickly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from pipeline.arrays import Int64
from pipeline.config import Config
from pipeline.data.decode import uid_to_id
from pipeline.data.inventory import ShardInfo
from pipeline.engine.sample import draws, observed, read_sampled
from pipeline.errors import StageError
from pipeline.evaluation.cross_fit import cross_fit
from pipeline.influence import Observed
from pipeline.prepared import save_regressor
from pipeline.run import RunFolder
from pipeline.selection.standardise import terms_matrix
from pipeline.store.fingerprint import Fingerprint

#: Fewest scored pairs that it is fitted on.
FEWEST_PAIRS = 100


def fit_regressor(
    config: Config, sampled: Fingerprint, runs: Int64, shards: Sequence[ShardInfo], most: int
) -> dict[str, Any]:
    """Fit in one thread, so that the same sample gives the same bytes; write it, and return its mark's content.

    Args:
        config: the run's.
        sampled: of the first pass, without a shard.
        runs: the proxy run of each checkpoint.
        shards: whose samples are fitted on, until there are `most` pairs.
        most: pairs.

    Raises `StageError` for too few scored pairs.
    """
    torch.set_num_threads(1)
    run = RunFolder(config.out)
    parts: list[Observed] = []
    terms: list[torch.Tensor] = []
    ids: list[int] = []
    for shard in shards:
        table, _ = read_sampled(run, shard, sampled)
        places = np.flatnonzero(pc.is_valid(table["score"]).to_numpy())
        if not len(places):
            continue
        parts.append(observed(table, places, runs))
        terms.append(torch.from_numpy(terms_matrix(table["terms"].combine_chunks().take(places), runs)))
        ids += [uid_to_id(uid) for uid in table["uid"].take(places).to_pylist()]
        if len(ids) >= most:
            break
    if len(ids) < FEWEST_PAIRS:
        raise StageError(
            f"score.sample: expected at least {FEWEST_PAIRS} scored pairs to predict from, found {len(ids)}: raise it"
        )
    seen = Observed(*(torch.cat([getattr(part, name) for part in parts]) for name in Observed.__slots__))
    regressor, found = cross_fit(
        seen,
        torch.cat(terms),
        np.unique(runs, return_inverse=True)[1].tolist(),
        draws(torch.tensor(ids), config),
        share=config.score.sample,
        seed=config.seed,
    )
    return {"regressor": save_regressor(config.out, regressor), "pairs": len(ids), **found.to_dict()}

"""The plans that the directions stage writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config import parse_config
from pipeline.data import samples, spans
from pipeline.data.inventory import ShardInfo
from pipeline.data.positions import Positions
from pipeline.data.reader import Sample
from pipeline.engine.scorer_spec import ScorerSpec
from pipeline.prepared import load_plan
from pipeline.stages import plans
from pipeline.stages.computing import ComputingJob
from pipeline.stages.directions import directions_fingerprint
from pipeline.store import storage
from pipeline.store.fingerprint import Fingerprint
from tests.engine.prepared_run import outside_ray, prepare_run
from tests.helpers import write_shards


@pytest.mark.parametrize(
    ("values", "same"),
    [
        ({"batch_size": 7}, True),
        ({"compile": True}, True),
        ({"embeddings": True}, True),
        ({"precision": "bf16"}, False),
        ({"estimator": "moso"}, False),
    ],
)
def test_directions_are_kept_where_only_speed_or_what_is_stored_changes(values: dict[str, Any], same: bool) -> None:
    def fingerprint(**score: Any) -> Fingerprint:
        config = parse_config({"out": "x", "data": {"shards": "y"}, "score": {"estimator": "tracin", **score}})
        return directions_fingerprint(SimpleNamespace(config=config, inventory_digest="z"), ["w"], 9)  # type: ignore[arg-type]

    assert (fingerprint(**values) == fingerprint()) == same


def test_a_target_of_remote_shards_is_walked_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = write_shards(tmp_path / "in", shards=2, samples=40)
    remote = []
    for url in urls:
        remote.append(f"memory://target/{Path(url).name}")
        storage.write_bytes(remote[-1], Path(url).read_bytes())
    config, _, _ = prepare_run(str(tmp_path / "run"), urls, estimator="tracin")
    walked: list[str] = []
    walk = samples._samples_up_to

    def noted(info: ShardInfo, indices: Positions, caption: str) -> Iterator[Sample]:
        walked.append(info.url)
        return walk(info, indices, caption)

    monkeypatch.setattr(samples, "_samples_up_to", noted)
    monkeypatch.setattr(spans, "GAP_BYTES", 0)
    found = []
    for shards in (urls, remote):
        target = config.target.model_copy(update={"kind": "shards", "shards": shards, "pairs": 8})
        found.append(plans.draw_batches(ComputingJob(config.model_copy(update={"target": target}))).target)
    assert not set(walked) & set(remote)
    assert torch.equal(found[0].images, found[1].images)
    assert torch.equal(found[0].ids, found[1].ids)


def test_written_plans_hold_what_scoring_needs_of_the_reference_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = write_shards(tmp_path / "in", shards=2, samples=10)
    config, infos, fingerprint = prepare_run(str(tmp_path / "run"), urls, estimator="diff-in")
    outside_ray(monkeypatch)
    terms = []
    for written in (False, True):
        if written:
            plans.write_plans(config, (0, 1))
        assert bool(load_plan(config.out, 0).reference) is written
        work = ScorerSpec(config, fingerprint).build("0")
        scored = work.score(infos[0], work.load(infos[0]))
        terms.append(torch.tensor(scored.table["terms"].to_pylist()))
    torch.testing.assert_close(terms[1], terms[0], rtol=1e-3, atol=float(terms[0].abs().max()) * 1e-3)

"""The plans that the directions stage writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.engine.scorer_spec import ScorerSpec
from pipeline.prepared import load_plan
from pipeline.stages import plans
from tests.engine.prepared_run import outside_ray, prepare_run
from tests.helpers import write_shards


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

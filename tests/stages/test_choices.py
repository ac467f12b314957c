"""What a config chooses is held against the scores it asks for, before anything is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config, parse_config
from pipeline.errors import ConfigError, StageError
from pipeline.stages import runner
from pipeline.stages.choices import check_choices
from tests.selection.scores import row, write_run


@pytest.fixture
def joined(tmp_path: Path) -> str:
    """A run with finished scores that have embeddings; its first shard was set aside."""
    vector = [0.0] * 15 + [1.0]
    run = write_run(tmp_path / "joined", [[row(n, float(n), embedding=vector)] for n in range(2)], embedding_size=16)
    Path(run.score_file(0)).unlink()
    Path(run.score_mark(0)).unlink()
    return run.root


def config_of(shards: list[str], **sections: Any) -> Config:
    return parse_config({"data": {"shards": shards}, **sections})


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"select": {"by": "rank(utilty)"}}, r"select\.by: expected known columns \(did you mean 'utility'\?\), found"),
        ({"select": {"by": "rank(utility"}}, r"select\.by: expected a formula over score columns, found"),
        ({"select": {"where": "widht > 8"}}, r"select\.where: expected known columns"),
        ({"select": {"where": "width"}}, r"select\.where: expected a condition"),
        (
            {"proxy": {"runs": 2}, "select": {"policy": "significant", "spread": "utility_st"}},
            r"select\.spread: expected known columns \(did you mean 'utility_std'\?\)",
        ),
        ({"select": {"by": "other.utility"}}, r"select\.by: expected known columns"),
        ({"select": {"join": {"a b": "runs/a"}}}, r"select\.join: expected a name of letters"),
        (
            {"select": {"join": {"other": "runs/nowhere"}}},
            r"select\.join\.other: expected the folder of a run with finished scores, found 'runs/nowhere'",
        ),
        ({"select": {"embeddings": "pretrained"}}, r"select\.embeddings: expected the name of a joined run"),
        ({"select": {"dedup": {"cosine": 0.9}}}, r"select\.dedup\.cosine: expected scores with embeddings"),
        ({"select": {"balance": {"by": "cluster"}}}, r"select\.balance\.by: expected scores with embeddings"),
        ({"select": {"policy": "infomax"}}, r"select\.policy: expected scores with embeddings"),
        (
            {"proxy": {"runs": 2}, "select": {"policy": "significant", "fill": "diverse"}},
            r"select\.fill: expected scores with embeddings",
        ),
        ({"select": {"policy": "significant"}}, r"select\.policy: expected proxy\.runs of 2 or more .* found 1"),
        (
            {"select": {"policy": "significant", "by": "zterms"}},
            r"select\.policy: expected proxy\.runs of 2 or more for significant, which needs zterms_std",
        ),
        ({"select": {"balance": {"quota": "complexity"}}}, r"select\.balance: expected balance\.by: cluster"),
        ({"select": {"keep": {"threshold": 1}, "balance": {"by": "caption"}}}, r"select\.keep: expected a fraction"),
        ({"evaluate": {"compare": {"mine": {"by": "utilty"}}}}, r"evaluate\.compare\.mine\.by: expected known columns"),
        (
            {"evaluate": {"compare": {"mine": {"join": {"other": "runs/nowhere"}}}}},
            r"evaluate\.compare\.mine\.join\.other: expected the folder of a run",
        ),
    ],
)
def test_a_choice_that_cannot_be_made_starts_nothing(
    make_shards: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], line: str
) -> None:
    monkeypatch.setattr(runner, "connect", lambda engine: pytest.fail("a cluster was started"))
    config = config_of(make_shards(), **sections)
    with pytest.raises(ConfigError, match=line):
        runner.run_all(config)
    for stage in ("inventory", "train", "directions", "score"):
        with pytest.raises(ConfigError, match=line):
            runner.run_stage(stage, config)


@pytest.mark.parametrize(
    "sections",
    [
        {"select": {"by": "rank(zterms) + 2 * rank(similarity)", "where": "caption_length > 5 and width >= 8"}},
        {"score": {"embeddings": True}, "select": {"dedup": {"cosine": 0.9, "exact": True}, "policy": "infomax"}},
        {"score": {"embeddings": True}, "select": {"balance": {"by": "cluster", "quota": "complexity"}}},
        {"proxy": {"runs": 2}, "select": {"policy": "significant"}},
        {"proxy": {"checkpoints": ["manifest.json"]}, "select": {"policy": "significant"}},
        {"select": {"policy": "significant", "spread": "abs(loss)"}},
        {"select": {"join": {"other": None}, "by": "min(rank(utility), rank(other.utility))"}},
        {"select": {"join": {"other": None}, "embeddings": "other", "dedup": {"cosine": 0.9}}},
        {"select": {"keep": {"threshold": 0}}, "evaluate": {"compare": {"mine": {"balance": {"by": "caption"}}}}},
    ],
)
def test_a_choice_that_the_scores_will_allow_passes(joined: str, sections: dict[str, Any]) -> None:
    if "join" in sections.get("select", {}):
        sections = {**sections, "select": {**sections["select"], "join": {"other": joined}}}
    check_choices(config_of(["a.tar"], **sections))


def test_a_choice_from_scores_that_are_there_is_held_against_these(
    make_shards: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def connect(engine: Any) -> Any:
        raise StageError("went on")

    monkeypatch.setattr(runner, "connect", connect)
    config = config_of(make_shards(), out=str(tmp_path / "run"), select={"dedup": {"cosine": 0.9}})
    for stage in ("select", "emit", "report"):
        with pytest.raises(StageError, match="went on"):
            runner.run_stage(stage, config)

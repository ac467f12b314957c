"""The real work of an actor: one row per sample in order, scores that add up, the same in every way of running."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor

from pipeline.data.inventory import inspect_shard
from pipeline.engine.failures import SampleError
from pipeline.engine.score_columns import ScoreColumns
from pipeline.engine.scorer_spec import ScorerSpec
from pipeline.engine.scoring import score_shards
from pipeline.errors import InputError
from pipeline.influence import ScoreBatch
from pipeline.run import RunFolder
from pipeline.store.commits import open_scores, read_marks
from tests.engine.prepared_run import outside_ray, prepare_run
from tests.helpers import image_bytes, sample_members, write_shards, write_tar


@pytest.fixture
def one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a scorer be built outside of an actor."""
    outside_ray(monkeypatch)


def mixed_shard(folder: Path) -> str:
    """Good, no image, no caption, torn image, good."""
    good = image_bytes(seed=1)
    members = [
        *sample_members("a", good, "a red boat", {"url": "https://one.example/x"}),
        *sample_members("b", None, "a green house"),
        *sample_members("c", good, None),
        *sample_members("d", good[: len(good) // 2], "a blue dog"),
        *sample_members("e", image_bytes(seed=2), "an old tree"),
    ]
    return write_tar(folder / "mixed.tar", members)


@pytest.mark.usefixtures("one_cpu")
def test_every_sample_has_a_row_and_good_ones_a_score(tmp_path: Path) -> None:
    urls = [*write_shards(tmp_path / "in", shards=2, samples=12), mixed_shard(tmp_path / "in")]
    config, infos, fingerprint = prepare_run(str(tmp_path / "run"), urls, runs=2, embeddings=True)
    work = ScorerSpec(config, fingerprint).build("0")
    seconds = {"load": 1.0}
    counts = work.commit(infos[2], work.score(infos[2], work.load(infos[2])), seconds)
    assert counts == {"ok": 2, "no-image": 1, "no-caption": 1, "truncated-image": 1}
    work.commit(infos[0], work.score(infos[0], work.load(infos[0])), seconds)

    frame = open_scores(RunFolder(config.out)).to_table().to_pandas()
    assert frame["key"].tolist() == [*(f"{i:08d}" for i in range(12)), *"abcde"]
    assert frame["index"].tolist() == [*range(12), *range(5)]
    assert frame["status"].tolist()[12:] == ["ok", "no-image", "no-caption", "truncated-image", "ok"]
    assert frame["source"][12] == "one.example"
    assert frame["width"].isna().tolist()[12:] == [False, True, True, True, False]
    ok = frame[frame["status"] == "ok"]
    assert frame.loc[frame["status"] != "ok", ["score", "utility", "terms", "embedding"]].isna().all().all()
    terms = np.stack(ok["terms"].to_list()).astype(np.float64)
    assert terms.shape == (14, 4)
    np.testing.assert_allclose(ok["score"], terms.sum(1), rtol=1e-6)
    np.testing.assert_array_equal(ok["utility"], ok["score"])  # tracin: its sign is already that of utility
    own = 2 * terms.reshape(14, 2, 2).sum(2)
    np.testing.assert_allclose(ok["utility_std"], np.abs(own[:, 0] - own[:, 1]) / 2, rtol=1e-5)
    embedding = np.stack(ok["embedding"].to_list()).astype(np.float32)
    width = embedding.shape[1] // 2
    np.testing.assert_allclose((embedding[:, :width] ** 2).sum(1), 1, atol=5e-3)
    marks = list(read_marks(RunFolder(config.out)))
    assert [mark.reasons for mark in marks][1] == {"no-caption": 1, "no-image": 1, "truncated-image": 1}


@pytest.mark.usefixtures("one_cpu")
def test_compiled_passes_are_asked_for_by_the_config_and_change_no_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs: list[int] = []

    def as_traced(graph: Callable[..., Any], inputs: list[Any], options: object) -> Callable[..., Any]:
        programs.append(len(inputs[2]))
        return graph

    monkeypatch.setattr(torch._inductor, "compile", as_traced)
    urls = write_shards(tmp_path / "in", shards=2, samples=12)
    scores, fingerprints = [], []
    for on in (False, True):
        config, infos, fingerprint = prepare_run(str(tmp_path / f"{on}"), urls, compile=on)
        work = ScorerSpec(config, fingerprint).build("0")
        work.commit(infos[0], work.score(infos[0], work.load(infos[0])), {})
        scores.append(open_scores(RunFolder(config.out)).to_table()["score"].to_numpy())
        fingerprints.append(fingerprint)
        assert bool(programs) == on
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-3, atol=1e-5 * np.abs(scores[0]).max())
    assert set(programs) == {5}
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.usefixtures("one_cpu")
def test_a_shard_without_any_good_pair_still_has_its_rows_and_columns(tmp_path: Path) -> None:
    empty = write_tar(tmp_path / "in" / "empty.tar", [*sample_members("a", None, "x"), *sample_members("b", b"", "y")])
    nothing = write_tar(tmp_path / "in" / "nothing.tar", [])
    urls = [*write_shards(tmp_path / "in", shards=2, samples=10), empty, nothing]
    config, infos, fingerprint = prepare_run(str(tmp_path / "run"), urls, embeddings=True)
    work = ScorerSpec(config, fingerprint).build("0")
    for info in (infos[2], infos[3], infos[0]):
        work.commit(info, work.score(info, work.load(info)), {})
    table = open_scores(RunFolder(config.out)).to_table()
    assert table.num_rows == 12
    assert table["status"].to_pylist()[10:] == ["no-image", "zero-size"]


@pytest.mark.usefixtures("one_cpu")
def test_a_shard_that_changed_since_the_inventory_and_a_sample_that_breaks_the_decoder_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = write_shards(tmp_path / "in", shards=2, samples=10)
    config, infos, fingerprint = prepare_run(str(tmp_path / "run"), urls)
    work = ScorerSpec(config, fingerprint).build("0")

    def broken(samples: object, threads: int) -> None:
        next(iter(samples))  # type: ignore[call-overload]
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(work._decoder, "decode_shard", broken)
        with pytest.raises(SampleError, match="00000000"):
            work.load(infos[0])
    write_shards(tmp_path / "in", shards=1, samples=9)
    with pytest.raises(InputError, match="expected the 10 samples of the inventory, found 9"):
        work.load(infos[0])


def test_a_score_that_is_not_finite_is_a_reason_not_a_number() -> None:
    columns = ScoreColumns(5, np.array([0, 0]), estimator="diff-in")
    terms = torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [3e38, 3e38], [1e39, 0.0]], dtype=torch.float64)
    ones = torch.ones(4)
    columns.fill(
        np.array([0, 1, 3, 4]),
        ScoreBatch(terms, torch.ones_like(terms, dtype=torch.bool), ones, ones, ones[:, None].half()),
    )
    values = columns.columns()
    assert columns.not_finite == {
        1: "term of checkpoint 0 is nan",
        3: "the sum of the terms overflows",
        4: "term of checkpoint 0 is inf",
    }
    assert values["score"].to_pylist() == [3.0, None, None, None, None]
    assert values["utility"].to_pylist() == [-3.0, None, None, None, None]
    assert values["utility_std"].null_count == 5
    assert values["terms"].to_pylist() == [[1.0, 2.0], None, None, None, None]
    assert values["loss"].to_pylist() == [1.0, 1.0, None, 1.0, 1.0]


def test_terms_that_do_not_count_are_null_and_the_spread_is_that_of_the_runs_that_do() -> None:
    columns = ScoreColumns(3, np.array([0, 0, 1, 2]), estimator="diff-in")
    nan = float("nan")
    terms = torch.tensor([[1.0, 2.0, nan, 5.0], [nan, nan, 4.0, nan], [nan] * 4], dtype=torch.float64)
    ones = torch.ones(3)
    columns.fill(np.arange(3), ScoreBatch(terms, ~terms.isnan(), ones, ones, ones[:, None].half()))
    values = columns.columns()
    assert values["terms"].to_pylist() == [[1.0, 2.0, None, 5.0], [None, None, 4.0, None], None]
    assert values["score"].to_pylist() == [8.0, 4.0, None]
    # Two runs count for the first pair, with scores 2 * 3 and 2 * 5, and one for the second.
    assert values["utility_std"].to_pylist() == [pytest.approx(2.0), None, None]
    assert columns.not_finite == {2: "every proxy run was trained on the pair, none is held out"}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_over_ray_the_files_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = write_shards(tmp_path / "in", shards=4, samples=10)
    config, infos, fingerprint = prepare_run(str(tmp_path / "ray"), urls)
    outcome = score_shards(ScorerSpec(config, fingerprint), infos, RunFolder(config.out), fingerprint, config.engine)
    assert (outcome.done, outcome.failed, outcome.statuses) == (4, [], {"ok": 40})

    alone, _, same = prepare_run(str(tmp_path / "alone"), urls)
    assert same.digest == fingerprint.digest
    outside_ray(monkeypatch)
    work = ScorerSpec(alone, fingerprint).build("0")
    for info in reversed(infos):
        work.commit(info, work.score(info, work.load(info)), {})
        ours, theirs = (Path(RunFolder(c.out).score_file(info.index)) for c in (config, alone))
        assert ours.read_bytes() == theirs.read_bytes()
    assert inspect_shard(0, urls[0]) == infos[0]

"""`diffprune inspect` counts what lies in shards; `diffprune show` tells one pair's story from a run's files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from PIL import Image
from rich.console import Console

from pipeline import inspecting
from pipeline.config import DataConfig, DedupConfig, SelectConfig
from pipeline.errors import ConfigError, InputError, StageError
from pipeline.inspecting import Inspection, first_problem, inspect_shards, print_inspection
from pipeline.pictures import half_blocks
from pipeline.selection.select import select as run_selection
from pipeline.showing import Story, print_story, tell
from pipeline.store.commits import commit_scores
from pipeline.store.fingerprint import Fingerprint
from tests.helpers import image_bytes, sample_members, write_tar
from tests.report.synthetic import DIMENSION, HOSTILE_AT, Made, make_run, select


def printed(show: Callable[[Console], None], colour: bool = False) -> str:
    console = Console(
        file=io.StringIO(),
        width=140,
        force_terminal=colour,
        color_system="truecolor" if colour else None,
        legacy_windows=False,
    )
    show(console)
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def look(shards: str | list[str], **keys: Any) -> Inspection:
    return inspect_shards(DataConfig(shards=shards, **keys))


def test_counts_sizes_and_kinds(make_shards: Callable[..., list[str]]) -> None:
    urls = make_shards(shards=3, samples=20)
    found = look(urls)
    assert (found.samples, found.exact, found.looked_at) == (60, True, 20)
    assert found.sizes == [Path(url).stat().st_size for url in urls]
    assert found.status == {"ok": 20}
    assert found.image_types == {"jpg": 20}
    assert found.json_keys == {"uid": 20, "url": 20}
    assert found.sources == {"site0.example": 7, "site1.example": 7, "site2.example": 6}
    assert (min(found.widths), max(found.widths)) == (32, 36)
    assert [example.key for example in found.examples] == ["00000000", "00000006", "00000013", "00000019"]
    assert "No problems found." in printed(lambda console: print_inspection(found, console))


def test_problems_by_reason_with_an_example(tmp_path: Path) -> None:
    members = sample_members("0", image_bytes(), "fine")
    members += sample_members("1", b"no image", "broken") + sample_members("2", image_bytes(), None)
    members += sample_members("3", image_bytes((64, 64)), "large") + sample_members("4", image_bytes(), "fine")
    url = write_tar(tmp_path / "a.tar", members)
    found = look(url, max_pixels=2000)
    assert found.status == {"ok": 2, "corrupt-image": 1, "no-caption": 1, "too-many-pixels": 1}
    assert found.repeated == 1.0
    text = printed(lambda console: print_inspection(found, console))
    assert "Problems: 3 pairs" in text
    assert "64 x 64, at most 2000" in text


def test_broken_tar_is_named(tmp_path: Path) -> None:
    whole = Path(write_tar(tmp_path / "a.tar", sample_members("0", image_bytes((200, 200)), "fine")))
    whole.write_bytes(whole.read_bytes()[:1500])
    text = printed(lambda console: print_inspection(look(str(whole)), console))
    assert "broken tar" in text
    assert "a.tar: the tar breaks off" in text


def test_nothing_is_said_of_the_pairs_of_an_empty_tar(tmp_path: Path) -> None:
    found = look(write_tar(tmp_path / "a.tar", []))
    assert "No problems found." not in printed(lambda console: print_inspection(found, console))
    assert "no pair can be used: it has no samples" in str(first_problem(found))


def test_many_shards_are_estimated_from_a_few(
    make_shards: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = make_shards(shards=6, samples=5)
    monkeypatch.setattr(inspecting, "COUNTED", 3)
    found = look(urls)
    assert not found.exact
    assert len(found.counts) == 3
    assert abs(found.samples - 30) <= 2
    assert "estimated from 3 counted shards" in printed(lambda console: print_inspection(found, console))


def test_hostile_text_cannot_steer_the_terminal(tmp_path: Path) -> None:
    url = write_tar(
        tmp_path / "a.tar", sample_members("k\x1b[31m", image_bytes(), "[bold]x[/] \x1b]0;title\x07 \u202eend")
    )
    text = printed(lambda console: print_inspection(look(url), console))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[bold]x[/]" in text


def test_shards_without_a_usable_pair(tmp_path: Path) -> None:
    found = look(write_tar(tmp_path / "a.tar", sample_members("0", image_bytes(), None)))
    problem = first_problem(found)
    assert problem is not None
    assert "no pair can be used: no-caption 1" in str(problem)
    with pytest.raises(ConfigError):
        look(str(tmp_path / "none-*.tar"))


def test_half_blocks_show_two_pixels_per_character() -> None:
    image = Image.new("RGB", (4, 4), (255, 0, 0))
    image.paste((0, 0, 255), (0, 2, 4, 4))
    text = half_blocks(image, 4)
    assert text.plain == "▀▀▀▀\n▀▀▀▀"
    colours = [str(span.style) for span in text.spans]
    assert colours[0] == "#ff0000 on #ff0000"
    assert colours[-1] == "#0000ff on #0000ff"
    assert len(half_blocks(Image.new("RGB", (100, 10)), 20).plain.splitlines()[0]) == 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_run(tmp_path_factory.mktemp("show"), shards=3, samples=40, size=16)


def story_of(made: Made, shard: int, index: int) -> Story:
    return tell(made.run.root, made.tables[shard]["uid"][index].as_py())


def test_story_of_a_scored_pair(made: Made) -> None:
    story = story_of(made, 1, 20)
    utility = made.column("utility")
    own = utility[40 + 20]
    assert story.rank == int((utility > own).sum()) + 1
    assert story.scored == int(np.isfinite(utility).sum())
    assert sum(story.pair.terms) == pytest.approx(story.pair.score, rel=1e-5)
    assert story.checkpoints == ["run 1, step 100", "run 1, step 200", "run 2, step 100", "run 2, step 200"]
    kept = own >= np.nanquantile(utility, 0.4)
    assert story.verdicts["default"] == ("kept" if kept else "pruned")
    assert story.content is not None
    assert story.content.caption
    text = printed(lambda console: print_story(story, console))
    assert f"rank {story.rank} of {story.scored}" in text
    assert "run 2, step 200" in text


def test_nearest_neighbours_match_all_cosines(made: Made) -> None:
    vectors = np.concatenate([
        table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, 2 * DIMENSION).astype(np.float64)
        for table in made.tables
    ])  # fmt: skip
    similarity = vectors[:, :DIMENSION] @ vectors[60, :DIMENSION]
    similarity[60] = -np.inf
    similarity[~np.isfinite(made.column("utility"))] = -np.inf
    nearest = np.argsort(-similarity)[:5]
    story = story_of(made, 1, 20)
    assert [near.uid for near in story.neighbours] == made.column("uid")[nearest].tolist()
    assert [near.image for near in story.neighbours] == pytest.approx(similarity[nearest].tolist(), abs=1e-6)
    assert all(near.caption for near in story.neighbours)


def test_story_of_a_rejected_pair(made: Made) -> None:
    story = story_of(made, 0, 1)
    assert (story.rank, story.neighbours) == (0, [])
    assert story.verdicts["default"] == "left out: it has no score (corrupt-image)"
    assert "rejected" in printed(lambda console: print_story(story, console, image=None))


def test_image_is_written_as_stored_and_drawn(made: Made, tmp_path: Path) -> None:
    shard, index = HOSTILE_AT
    story = story_of(made, shard, index)
    target = tmp_path / "pair.jpg"
    text = printed(lambda console: print_story(story, console, image=str(target)), colour=True)
    assert story.content is not None
    assert target.read_bytes() == story.content.image
    assert text.count("▀") >= 16 * 8
    assert "<script>" in text  # harmless here, and shown as it is


def test_uid_prefixes(made: Made) -> None:
    uid = made.tables[0]["uid"][0].as_py()
    assert tell(made.run.root, uid[:12].upper()).pair.uid == uid
    with pytest.raises(InputError, match="no pair of"):
        tell(made.run.root, "0" * 32)
    with pytest.raises(InputError, match="32 hex digits"):
        tell(made.run.root, "xyz")


def test_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="expected a run's folder"):
        tell(str(tmp_path), "0" * 32)


def test_verdict_says_what_pruned_a_pair(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=2, samples=30, size=16, extras=False)
    run_selection(made.run, SelectConfig(keep=0.5), seed=0)
    run_selection(made.run, SelectConfig(name="wide", keep=1.0, where="index < 20", dedup=DedupConfig()), seed=0)
    utility = made.column("utility")
    lowest = tell(made.run.root, str(made.column("uid")[int(np.nanargmin(utility))]))
    assert "is below the threshold" in lowest.verdicts["default"]
    late = tell(made.run.root, made.tables[1]["uid"][25].as_py())
    assert late.verdicts["wide"] == "pruned: by where index < 20 (select.by: utility)"
    run_selection(made.run, SelectConfig(name="mixed", by="rank(utility)", keep=0.5), seed=0)
    assert "rank(utility) is below 0.5" in tell(made.run.root, lowest.pair.uid).verdicts["mixed"]
    best = tell(made.run.root, str(made.column("uid")[int(np.nanargmax(utility))]))
    assert best.verdicts["default"].startswith("kept: utility at or above")
    select(made.run, made.tables, "bare", -np.inf, "utility")
    assert tell(made.run.root, best.pair.uid).verdicts["bare"] == "kept"


def verdict_of(made: Made, pair: int, **settings: Any) -> str:
    """What a selection with these settings is said to do with a pair (its place in the run)."""
    run_selection(made.run, SelectConfig.model_validate(settings), seed=0)
    return tell(made.run.root, str(made.column("uid")[pair]), neighbours=0).verdicts["default"]


def test_verdicts_of_a_band(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=2, samples=30, size=16, extras=False)
    utility = made.column("utility")
    order = [int(place) for place in np.argsort(utility) if np.isfinite(utility[place])]
    band = {"drop_lowest": 0.2, "drop_highest": 0.2}
    above = verdict_of(made, order[-1], keep=band)
    assert re.fullmatch(r"pruned: its utility \S+ lies above the band that is kept", above)
    assert "is below the threshold" in verdict_of(made, order[0], keep=band)
    assert verdict_of(made, order[len(order) // 2], keep=band).startswith("kept: utility at or above")
    assert verdict_of(made, order[0], keep=band, by="-utility").endswith("or lies above the band")
    clusters = {"by": "cluster", "clusters": 3}
    assert verdict_of(made, order[-1], keep=band, balance=clusters) == "pruned: it lies outside the band of its group"


def test_a_pair_that_ties_with_the_last_one_kept_is_not_said_to_be_below_it(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, samples=30, size=16, extras=False)
    (table,) = made.tables
    signs = table.set_column(table.column_names.index("utility"), "utility", pc.sign(table["utility"]))
    fingerprint = Fingerprint({"estimator": "diff-in"})
    commit_scores(made.run, made.inventory[0], signs, fingerprint, estimator="diff-in", seconds={}, finished=0.0)
    verdicts = {verdict_of(made, int(place), keep=1) for place in np.flatnonzero(made.column("utility") > 0)}
    assert verdicts == {
        "kept: utility at or above 1.00",
        "pruned: its utility is the threshold 1.00, which more pairs have than are kept",
    }


def test_verdicts_where_the_threshold_is_not_one_value(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=2, samples=30, size=16, extras=False)
    utility, spread = made.column("utility"), made.column("utility_std")
    lowest = int(np.nanargmin(utility))
    assert utility[lowest] < -spread[lowest]
    harmful = int((utility < -spread).sum())
    scored = int(np.isfinite(utility).sum())
    significant = {"policy": "significant", "keep": scored - harmful}
    assert verdict_of(made, lowest, **significant) == "pruned: by harmful (select.by: utility)"
    assert verdict_of(made, int(np.nanargmax(utility)), **significant) == "kept: its group's quota"
    clusters = {"by": "cluster", "clusters": 3}
    assert verdict_of(made, lowest, keep=0.5, balance=clusters) == "pruned: its group is full"

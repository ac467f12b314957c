"""The page as a whole: what it says of a run, that hostile text stays text, and that it is one small file."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.config import Config, SelectConfig, parse_config
from pipeline.errors import StageError
from pipeline.report import write_report
from pipeline.report.page import _notes
from pipeline.run import RunFolder
from pipeline.selection.select import select
from pipeline.store import storage
from tests.helpers import write_shards
from tests.report import screenshots
from tests.report.synthetic import Made, make_run


class Page(HTMLParser):
    """A parsed page: tags with attributes, and the text outside of script and style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._silent = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._silent += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.text.append(data)

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if name in (attributes.get("class") or "").split()]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def html(made: Made) -> str:
    return Path(write_report(made.run, made.config)).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_headline_counts_add_up(made: Made, page: Page) -> None:
    utility = made.column("utility")
    kept = int((utility >= np.nanquantile(utility, 0.4)).sum())
    scored = int(np.isfinite(utility).sum())
    assert f"Of 500 pairs, {kept} are kept" in page.words
    assert f"{scored - kept} are pruned" in page.words
    assert f"{500 - scored} could not be scored" in page.words


def test_galleries_hold_the_extremes_in_order(made: Made, page: Page, html: str) -> None:
    uids = made.column("uid")
    order = np.argsort(made.column("utility"))
    lowest = [str(uids[row]) for row in order[:8]]
    cards = page.of_class("card")
    shown = [card["data-words"] or "" for card in cards if card["data-gallery"] == "lowest"]
    assert [words.split()[-1] for words in shown] == lowest
    assert {card["data-reason"] for card in cards if card["data-gallery"] == "threshold"} == {"kept", "pruned"}
    assert "rank 1 of 494" in page.words
    assert "rank 494 of 494" in page.words


def test_galleries_can_be_filtered_by_cluster(page: Page, html: str) -> None:
    clusters = {card["data-cluster"] for card in page.of_class("card")}
    listed = re.search(r'<select name="cluster">(.*?)</select>', html)
    assert listed is not None
    assert set(re.findall(r"<option>(\d+)</option>", listed[1])) == clusters
    assert len(clusters) > 1
    assert "Kept share by cluster" in page.words


def test_every_rejection_is_shown_with_its_reason(page: Page) -> None:
    reasons = sorted(card["data-reason"] or "" for card in page.of_class("card") if card["data-gallery"] == "rejected")
    assert reasons == ["rejected: corrupt-image"] * 3 + ["rejected: empty-caption"] * 2 + ["rejected: no-caption"]
    assert "corrupt-image 3 0.60 %" in page.words


def test_hostile_caption_stays_text(page: Page, html: str) -> None:
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert "</script><script>window.hacked=1</script>" in page.words
    assert "<script>window.hacked" not in html
    assert "\u202e" not in html


def test_page_asks_nothing_of_the_network(page: Page, html: str) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/webp;base64,", "#")), (tag, name, value)
    assert "url(" not in html
    assert "@import" not in html
    policy = next(
        attributes["content"] for tag, attributes in page.tags if tag == "meta" and "http-equiv" in attributes
    )
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy


def test_every_plot_has_axes_description_and_sentence(page: Page, html: str) -> None:
    plots = re.findall(r'<figure class="plot">.*?</figure>', html, re.DOTALL)
    assert len(plots) == 9
    for plot in plots:
        assert len(re.findall(r'<svg class="(?:wide|narrow)"[^>]* role="img" aria-label="[^"]{20,}"', plot)) == 2
        assert len(re.findall(r'<text [^>]*class="label"', plot)) >= 2
        assert re.search(r'<p class="see">[^<]{40,}</p>', plot)


def test_images_have_alt_text(page: Page) -> None:
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 8 * 3 + 3  # the corrupt ones have none
    assert all((image["alt"] or "").startswith("Image of") for image in images)


def test_optional_parts_appear_with_their_files(made: Made, page: Page) -> None:
    assert "Training on what was kept" in page.words
    assert "0.620 ± 0.012" in page.words
    assert "not clearly ahead of everything" in page.words
    assert "0.830 ± 0.0" in page.words
    assert "default and similar" in page.words
    assert "1 min 22 s" in page.words
    assert "40.0 % of the pruned pairs are wrong, 20.0 % of all" in page.words
    assert "pairs per worker and second of scoring 311" in page.words
    assert "site0.example" in page.words
    assert "Kept share by repeated caption" in page.words
    assert "select.keep 0.6" in page.words
    assert "run 2, step 200" in page.words


def test_bare_run_has_a_page_without_them(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, samples=40, extras=False, spread=False)
    storage.remove(made.run.checkpoint_manifest)
    storage.remove(made.run.config)
    page = Page(Path(write_report(made.run, made.config)).read_text(encoding="utf-8"))
    assert "Training on what was kept" not in page.words
    assert "Other selections" not in page.words
    assert "standard errors of their utility" not in page.words
    assert "term 4" in page.words


def test_pictures_are_left_out_when_the_input_has_moved(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=2, samples=30)
    Path(made.inventory[1].url).unlink()
    page = Page(Path(write_report(made.run, made.config)).read_text(encoding="utf-8"))
    assert "no image to show" in page.words
    assert any(tag == "img" for tag, _ in page.tags)


def test_another_selection_is_reported_by_name(made: Made, tmp_path: Path) -> None:
    url = write_report(made.run, made.config, selection="similar")
    page = Page(Path(url).read_text(encoding="utf-8"))
    assert "selection similar" in page.words
    assert "Kept and pruned pairs overlap" in page.words
    assert "similar and default" in page.words


def test_reasons_of_a_real_selection_are_told(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=2, samples=40, size=16, extras=False)
    select(made.run, SelectConfig(keep=0.5, where="index < 30"), seed=0)
    page = Page(Path(write_report(made.run, made.config)).read_text(encoding="utf-8"))
    assert "Pruned pairs by reason" in page.words
    assert "where 20 " in page.words


def test_size_of_the_page_does_not_grow_with_the_pairs(tmp_path: Path) -> None:
    def nodes(name: str, samples: int) -> int:
        made = make_run(tmp_path / name, shards=2, samples=samples, size=16)
        return len(Page(Path(write_report(made.run, made.config)).read_text(encoding="utf-8")).tags)

    assert nodes("large", 1200) < nodes("small", 120) + 400


def test_says_which_stage_is_missing(made: Made, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="diffprune inventory"):
        write_report(RunFolder(str(tmp_path)), made.config)
    with pytest.raises(StageError, match="'nowhere' is not there"):
        write_report(made.run, made.config, selection="nowhere")


@pytest.mark.skipif(screenshots.chromium() is None, reason="no chromium is installed")
@pytest.mark.slow
def test_browser_shows_it_at_every_width(made: Made, tmp_path: Path) -> None:
    page = Path(write_report(made.run, made.config))
    for width in screenshots.WIDTHS:
        facts = screenshots.probe(page, width)
        assert facts["width"] == width
        assert facts["wide"] == []
        assert facts["hacked"] == "undefined"
        assert facts["none"] == 0
        assert facts["shown"] == {"highest": 8, "lowest": 8, "threshold": 8, "rejected": 6, "all": 30}
    for scheme, dark in (("light", False), ("dark", True)):
        picture = tmp_path / f"{scheme}.png"
        screenshots.picture(page, 800, scheme, picture, 900)
        from PIL import Image

        corner = Image.open(picture).convert("L").getpixel((2, 880))
        assert isinstance(corner, int)
        assert (corner < 64) == dark


def test_the_lead_names_the_formula_that_chose(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    by = "rank(utility) + rank(similarity)"
    config = made.config.model_copy(update={"select": made.config.select.model_copy(update={"by": by})})
    page = Path(write_report(made.run, config)).read_text(encoding="utf-8")
    assert f"chosen by {by}, with utility from the estimator" in page
    assert by not in Path(write_report(made.run, made.config)).read_text(encoding="utf-8")


def changed(config: Config, section: str, **values: object) -> Config:
    tree = config.model_dump(mode="json")
    return parse_config({**tree, section: {**(tree[section] or {}), **values}})


def words_of(made: Made, config: Config) -> str:
    return Page(Path(write_report(made.run, config)).read_text(encoding="utf-8")).words


def test_the_target_is_spoken_of_only_where_an_estimator_has_one(made: Made) -> None:
    phrases = ("helps the target most", "works against the target", "expected to help the target more", "should not.")
    for estimator in ("diff-in", "random", "el2n", "clip-score", "moso"):
        page = words_of(made, changed(made.config, "score", estimator=estimator))
        assert [phrase in page for phrase in phrases] == [estimator == "diff-in"] * 4, estimator


def test_pairs_without_scores_are_not_said_to_have_one(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=2, samples=30, size=16)
    storage.remove(made.run.score_mark(0))  # the only shard with rejected pairs
    page = words_of(made, made.config)
    assert "1 shard of 2 have no scores" in page
    assert "every one of the input has a score" not in page
    assert "No pair of the shards that have scores was rejected." in page


def test_measured_on_used_shards_is_said(made: Made, tmp_path: Path) -> None:
    (unused,) = write_shards(tmp_path, shards=1, samples=1)
    data = made.config.data.shards
    assert "on each set for the same number of steps. " in words_of(made, made.config)
    own = words_of(made, changed(made.config, "evaluate", shards=unused))
    assert "Models trained from scratch on each set" in own
    assert ", measured on shards that nothing else has used." in own
    shared = words_of(made, changed(made.config, "evaluate", shards=[unused, *data[:2]]))
    assert "measured on evaluate.shards (2 also named by data.shards): unused pairs would not give these" in shared
    assert "nothing else has used" not in shared
    gone = words_of(made, changed(made.config, "evaluate", shards=str(tmp_path / "gone.tar")))
    assert "on each set for the same number of steps. " in gone
    (tmp_path / "weights.pt").touch()
    started = words_of(made, changed(made.config, "proxy", pretrained=str(tmp_path / "weights.pt")))
    assert "Models trained from the weights of proxy.pretrained on each set" in started


def test_what_is_beyond_its_noise_is_held_against_chance() -> None:
    found: Any = SimpleNamespace(missing_shards=0, shards=[], significant={"known": 1000, "helpful": 90, "harmful": 26})
    note = _notes(found, {}, runs=3)[0].replace("\u202f", " ")
    assert "9.0 % of the pairs are helpful and 2.6 % harmful beyond two standard errors" in note
    assert "Without any effect 9.2 % would be on either side by chance, as there are 3 runs" in note
    assert "by chance" not in _notes(found, {}, runs=0)[0]

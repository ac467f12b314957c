"""Numbers, foreign text, axes, thumbnails and the reading of optional results."""

from __future__ import annotations

import io
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from pipeline.config import DataConfig, parse_config
from pipeline.data import samples
from pipeline.data.inventory import inspect_shard
from pipeline.evaluation.results import Result
from pipeline.pictures import data_uri, open_image
from pipeline.report.contents import fetch
from pipeline.report.evaluation import evaluation_section, read_results
from pipeline.report.figures import spearman, variance_shares
from pipeline.report.plots import Canvas, Scale, tick_labels
from pipeline.report.tables import quality_table, settings
from pipeline.run import RunFolder
from pipeline.store import storage
from pipeline.text import duration, number, percent, plain, plus_minus, size, without_secrets
from tests.helpers import image_bytes, write_shards

CONFIG = parse_config({"data": {"shards": []}})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.5, "1,234"),
        (0.12345, "0.123"),
        (-7.26e-6, "−7.26×10⁻⁶"),
        (3e7, "3.00×10⁷"),
        (float("nan"), "–"),
        (None, "–"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


def test_uncertainty_decides_the_digits() -> None:
    assert plus_minus(0.62345, 0.0123) == "0.623\u00a0±\u00a00.012"
    assert plus_minus(-7.0e-5, 5.7e-6) == "(−7.00\u00a0±\u00a00.57)×10⁻⁵"
    assert plus_minus(0.5, None) == "0.500"


def test_units() -> None:
    assert percent(0.41234) == "41.2\u202f%"
    assert percent(0.0001) == "<\u202f0.1\u202f%"
    assert [duration(seconds) for seconds in (0.4, 42.25, 81.5, 7200)] == [
        "400 ms",
        "42.2 s",
        "1 min 22 s",
        "2 h 00 min",
    ]
    assert size(1_500_000) == "1.5 MB"


def test_foreign_text_is_made_plain() -> None:
    assert plain("a\n b\x00\u202ec\u2066d\ud800") == "a b cd"
    assert plain("x" * 500, 10) == "x" * 9 + "…"


@pytest.mark.parametrize(("low", "high"), [(-1.1e-4, 0.9e-4), (0, 23), (0, 1), (2.3, 2.9), (0, 5e7), (-0.02, 0.31)])
def test_axes_have_round_distinct_ticks(low: float, high: float) -> None:
    scale = Scale(low, high, 0, 100)
    ticks = scale.ticks(5)
    labels, factor = tick_labels(ticks)
    assert 3 <= len(ticks) <= 11
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert len(set(labels)) == len(labels)
    exponent = (
        float(factor.replace("× 10", "1e").translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))) if factor else 1.0
    )
    for tick, label in zip(ticks, labels, strict=True):
        assert float(label.replace("−", "-").replace(",", "")) * exponent == pytest.approx(tick, abs=1e-9 * high)
    assert scale(high + 1) == 100


def test_svg_text_is_escaped() -> None:
    canvas = Canvas(100, 100, 0, 0, 0, 0)
    canvas.text(0, 0, "<b>&")
    canvas.rect(0, 0, 1, 1, "kept", '"<i>')
    markup = canvas.markup('say "<hi>"', "wide")
    assert "<b>" not in markup
    assert "<i>" not in markup
    assert "<hi>" not in markup


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:word@h/{0..9}.tar?sig=a&b=c::s3://b/0.tar", "https://h/{0..9}.tar?...::s3://b/0.tar"),
        ("| `https://token@h/0.tar?sig=a%2Fb` | 7 |", "| `https://h/0.tar?...` | 7 |"),
        ('["sftp://me:word@h/a b.tar", "http://h/0.tar?key=a,b"]', '["sftp://h/a b.tar", "http://h/0.tar?..."]'),
        ("abfs://box@account.host/0.tar hdfs://me@h:1/0.tar", "abfs://box@account.host/0.tar hdfs://me@h:1/0.tar"),
        ("why? a.tar::b@c.tar", "why? a.tar::b@c.tar"),
    ],
)
def test_what_gives_access_is_not_shown(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_settings_are_shown_without_what_gives_access() -> None:
    config = parse_config({"data": {"shards": ["https://me:word@h/0.tar?sig=abc"]}})
    assert {key: value for key, value, _, _ in settings(config)}["data.shards"] == '["https://h/0.tar?..."]'


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGBA", "PNG"),
        ("I;16", "PNG"),
        ("P", "PNG"),
        ("RGBA", "WEBP"),
    ],
)
def test_thumbnails_of_all_kinds(mode: str, file_format: str) -> None:
    data = image_bytes((300, 150), mode=mode, file_format=file_format, seed=3)
    image = open_image(data, max_pixels=10**6, side=100)
    assert image is not None
    assert (image.mode, image.size) == ("RGB", (100, 50))
    pixels = np.asarray(image.convert("L"))
    assert pixels.std() > 5, "the picture has content, neither all white nor all black"
    assert data_uri(image).startswith("data:image/webp;base64,UklGR")


def test_transparency_is_shown_on_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(buffer, "PNG")
    image = open_image(buffer.getvalue(), 1000, 8)
    assert image is not None
    assert image.getpixel((4, 4)) == (255, 255, 255)


def test_images_that_are_too_large_or_broken_have_no_thumbnail() -> None:
    data = image_bytes((64, 64))
    assert open_image(data, max_pixels=64 * 64 - 1, side=32) is None
    assert open_image(data[:200], max_pixels=10**6, side=32) is None
    assert open_image(b"", max_pixels=10**6, side=32) is None


def test_decoders_that_start_programs_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **_: started.append(given))
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    assert Image.open(io.BytesIO(buffer.getvalue())).format == "EPS"
    assert open_image(buffer.getvalue(), 1000, 8) is None
    assert not started


@pytest.mark.parametrize("kept", [False, True])
def test_fetch_takes_the_pairs_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    run = RunFolder(str(tmp_path / "run"))
    urls = write_shards(tmp_path, shards=2, samples=8)
    shards = [inspect_shard(index, url, run.places(index)) for index, url in enumerate(urls)]
    if kept:
        monkeypatch.setattr(samples, "read_shard", lambda url, **_: pytest.fail(f"{url} is read from its beginning"))
    places = run.places if kept else None
    contents = fetch([(0, 3), (1, 7), (1, 99)], shards, DataConfig(shards=urls), places)
    assert set(contents) == {(0, 3), (1, 7)}
    assert contents[0, 3].caption == "a old boat"
    assert contents[1, 7].image is not None
    monkeypatch.undo()
    Path(urls[0]).unlink()
    assert set(fetch([(0, 3), (1, 7)], shards, DataConfig(shards=urls), places)) == {(1, 7)}


def result(series: str, size: int, metric: str, mean: float) -> Result:
    return Result(f"{series} {size} %", series, size / 100, size, metric, mean, 0.01, 3, [mean] * 3)


def test_evaluation_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    assert read_results(run) == []
    whole, one, none = (
        Result.of(name, "random", None, 10, "accuracy", values)
        for name, values in (("a", [0.5, 0.7]), ("b\x1b", [0.5]), ("c", [math.nan]))
    )
    rows = [storage.without_nan(asdict(each)) for each in (whole, one, replace(none, values=[]))]
    storage.write_json(str(tmp_path / "evaluation" / "results.json"), {"rows": rows})
    first, second = read_results(run)
    assert first == whole
    assert (second.set, second.seeds, math.isnan(second.std)) == ("b", 1, True)


def test_terms_that_do_not_count_are_left_out_of_agreement_and_add_nothing() -> None:
    rng = np.random.default_rng(0)
    terms = rng.normal(size=(200, 3))
    terms[:, 1] = terms[:, 0] + 0.1 * terms[:, 1]
    terms[:100, 0] = np.nan
    terms[100:, 2] = np.nan
    correlations = spearman(terms)
    assert correlations[0, 1] == pytest.approx(spearman(terms[100:, :2])[0, 1])
    assert correlations[1, 2] == pytest.approx(spearman(terms[:100, 1:])[0, 1])
    assert np.isnan(correlations[0, 2])  # no pair is scored by both
    assert np.allclose(variance_shares(terms), variance_shares(np.nan_to_num(terms)))
    assert variance_shares(terms).sum() == pytest.approx(1)


def test_sets_of_several_sizes_are_drawn_as_curves() -> None:
    rows = [result(series, size, "accuracy", 0.5 + size / 1000) for size in (70, 30) for series in ("kept", "random")]
    section = evaluation_section([*rows, replace(result("full", 100, "accuracy", 0.6), set="everything")], CONFIG)
    assert [figure.title for figure in section.figures] == ["Accuracy by pairs kept", "Accuracy"]
    assert "kept: 0.530 at 30, 0.570 at 70; random" in section.figures[0].wide
    assert "everything: 0.600 at 100" in section.figures[0].wide


def test_only_what_the_selection_keeps_has_its_colour() -> None:
    def drawn(series: str) -> list[str]:
        rows = [result(series, size, "accuracy", size / 100) for size in (30, 70)]
        return [figure.wide for figure in evaluation_section(rows, CONFIG).figures]

    for ours, other in zip(drawn("kept"), drawn("kept by loss"), strict=True):
        assert ('class="kept"' in ours, 'class="kept"' in other) == (True, False)


def test_best_set_is_named_by_the_metric_direction() -> None:
    def see(metric: str) -> str:
        results = [result("kept", 5, metric, 0.9), result("random", 5, metric, 0.5)]
        return evaluation_section(results, CONFIG).figures[0].see

    assert see("accuracy").startswith("kept 5 % comes out best, ahead of random 5 %")
    assert see("target loss").startswith("random 5 % comes out best")


def test_quality_table_takes_one_ranking_or_several() -> None:
    one = {"auroc": 0.8, "average_precision": 0.6, "precision": 0.5, "suspects": 100, "pairs": 1000, "base_rate": 0.1}
    table = quality_table({"by": {"utility": one}})
    assert table is not None
    # Hanley and McNeil: se = 0.0272 for 100 wrong and 900 right pairs
    cells = [" ".join(cell.split()) for cell in table.rows[0]]
    assert cells == ["utility", "0.800 ± 0.053", "0.600", "50.0 % (40.4 % to 59.6 %) of 100", "10.0 %"]
    assert quality_table({}) is None
    several = quality_table({"auroc": 0.8, "by": {"utility": one, "similarity": {"auroc": 0.7}}})
    assert several is not None
    assert [row[0] for row in several.rows] == ["utility", "similarity"]


def test_settings_tell_what_differs_from_the_defaults() -> None:
    config = parse_config(
        {"data": {"shards": "a.tar"}, "select": {"keep": {"threshold": 0.5}}, "evaluate": {"seeds": 5}}
    )
    found = {key: (value, differs) for key, value, differs, _ in settings(config)}
    assert found["data.shards"] == ("a.tar", True)
    assert found["select.keep"] == ('{"threshold": 0.5}', True)
    assert found["seed"] == ("0", False)
    assert found["evaluate.seeds"] == ("5", True)
    assert all(text for _, _, _, text in settings(config))

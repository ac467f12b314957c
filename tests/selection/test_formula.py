"""Formulas: what the grammar admits, and what it evaluates to."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.config import SelectConfig
from pipeline.errors import ConfigError, InputError, StageError
from pipeline.selection import ranks
from pipeline.selection.formula import parse_formula
from pipeline.selection.ranks import RankSketch, merged
from pipeline.store import storage
from tests.selection.scores import kept, row, select, write_run

COLUMNS = {"utility": np.array([1.0, -2.0, 3.0]), "width": np.array([10.0, 20.0, 0.0])}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("utility * 2 + 1", [3, -3, 7]),
        ("-abs(utility)", [-1, -2, -3]),
        ("min(utility, width / 10, 0.5)", [0.5, -2, 0]),
        ("max(utility, 0) - log(width)", [1 - math.log(10), -math.log(20), math.inf]),
        ("utility > 0 and not width == 10", [False, False, True]),
        ("0 < utility <= 1 or width >= 20", [True, True, False]),
    ],
)
def test_values(source, expected):
    formula = parse_formula(source, "select.by", COLUMNS)
    assert formula.evaluate(COLUMNS, {}).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "source",
    [
        "__import__('os').system('x')", "utility.__class__", "utility[0]", "lambda: 1", "utility ** 9", "open(width)",
        "'text'", "utility if width else 1", "rank(rank(utility))", "min(utility)", "rank(utility, width)", "", "1 +",
        "utility and width", "True", "(" * 300 + "1" + ")" * 300, "1 if", "a.b.c", "utility < width in [1]", "x" * 3000,
    ],
)  # fmt: skip
def test_what_is_not_in_the_grammar_is_refused(source):
    with pytest.raises(ConfigError, match=r"select\.by"):
        parse_formula(source, "select.by", COLUMNS)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("source == 'a.org'", [True, False, False]),
        ("source != 'a.org'", [False, True, True]),
        ("source in ('b.org', \"c.org\") and utility < 0", [False, True, False]),
        ("not (source not in ['a.org'] or width > 10)", [True, False, False]),
    ],
)
@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string())])
def test_columns_of_text_are_held_against_texts(source, expected, kind):
    formula = parse_formula(source, "select.where", COLUMNS, {"source"}, condition=True)
    columns = {**COLUMNS, "source": pa.array(["a.org", "b.org", None]).cast(kind)}
    assert formula.evaluate(columns, {}).tolist() == expected


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("sorce == 'a'", r"expected known columns \(did you mean 'source'\?\), found 'sorce'"),
        ("width == 'a'", r"expected known columns \(source\), found 'width'"),
        ("source > 'a'", "expected numbers, or text beside a column of text"),
        ("'a' == source", "expected numbers, or text beside a column of text"),
        ("source in ('a', 1)", "expected"),
        ("source in ()", "expected"),
        ("source == 1", r"expected known columns \(.*\), found 'source'"),
    ],
)
def test_text_that_is_no_condition_is_refused(source, line):
    with pytest.raises(ConfigError, match=rf"select\.where: {line}"):
        parse_formula(source, "select.where", COLUMNS, {"source"}, condition=True)


def test_a_selection_of_some_sources(tmp_path):
    rows = [row(n, float(n), source=f"{'abc'[n % 3]}.org") for n in range(9)]
    run = write_run(tmp_path, [rows[:5], rows[5:]])
    summary = select(run, SelectConfig(keep=1.0, where="source in ('a.org', 'c.org') and utility < 8"), seed=0)
    assert kept(run) == [(0, 0), (0, 2), (0, 3), (1, 0), (1, 1)]
    assert summary.pruned == {"where": 4}


def test_unknown_columns_are_refused_before_anything_runs(tmp_path):
    run = write_run(tmp_path, [[row(1, 0.5)]])
    with pytest.raises(ConfigError, match=r"select.by: .*'utility'.*'utilty'"):
        select(run, SelectConfig(by="rank(utilty)"), seed=0)
    with pytest.raises(ConfigError, match=r"select.where: expected a condition"):
        select(run, SelectConfig(where="width"), seed=0)
    with pytest.raises(ConfigError, match=r"select.by"):
        select(run, SelectConfig(by="other.utility"), seed=0)


@settings(max_examples=50, deadline=None)
@given(values=arrays(np.float32, st.integers(1, 60), elements=st.floats(width=32)), split=st.integers(0, 60))
def test_ranks_are_exact_while_the_bins_suffice(values, split):
    parts = [RankSketch(), RankSketch()]
    parts[0].add(values[:split])
    parts[1].add(values[split:])
    finite = values[np.isfinite(values)]
    got = merged(parts).table().rank(values)
    for value, rank in zip(values, got, strict=True):
        if np.isfinite(value):
            assert rank == pytest.approx(((finite < value).sum() + (finite == value).sum() / 2) / len(finite))
        else:
            assert math.isnan(rank)


def test_ranks_with_fewer_bins_than_values(monkeypatch):
    monkeypatch.setattr(ranks, "MAX_BINS", 1 << 12)
    values = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    whole, parts = RankSketch(), [RankSketch() for _ in range(7)]
    whole.add(values)
    for part, chunk in zip(parts, np.array_split(values, 7), strict=True):
        part.add(chunk)
    table = merged(parts).table()
    assert np.array_equal(table.bins, whole.table().bins)
    exact = (np.argsort(np.argsort(values)) + 0.5) / len(values)
    assert np.abs(table.rank(values) - exact).max() < 0.005


def test_formula_with_ranks_and_a_condition(tmp_path):
    rng = np.random.default_rng(0)
    rows = [row(n, float(rng.normal()), similarity=float(rng.normal()), width=int(rng.integers(1, 100)))
            for n in range(40)]  # fmt: skip
    run = write_run(tmp_path, [rows[:15], rows[15:]])
    select(run, SelectConfig(keep=12, by="rank(utility) - 2 * rank(similarity)", where="width >= 20"), seed=0)

    def ranks_of(name):
        return np.argsort(np.argsort([entry[name] for entry in rows])) / 40

    value = ranks_of("utility") - 2 * ranks_of("similarity")
    allowed = [place for place in range(40) if rows[place]["width"] >= 20]
    best = sorted(allowed, key=lambda place: (-round(value[place], 6), rows[place]["uid"]))[:12]
    assert kept(run) == sorted((0, place) if place < 15 else (1, place - 15) for place in best)


def test_two_runs_are_intersected_by_rank(tmp_path):
    first = [row(n, float(n)) for n in range(20)]
    second = [row(n, float((n * 7) % 20)) for n in range(20)]
    run = write_run(tmp_path / "a", [first])
    other = write_run(tmp_path / "b", [second], group_rows=3)
    by = "min(rank(utility), rank(other.utility))"
    select(run, SelectConfig(keep=5, by=by, join={"other": other.root}), seed=0)
    best = sorted(range(20), key=lambda n: (-min(n, (n * 7) % 20), first[n]["uid"]))[:5]
    assert kept(run) == [(0, place) for place in sorted(best)]


def test_a_joined_run_over_other_pairs_is_refused(tmp_path):
    run = write_run(tmp_path / "a", [[row(1, 1.0), row(2, 2.0)]])
    swapped = write_run(tmp_path / "b", [[row(2, 1.0), row(1, 2.0)]])
    short = write_run(tmp_path / "c", [[row(1, 1.0)]])
    for other in (swapped, short):
        with pytest.raises(InputError, match="expected the"):
            select(run, SelectConfig(keep=1, by="other.utility", join={"other": other.root}), seed=0)
    with pytest.raises(ConfigError, match=r"select.join.other"):
        select(run, SelectConfig(by="other.utility", join={"other": str(tmp_path / "none")}), seed=0)


def test_zterms_give_each_checkpoint_an_equal_say(tmp_path):
    rng = np.random.default_rng(1)
    terms = rng.normal(size=(30, 4)) * [1, 1000, 0.01, 1] + [0, 5, 0, 0]
    rows = [row(n, -float(t.sum()), terms=t.tolist(), score=float(t.sum())) for n, t in enumerate(terms)]
    rows[3] = row(3, None, status="corrupt-image")
    run = write_run(tmp_path, [rows[:11], rows[11:]])
    entries = [{"path": f"{n}", "run": n // 2} for n in range(4)]
    storage.write_json(run.checkpoint_manifest, {"checkpoints": entries})
    select(run, SelectConfig(keep=10, by="zterms"), seed=0)
    good = np.delete(np.arange(30), 3)
    z = -(terms[good] - terms[good].mean(0)) / terms[good].std(0)
    best = good[np.argsort(-z.sum(1))[:10]]
    assert kept(run) == sorted((0, int(n)) if n < 11 else (1, int(n) - 11) for n in best)

    per_run = np.stack([z[:, :2].sum(1), z[:, 2:].sum(1)])
    error = per_run.std(0, ddof=1) / math.sqrt(2)
    summary = select(run, SelectConfig(keep=1.0, by="zterms", where="zterms_std < 0.5", name="sure"), seed=0)
    assert summary.kept == (error < 0.5).sum()


def test_zterms_of_held_out_runs_compare_like_with_like(tmp_path):
    from pipeline.store import storage

    rng = np.random.default_rng(2)
    runs = np.array([0, 0, 1, 1, 2, 2])
    own = rng.normal(size=(40, 6)) * [1, 100, 1, 100, 1, 100]  # each run's terms, as if it were the only one
    counts = np.ones((40, 6), dtype=bool)
    counts[:20, :2] = False
    counts[10:30, 2:4] = False
    number = counts[:, ::2].sum(1)
    terms = own / number[:, None]  # in the file they add up to the mean over the runs that count
    rows = []
    for n in range(40):
        stored = [float(t) if c else None for t, c in zip(terms[n], counts[n], strict=True)]
        score = float(terms[n][counts[n]].sum())
        rows.append(row(n, -score, terms=stored, score=score))
    run = write_run(tmp_path, [rows[:15], rows[15:]])
    storage.write_json(run.checkpoint_manifest, {"checkpoints": [{"path": "", "run": int(r)} for r in runs]})
    known = np.where(counts, own, np.nan)
    z = -(known - np.nanmean(known, 0)) / np.nanstd(known, 0)
    expected = np.nanmean(np.stack([z[:, runs == r].sum(1) for r in range(3)], 1), 1)
    select(run, SelectConfig(keep=12, by="zterms"), seed=0)
    best = np.argsort(-expected)[:12]
    assert kept(run) == sorted((0, int(n)) if n < 15 else (1, int(n) - 15) for n in best)
    summary = select(run, SelectConfig(keep=1.0, by="zterms", where="zterms_std > 0", name="several"), seed=0)
    assert summary.kept == (number > 1).sum()


def test_significant_without_a_spread_is_refused(tmp_path):
    run = write_run(tmp_path, [[row(1, 1.0)]])
    with pytest.raises(StageError, match=r"utility_std, which is empty; it takes proxy.runs"):
        select(run, SelectConfig(policy="significant"), seed=0)


RUNS = r"is empty throughout: it takes proxy\.runs of 2 or more"
NOBODY = [
    ({"by": "utility - utility_std"}, rf"select\.by: .* value of some pair \(utility_std {RUNS}\), found 'utility"),
    ({"by": "rank(b.utility_std) + b.loss", "join": {}}, rf"\(b\.loss is empty throughout, b\.utility_std {RUNS}\)"),
    ({"by": "log(-similarity)"}, r"select\.by: expected a finite value of some pair, found 'log\(-similarity\)'"),
    ({"by": "zterms_std"}, rf"zterms_std {RUNS}"),
    ({"where": "width > 64"}, r"select\.where: expected a condition that some pair meets, found 'width > 64'"),
    ({"where": "width > 64", "policy": "infomax"}, r"select\.where: expected a condition that some pair meets"),
]  # fmt: skip


@pytest.mark.parametrize(("section", "line"), NOBODY)
def test_what_no_pair_can_meet_is_refused_with_the_reason(tmp_path, section, line):
    shards = [[row(1, 1.0, loss=None), row(2, None, loss=None, status="corrupt-image")], [row(3, 3.0, loss=None)]]
    run = write_run(tmp_path / "a", shards, embedding_size=4)
    other = write_run(tmp_path / "b", shards)
    section = section | ({"join": {"b": other.root}} if "join" in section else {})
    with pytest.raises(ConfigError, match=line):
        select(run, SelectConfig.model_validate(section), seed=0)
    assert not storage.exists(run.selection())
    assert not (tmp_path / "a" / "scratch").exists()


def test_a_run_of_rejected_pairs_keeps_none(tmp_path):
    run = write_run(tmp_path, [[row(1, None, status="corrupt-image")], []])
    done = select(run, SelectConfig(where="width > 64"), seed=0)
    assert (done.kept, done.rejected) == (0, {"corrupt-image": 1})


REFUSED = [
    ({"join": {"no-name": "there"}}, r"select\.join: expected a name of letters"),
    ({"keep": {"threshold": 0.5}, "policy": "significant"}, r"select\.keep: expected a fraction or a count"),
    ({"keep": {"threshold": 0.5}, "balance": {"by": "caption"}}, r"select\.keep: expected a fraction or a count"),
    ({"embeddings": "other"}, r"select\.embeddings: expected the name of a joined run.*'other'"),
    ({"balance": {"by": "caption", "quota": "complexity"}}, r"select\.balance: expected balance.by: cluster"),
    ({"balance": {"by": "cluster"}}, r"select\.balance\.by: expected scores with embeddings"),
    ({"policy": "infomax"}, r"select\.policy: expected scores with embeddings"),
    ({"policy": "significant", "fill": "diverse"}, r"select\.fill: expected scores with embeddings"),
    ({"dedup": {"cosine": 0.9}}, r"select\.dedup\.cosine: expected scores with embeddings"),
]


@pytest.mark.parametrize(("section", "line"), REFUSED)
def test_what_the_scores_cannot_serve_is_refused_before_any_pass(tmp_path, section, line):
    run = write_run(tmp_path, [[row(1, 1.0)]])
    with pytest.raises(ConfigError, match=line):
        select(run, SelectConfig.model_validate(section), seed=0, map_tasks=lambda *_: pytest.fail("a pass began"))


@pytest.mark.parametrize(
    ("section", "missing"), [({"dedup": {"exact": True}}, "content"), ({"balance": {"by": "caption"}}, "caption_id")]
)
def test_a_column_that_is_missing_is_named(tmp_path, section, missing):
    run = write_run(tmp_path, [[row(1, 1.0)]])
    table = pq.read_table(run.score_file(0))
    pq.write_table(table.drop_columns([missing]), run.score_file(0))
    with pytest.raises(ConfigError, match=f"expected scores with a column '{missing}'"):
        select(run, SelectConfig.model_validate(section), seed=0)


@pytest.mark.parametrize("manifest", [None, [{"path": "0", "run": 0}], [{"path": "0"}, {"path": "1"}]])
def test_terms_are_of_one_run_unless_the_manifest_says_otherwise(tmp_path, manifest):
    rows = [row(n, float(-n), terms=[float(n), 0.0], score=float(n)) for n in range(6)]
    run = write_run(tmp_path, [[row(99, None, status="corrupt-image")], rows])
    if manifest is not None:
        storage.write_json(run.checkpoint_manifest, {"checkpoints": manifest})
    select(run, SelectConfig(keep=2, by="zterms"), seed=0)
    assert kept(run) == [(1, 0), (1, 1)]
    with pytest.raises(StageError, match="zterms_std, which is empty"):
        select(run, SelectConfig(keep=2, by="zterms", policy="significant"), seed=0)


def test_the_sign_of_the_terms_is_that_which_makes_utility_of_the_score(tmp_path):
    rows = [row(n, float(n), terms=[float(n)], score=float(n)) for n in range(6)]
    run = write_run(tmp_path, [rows])
    select(run, SelectConfig(keep=2, by="zterms"), seed=0)
    assert kept(run) == [(0, 4), (0, 5)]


def test_scores_without_terms_have_no_zterms(tmp_path):
    rows = [row(n, float(n), terms=[]) for n in range(3)]
    run = write_run(tmp_path, [rows, []])
    with pytest.raises(StageError, match="expected scores with terms, found none"):
        select(run, SelectConfig(keep=2, by="zterms"), seed=0)


def test_a_joined_run_that_lacks_a_shard_is_named(tmp_path):
    rows = [row(n, float(n)) for n in range(4)]
    run = write_run(tmp_path / "a", [rows, rows])
    other = write_run(tmp_path / "b", [rows])
    with pytest.raises(InputError, match=r"b/scores/00001\.parquet: expected scores of the shard /in/1\.tar"):
        select(run, SelectConfig(keep=2, by="other.utility", join={"other": other.root}), seed=0)


def test_ranks_of_nothing_are_not_finite():
    table = RankSketch().table()
    assert np.isnan(table.rank(np.array([1.0, np.inf], dtype=np.float32))).all()
    sketch = RankSketch()
    sketch.add(np.array([1.0, 2.0, np.nan], dtype=np.float32))
    assert sketch.table().rank(np.array([np.nan, 2.0, 0.0], dtype=np.float32))[1:].tolist() == [0.75, 0.25]
    assert np.isnan(sketch.table().rank(np.array([np.nan, np.inf], dtype=np.float32))).all()
    assert float(sketch.table().rank(np.float32(1.0))) == 0.25  # type: ignore[arg-type]

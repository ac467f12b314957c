"""What the commands print and decide about selections, on made-up scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.config import Config, parse_config
from pipeline.data.inventory import ShardInfo, write_inventory
from pipeline.errors import StageError
from pipeline.evaluation.results import Result
from pipeline.run import RunFolder
from pipeline.selection.scan import input_fingerprint
from pipeline.selection.tasks import thread_map
from pipeline.stages import looking, selecting
from pipeline.stages.job import Job
from pipeline.stages.mapping import ordered_map
from pipeline.stages.summary import note_selection, selection_is_current, show, speak_of_selection
from pipeline.store import storage
from tests.selection.scores import kept, row, select, write_run


def with_inventory(run: RunFolder, shards, **section) -> Config:
    write_inventory(run.inventory, [ShardInfo(n, f"/in/{n}.tar", f"{n}.tar", len(rows), 1, "v") for n, rows in
                                    enumerate(shards)])  # fmt: skip
    return parse_config({"out": run.root, "data": {"shards": "/in/*.tar"}, "select": section})


def two_blobs(count: int = 40):
    """Rows of two clusters and two sources over two shards; every tenth has failed."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        vector = np.zeros(8)
        vector[number % 2] = 1
        both = [*(vector + rng.normal(size=8) * 0.01), *np.zeros(8)]
        ok = number % 10 != 9
        rows.append(
            row(number, float(number) if ok else None, embedding=both if ok else None, source=f"{number % 2}.org",
                status="ok" if ok else "corrupt-image")
        )  # fmt: skip
    return [rows[: count // 2], rows[count // 2 :]]


def lines(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_dry_run_prints_reasons_clusters_sources_and_shards(tmp_path, capsys):
    shards = two_blobs()
    run = write_run(tmp_path, shards, embedding_size=16)
    config = with_inventory(run, shards, keep=0.5, where="utility >= 4", balance={"by": "cluster", "clusters": 2})
    before = sorted(tmp_path.rglob("*"))
    looking.show_plan(config)
    assert sorted(tmp_path.rglob("*")) == before
    printed = lines(capsys)
    assert " ".join(printed[0]) == ("40 pairs: 18 kept, 18 pruned (quota 14, where 4), 4 rejected (corrupt-image 4)")
    # 16 odd and 20 even ones have scored; two of each are below 4
    clusters = [line[2:] for line in printed if line[0] == "cluster" and line[1].isdigit()]
    assert sorted(clusters) == [["14", "8", "57.1", "%"], ["18", "10", "55.6", "%"]]
    assert ["0.org", "20"] in [line[:2] for line in printed]
    assert {line[0] for line in printed} >= {"0.tar", "1.tar"}
    assert sum(int(line[2]) for line in printed if line[0].endswith(".tar")) == 18


@pytest.mark.parametrize("policy", [{"policy": "infomax"}, {"policy": "significant", "fill": "diverse"}])
def test_clusters_are_counted_where_they_are_no_groups(tmp_path, policy):
    shards = two_blobs()
    shards = [[entry | {"utility_std": 1.0} for entry in rows] for rows in shards]
    run = write_run(tmp_path, shards, embedding_size=16)
    config = with_inventory(run, shards, keep=0.5, balance={"clusters": 2}, **policy)
    done = select(run, config.select, seed=0, map_tasks=thread_map)
    assert [group.name for group in done.groups] == ["all"]
    assert sorted(cluster.size for cluster in done.clusters) == [16, 20]
    assert sum(cluster.kept for cluster in done.clusters) == done.kept == 18
    numbers = [20 * shard + index for shard, index in kept(run)]
    assert sorted(cluster.kept for cluster in done.clusters) == sorted(
        sum(number % 2 == side for number in numbers) for side in (0, 1)
    )


def test_a_dry_run_says_what_a_quota_costs(tmp_path, capsys):
    rows = [row(n, value, utility_std=1.0) for n, value in enumerate([5.0, -5.0, -6.0, 0.1])]
    run = write_run(tmp_path, [rows])
    looking.show_plan(with_inventory(run, [rows], keep=3, policy="significant"))
    assert "1 harmful ones are needed to meet the quota" in capsys.readouterr().out
    looking.show_plan(with_inventory(run, [rows], keep=1.0, where="utility > 0"))
    assert "2 fewer than asked for: no more can be kept" in capsys.readouterr().out
    looking.show_plan(with_inventory(run, [rows], keep=2, by="utility / 2"))
    assert "threshold: utility / 2 >= 0.05" in capsys.readouterr().out


def test_long_tables_are_counted(tmp_path, capsys):
    rows = [row(n, float(n), source=f"{n}.org" if n else None) for n in range(30)]
    run = write_run(tmp_path, [rows])
    looking.show_plan(with_inventory(run, [rows], keep=0.5))
    out = capsys.readouterr().out
    assert "... and 10 more" in out
    assert "(no source)" in out


def test_compare_prints_overlap_and_where_it_is_least(tmp_path, capsys):
    rows = [row(n, float(n), similarity=float(-n), source=f"{n % 2}.org") for n in range(20)]
    run = write_run(tmp_path, [rows[:10], rows[10:]])
    config = with_inventory(run, [rows[:10], rows[10:]], keep=0.6)
    select(run, config.select, seed=0)
    select(run, config.select.model_copy(update={"name": "other", "by": "similarity"}), seed=0)
    looking.show_comparison(run.root, "default", "other")
    out = capsys.readouterr().out
    assert ["all", "4", "8", "8", "20.0", "%"] in [line.split() for line in out.splitlines()]
    assert "rank correlation of the two rankings: \u22121.00" in out


HOSTILE = ["[/x]", "shop [sale]", "[red]a", ":smile:", "\x1b[31mred", "two\nlines"]
AS_SHOWN = ["[/x]", "shop [sale]", "[red]a", ":smile:", "[31mred", "two lines"]


def test_sources_are_printed_as_they_are_called(tmp_path, capsys):
    rows = [row(n, float(n), source=HOSTILE[n % 6]) for n in range(12)]
    run = write_run(tmp_path, [rows])
    config = with_inventory(run, [rows], keep=0.5)
    select(run, config.select, seed=0)
    select(run, config.select.model_copy(update={"name": "half", "keep": 0.4}), seed=0)
    looking.show_plan(config)
    dry = capsys.readouterr().out
    looking.show_comparison(run.root, "default", "half")
    compared = capsys.readouterr().out
    for name in AS_SHOWN:
        for printed in (dry, compared):
            assert any(line.lstrip().startswith(f"{name} ") for line in printed.splitlines()), name
    assert "\x1b" not in dry + compared


def test_the_last_table_shows_paths_names_and_errors_as_they_are(tmp_path, capsys):
    rows = [row(n, float(n)) for n in range(10)]
    run = write_run(tmp_path / "[/x]", [rows])
    config = with_inventory(run, [rows], keep=0.5)
    select(run, config.select, seed=0)
    storage.write_json(run.summary, {"seconds": {}, "scores": {"failed_shards": ["a.tar: [Errno 5] [/b]"]}})
    show(Job(config), [Result.of("[/mine] 50 %", "[/mine]", 0.5, 5, ":smile:", [0.5])])
    shown = "".join(capsys.readouterr().out.split())
    for text in ("[/x]/report/index.html", "a.tar: [Errno 5] [/b]", "[/mine] 50 %", ":smile:"):
        assert "".join(text.split()) in shown


def test_compare_names_pairs_without_a_source_and_selections_that_are_there(tmp_path, capsys):
    rows = [row(n, float(n), source=None) for n in range(10)]
    run = write_run(tmp_path, [rows])
    config = with_inventory(run, [rows], keep=0.6)
    select(run, config.select, seed=0)
    select(run, config.select.model_copy(update={"name": "half", "keep": 0.5}), seed=0)
    looking.show_comparison(run.root, "default", "half")
    out = capsys.readouterr().out
    assert ["(no", "source)", "5", "1", "0"] in [line.split()[:5] for line in out.splitlines()]
    assert "only half \u2013" in out
    with pytest.raises(StageError, match=r"expected a finished selection 'third' \(there are: default, half\)"):
        looking.show_comparison(run.root, "default", "third")


def test_the_summary_speaks_of_the_selection_that_is_shown(tmp_path):
    rows = [row(n, float(n)) for n in range(10)]
    run = write_run(tmp_path, [rows])
    jobs = {}
    for name, keep in (("default", 0.6), ("half", 0.5)):
        config = with_inventory(run, [rows], keep=keep, name=name)
        jobs[name] = Job(config)
        select(run, config.select, seed=0)
        note_selection(jobs[name])
    assert storage.read_json(run.summary)["counts"]["kept"] == 5
    for name, count in (("default", 6), ("half", 5), ("half", 5)):
        speak_of_selection(jobs[name])
        assert storage.read_json(run.summary)["counts"]["selection"] == name
        assert storage.read_json(run.summary)["counts"]["kept"] == count


def test_a_selection_is_made_again_when_a_joined_run_has_changed(tmp_path):
    rows = [row(n, float(n)) for n in range(8)]
    run, other = (write_run(tmp_path / name, [rows]) for name in "ab")
    config = with_inventory(run, [rows], keep=0.5, by="utility + b.utility", join={"b": other.root})
    assert not selection_is_current(Job(config))
    select(run, config.select, seed=0)
    assert selection_is_current(Job(config))
    mark = storage.read_json(other.score_mark(0))
    storage.write_json(other.score_mark(0), {**mark, "checksum": "changed"})
    assert not selection_is_current(Job(config))
    assert (
        input_fingerprint(run, {})
        != input_fingerprint(run, {"b": other.root})
        != input_fingerprint(run, {"c": other.root})
    )


def test_many_files_are_shared_out_over_other_machines(tmp_path, monkeypatch):
    rows = [row(1, 1.0)]
    job = Job(with_inventory(write_run(tmp_path, [rows]), [rows]))
    calls: list[str] = []
    monkeypatch.setattr(selecting, "require_scores", lambda job: None)
    monkeypatch.setattr(selecting.summary, "note_selection", lambda job: None)
    monkeypatch.setattr(selecting, "_select", lambda config, map_tasks: calls.append("tasks"))
    monkeypatch.setattr(selecting, "run_task", lambda *_, **__: calls.append("threads"))
    for files, machines in ((300, 2), (300, 1), (10, 2)):
        monkeypatch.setattr(selecting, "alive_nodes", lambda count=machines: [{"CPU": 2.0}] * count)
        job.__dict__["inventory"] = [None] * files
        selecting.select_pairs(job)
    assert calls == ["tasks", "threads", "threads"]


@pytest.mark.ray
def test_ray_tasks_keep_the_same_pairs(tmp_path, ray_local):
    shards = [[row(100 * shard + place, float(place % 7)) for place in range(30)] for shard in range(3)]
    run = write_run(tmp_path, shards)
    config = with_inventory(run, shards, keep=0.3, by="rank(utility) + 0.001 * index", dedup={"exact": True})
    here = select(run, config.select, seed=0)
    before = kept(run)
    there = select(run, config.select, seed=0, map_tasks=ordered_map(Job(config), "select", "parts", at_least=1))
    assert kept(run) == before
    assert replace(here, seconds={}) == replace(there, seconds={})

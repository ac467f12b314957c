from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cli import invoke
from pipeline.config import dump_config, load_config, parse_config
from pipeline.errors import ConfigError


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "data: {shards: a.tar}\nscore: {estimater: tracin}",
            "score.estimater: expected a known key (did you mean 'estimator'?)",
        ),
        ("data: {shards: a.tar}\nselect: {keep: 1.5}", "select.keep: expected a fraction in (0, 1], found 1.5"),
        (f"data: {{shards: a.tar}}\nseed: {2**63}", f"seed: expected less than {2**63}, found {2**63}"),
        ("data: {shards: a.tar}\nseed: -1", "seed: expected greater than or equal to 0, found -1"),
        ("data: {shards: a.tar}\nselect: {keep: 0}", "select.keep: expected a positive count, found 0"),
        (
            "data: {shards: a.tar}\nproxy: {batch_size: many}",
            "proxy.batch_size: expected a valid integer",
        ),
        (
            "data: {shards: a.tar}\nproxy: {workers: 2, gpus_per_worker: 0.5}",
            "proxy: expected a whole gpus_per_worker with workers above 1, which cannot share a GPU",
        ),
        (
            "data: {shards: a.tar}\nscore: {method: forward, precision: tf32}",
            "score: expected precision: fp32 with method: forward, whose differences tf32 rounds away",
        ),
        (
            "data: {shards: a.tar}\nscore: {parameters: foo}",
            "score.parameters: expected 'all', 'projections' or 'last-K-blocks', found 'foo'",
        ),
        (
            "data: {shards: a.tar}\nscore: {parameters: last-0-blocks}",
            "score.parameters: expected 'all', 'projections' or 'last-K-blocks', found 'last-0-blocks'",
        ),
        (
            "data: {shards: a.tar}\nproxy: {checkpoints: []}",
            "proxy.checkpoints: expected at least one entry, found []",
        ),
        (
            "data: {shards: a.tar}\nproxy: {checkpoint_at: []}",
            "proxy.checkpoint_at: expected at least one entry, found []",
        ),
        ("data: {}", "data.shards: expected a value, this key is needed"),
        (
            "data: {shards: a.tar}\nselect: {keep: {drop_lowest: 0.6, drop_highest: 0.5}}",
            "select.keep: expected drop_lowest and drop_highest together below 1, found {'drop_highest': 0.5",
        ),
        ("data: {shards: a.tar}\nselect: {keep: {threshold: 0, foo: 1}}", "select.keep.foo: expected a known key"),
        ("data: {shards: a.tar}\nselect: {keep: {foo: 1}}", "select.keep.foo: expected a known key"),
        ("data: {shards: a.tar}\nselect: {keep: {threshold: x}}", "select.keep.threshold: expected a valid number"),
        ("data: {shards: a.tar}\nselect: {keep: }", "select.keep: expected a fraction in (0, 1], a positive count"),
        ("data: {shards: 3}", "data.shards: expected a valid string, found 3"),
        ("data: a.tar", "data: expected a section, a mapping of its keys, found 'a.tar'"),
        ("data: {shards: a.tar}\ntarget: {kind: shards}", "target: expected target.shards with, and only with, target"),
        (
            "data: {shards: a.tar}\ntarget: {prompt: 'a {}'}",
            "target: expected target.caption and target.prompt only with",
        ),
        ("- a list", "expected a mapping of sections"),
        ("data: [", "expected readable YAML"),
        (
            "data: {shards: a.tar}\nevaluate: {compare: {mine: {buy: utility}}}",
            "evaluate.compare: expected keys of select, mine.buy: no key of select",
        ),
        (
            "data: {shards: a.tar}\nevaluate: {compare: {mine: {keep: {threshold: 1, foo: 1}}}}",
            "evaluate.compare: expected keys of select, mine.keep.foo: no key of select",
        ),
        (
            "data: {shards: a.tar}\nevaluate: {compare: {mine: {keep: 1.5}}}",
            "evaluate.compare: expected keys of select, mine.keep: expected a fraction in (0, 1], found {'mine'",
        ),
        *(
            (
                f"data: {{shards: a.tar}}\nevaluate: {{compare: {{{name}: {{by: loss}}}}}}",
                f"evaluate.compare: expected a name that is not built in, {name} is (kept, full, random, clip-score, ",
            )
            for name in ("kept", "full", "random", "clip-score", "right-only", "utility", "similarity", "select")
        ),
        ("data: {shards: a.tar}\nevaluate: {baselines: [right-only]}", "expected truth with the baseline right-only"),
        ("data: {shard: a.tar}", "data.shard: expected a known key (did you mean 'shards'?)"),
        ("data:\n  shards: a.tar\n bla: [", "expected readable YAML: line 3, column 2: expected <block end>"),
        (
            "data: {shards: a.tar}\nscore: {batch_size: 8}\nscore: {loss: pool}",
            "expected readable YAML: line 3, column 1: the key 'score' stands twice in one section",
        ),
        (
            f"data: {{shards: [{'a.tar, ' * 9999}null]}}",
            "data.shards: expected a valid string, found ['a.tar', 'a.tar', ",
        ),
        ("seed: " + "[" * 9999, "expected readable YAML: maximum recursion depth exceeded"),
        ("data: {shards: a.tar}\nselect: {name: 2024-02-30}", "expected readable YAML: day is out of range for month"),
        ("data: {shards: a.tar}\nproxy: {lr: .inf}", "proxy.lr: expected a finite number, found inf"),
        (
            "data: {shards: a.tar}\ntarget: {kind: shards, shards: b.tar, prompt: a photo}",
            "target.prompt: expected a {} where the caption goes, found 'a photo'",
        ),
        ("data:\nscore:", "data: expected a value, this key is needed"),
        ("data: {shards: %(folder)s}", "this folder has no .tar, .tar.gz, .tgz, .tar.zst (put images and captions"),
        ("data: {shards: nowhere}", "data.shards: expected shards, no file matches the pattern, found 'nowhere'"),
        ("data: {shards: nowhere/*.tar}", "data.shards: expected shards, no file matches the pattern"),
    ],
)
def test_a_bad_config_is_one_line_and_status_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, line: str
) -> None:
    path = write(tmp_path, f"{text}\n".replace("%(folder)s", str(tmp_path)))
    assert invoke(["run", path, "--out", str(tmp_path / "run")]) == 2
    printed = capfd.readouterr().err.strip().splitlines()
    assert len(printed) == 1, printed
    assert printed[0].startswith(f"error: {path}: ")
    assert line in printed[0]
    assert len(printed[0]) < 1000
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("out", "line"),
    [
        ("nosuch://x/y", "expected a path or URL that can be used here: Protocol not known: nosuch, found"),
        ("s3://", "expected a folder, on an object store one in a bucket, found 's3://'"),
    ],
)
def test_a_folder_that_no_storage_has_is_status_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], tiny_shards: list[str], out: str, line: str
) -> None:
    path = write(tmp_path, f"data: {{shards: {tiny_shards}}}\n")
    assert invoke(["run", path, "--out", out]) == 2
    assert f"error: {path}: out: {line}" in capfd.readouterr().err


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, "data: {shards: a.tar}\nselect: {keep: 5e-1}\nproxy: {lr: 1E-3}\n"), ["proxy.steps=1e3"]
    )
    assert (config.select.keep, config.proxy.lr, config.proxy.steps) == (0.5, 0.001, 1000)


def test_a_section_with_nothing_in_it_has_its_defaults(tmp_path: Path) -> None:
    whole = load_config(write(tmp_path, "data: {shards: a.tar}\n"))
    empty = "score:\n  #batch_size: 8\nselect:\n  balance:\nevaluate:\n"
    assert load_config(write(tmp_path, f"data: {{shards: a.tar}}\n{empty}")) == whole


def test_a_missing_config_and_an_unknown_model_are_status_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], tiny_shards: list[str]
) -> None:
    assert invoke(["run", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: expected a config file, found nothing there" in capfd.readouterr().err
    assert invoke(["run", str(tmp_path)]) == 2
    assert capfd.readouterr().err.strip().endswith("expected a config file, found a folder")
    path = write(tmp_path, f"data: {{shards: {tiny_shards}}}\nproxy: {{model: ViT-Z-99}}\nout: {tmp_path / 'run'}\n")
    assert invoke(["run", path]) == 2
    assert f"error: {path}: proxy.model: ViT-Z-99: expected an open_clip model name" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("proxy", "line"),
    [
        ("{model: digits-vit}", "proxy.subset: expected less than 1 with score.held_out: true, found 1.0"),
        ("{model: digits-vit, subset: 0.5}", "proxy.runs: expected at least 2 with score.held_out: true and"),
        ("{model: digits-vit, subset: 0.75, runs: 3}", "proxy.runs: expected at least 4 with score.held_out: true and"),
        ("{model: digits-vit, checkpoints: [%s]}", "score.held_out: expected proxy runs trained here"),
    ],
)
def test_held_out_scores_need_a_run_that_did_not_see_the_pair(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], tiny_shards: list[str], proxy: str, line: str
) -> None:
    proxy = proxy.replace("%s", tiny_shards[0])
    path = write(tmp_path, f"data: {{shards: {tiny_shards}}}\nproxy: {proxy}\nscore: {{held_out: true}}\n")
    assert invoke(["run", path, "--out", str(tmp_path / "run")]) == 2
    assert line in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("proxy", "line"),
    [
        (
            "{steps: 4, checkpoint_at: [10]}",
            "proxy.checkpoint_at: expected different steps up to the run's 4, found [10]",
        ),
        ("{steps: 4, checkpoint_at: [2, 2]}", "proxy.checkpoint_at: expected different steps up to the run's 4"),
        ("{steps: 4, num_checkpoints: 5}", "proxy.num_checkpoints: expected at most the run's 4 steps, found 5"),
        ("{batch_size: 8, workers: 3}", "proxy.workers: expected a divisor of proxy.batch_size, found 3"),
    ],
)
def test_a_schedule_that_no_run_can_have_is_refused_before_the_inventory(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], tiny_shards: list[str], proxy: str, line: str
) -> None:
    path = write(tmp_path, f"data: {{shards: {tiny_shards}}}\nproxy: {proxy}\n")
    assert invoke(["run", path, "--out", str(tmp_path / "run")]) == 2
    assert line in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_overrides_are_yaml_and_reach_nested_keys(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {shards: a.tar}\n")
    config = load_config(path, ["select.keep=0.5", "proxy.checkpoint_at=[3, 5]", "engine.workers=2"], out="elsewhere")
    assert (config.select.keep, config.proxy.checkpoint_at, config.engine.workers) == (0.5, [3, 5], 2)
    assert config.out == "elsewhere"
    with pytest.raises(ConfigError, match=r"--set: expected KEY=VALUE, found 'select.keep'"):
        load_config(path, ["select.keep"])
    with pytest.raises(ConfigError, match="expected a section to set a key in"):
        load_config(path, ["data.shards.deeper=1"])


def test_a_dumped_config_loads_to_an_equal_tree(tmp_path: Path) -> None:
    config = parse_config({"data": {"shards": ["a.tar", "b.tar"]}, "select": {"keep": {"threshold": 0.25}}})
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_a_fraction_a_count_and_everything_are_told_apart() -> None:
    keeps = [
        parse_config({"data": {"shards": "a.tar"}, "select": {"keep": keep}}).select.keep for keep in (1.0, 1, 0.3)
    ]
    assert [type(keep) for keep in keeps] == [float, int, float]

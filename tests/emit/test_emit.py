from __future__ import annotations

import json
import subprocess
import tarfile
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Config, parse_config
from pipeline.emit.card import size_category
from pipeline.emit.emit import EmitSummary, emit
from pipeline.emit.keys import key_words, keys_repeat
from pipeline.emit.manifest import read_manifest
from pipeline.emit.train_script import TrainCommand, consumer_url, join_urls, most_loaders, shard_pattern
from pipeline.errors import StageError
from pipeline.store import storage
from tests.emit.made_run import MadeRun, make_run
from tests.helpers import sample_members, write_shards, write_tar


def emitted(tmp_path: Path, shards: list[str] | None = None, **sections: Any) -> tuple[MadeRun, EmitSummary]:
    sections.setdefault("emit", {"materialize": True, "pairs_per_shard": 4})
    made = make_run(tmp_path / "run", shards or write_shards(tmp_path / "in", shards=3), **sections)
    return made, emit(made.run, made.config, made.inventory, command="diffprune run my.yaml")


def with_emit(config: Config, **changes: Any) -> Config:
    tree = config.model_dump(mode="json")
    tree["emit"] |= changes
    return parse_config(tree)


def files_of(folder: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def test_manifest_and_uids_say_what_the_keep_lists_say(tmp_path: Path) -> None:
    made, summary = emitted(tmp_path)
    lines = [json.loads(line) for line in Path(made.folder.manifest).read_text().splitlines()]
    assert [set(line) for line in lines] == [{"shard", "url", "num_samples", "num_kept", "keep"}] * 3
    kept = made.kept()
    for number, line in enumerate(lines):
        assert line == {
            "shard": f"{number:05d}.tar",
            "url": made.inventory[number].url,
            "num_samples": 8,
            "num_kept": sum(shard == number for shard, *_ in kept),
            "keep": f"keep/{number:05d}.parquet",
        }
    assert [line.num_kept for line in read_manifest(made.folder.manifest)] == [line["num_kept"] for line in lines]
    uids = np.load(made.folder.uids)
    assert [f"{high:016x}{low:016x}" for high, low in uids.tolist()] == sorted(uid for _, uid, _, _ in kept)
    assert summary.uids == len(kept) == summary.counts["kept"] == 12
    assert not any("uids" in warning for warning in summary.warnings)


def test_pairs_that_share_a_uid_are_warned_of(tmp_path: Path) -> None:
    shards = [url for folder in ("a", "b") for url in write_shards(tmp_path / folder, shards=1, samples=8)]
    made, summary = emitted(tmp_path, shards, select={"keep": 1.0})
    assert Path(shards[0]).name == Path(shards[1]).name
    assert len(made.kept()) == summary.counts["kept"] == 16
    assert len(np.load(made.folder.uids)) == summary.uids == 8
    assert "uids.npy names 8 uids for 16 kept pairs" in summary.warnings[0]


def test_the_counts_add_up_with_rejected_pairs(tmp_path: Path) -> None:
    members = [m for n in range(6) for m in sample_members(f"{n}", b"x" if n else None, "caption" if n != 1 else None)]
    _, summary = emitted(tmp_path, [write_tar(tmp_path / "a.tar", members)])
    counts = summary.counts
    assert counts["in"] == 6
    assert counts["kept"] + counts["pruned"] + counts["rejected"] == 6
    assert counts["rejected_by_reason"] == {"no-caption": 1, "no-image": 1}
    assert counts["pruned"] == sum(counts["pruned_by_reason"].values()) == 2


def test_a_second_call_writes_nothing(tmp_path: Path) -> None:
    made, summary = emitted(tmp_path)
    before = files_of(made.folder.root)
    assert emit(made.run, made.config, made.inventory) == summary
    assert files_of(made.folder.root) == before


def test_whether_the_tars_are_there_is_asked_of_one_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, summary = emitted(tmp_path)
    asked: list[str] = []
    exists = storage.exists
    monkeypatch.setattr(storage, "exists", lambda url: asked.append(url) or exists(url))
    assert emit(made.run, made.config, made.inventory) == summary
    assert asked
    assert not [url for url in asked if url.startswith(made.folder.shards)]


@pytest.mark.parametrize("name", ["00002.tar", "sizes.json"])
def test_a_hand_over_that_lacks_a_file_is_not_complete(tmp_path: Path, name: str) -> None:
    made, _ = emitted(tmp_path)
    path = Path(made.folder.shards) / name
    content = path.read_bytes()
    path.unlink()
    emit(made.run, made.config, made.inventory)
    assert path.read_bytes() == content


def test_what_is_gone_is_made_again_and_the_rest_left_alone(tmp_path: Path) -> None:
    made, summary = emitted(tmp_path)
    before = files_of(made.folder.root)
    tar = Path(made.folder.shards) / "00001.tar"
    content = tar.read_bytes()
    tar.unlink()
    Path(made.folder.uids).unlink()
    assert emit(made.run, made.config, made.inventory) == summary
    assert tar.read_bytes() == content
    after = files_of(made.folder.root)
    assert list(after) == list(before)
    other = str(Path(made.folder.shards) / "00000.tar")
    assert after[other] == before[other]


def test_another_selection_is_handed_over_anew(tmp_path: Path) -> None:
    made, _ = emitted(tmp_path)
    again = make_run(
        made.run.root, [info.url for info in made.inventory], keep=0.25, emit=made.config.emit.model_dump()
    )
    assert emit(again.run, again.config, again.inventory).tars == 2
    names = sorted(path.name for path in Path(made.folder.shards).iterdir())
    assert names == [f"0000{n}{end}" for n in range(2) for end in (".parquet", ".tar", "_stats.json")] + ["sizes.json"]


def test_without_tars_those_of_an_earlier_call_go(tmp_path: Path) -> None:
    made, _ = emitted(tmp_path)
    summary = emit(made.run, with_emit(made.config, materialize=False), made.inventory)
    assert summary.tars == 0
    assert not Path(made.folder.shards).exists()
    assert "pipeline.loader" in Path(made.folder.train_script).read_text()


def test_an_unfinished_or_empty_selection_is_refused_in_one_line(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", write_shards(tmp_path / "in"))
    (Path(made.folder.root) / "selection.json").rename(tmp_path / "selection.json")
    with pytest.raises(StageError, match="diffprune select"):
        emit(made.run, made.config, made.inventory)
    nothing = make_run(tmp_path / "none", [info.url for info in made.inventory], select={"keep": 0.001})
    with pytest.raises(StageError, match="keeps no pair"):
        emit(nothing.run, nothing.config, nothing.inventory)


def test_a_selection_over_other_shards_is_refused(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", write_shards(tmp_path / "in", shards=2))
    for others in (made.inventory[::-1], made.inventory[:1], [replace(info, samples=9) for info in made.inventory]):
        with pytest.raises(StageError, match=r"made of other shards than there are now, .*tar for one"):
            emit(made.run, made.config, others)
    emit(made.run, made.config, [replace(info, url=f"/moved/{info.name}") for info in made.inventory])


def test_other_captions_are_handed_over_anew_and_the_usual_ones_have_no_part_in_the_fingerprint(tmp_path: Path) -> None:
    meta = {"caption": "from the json"}
    members = [m for n in range(6) for m in sample_members(f"{n}", b"x", "from the txt", meta)]
    made, _ = emitted(tmp_path, [write_tar(tmp_path / "a.tar", members)])
    assert "caption" not in json.loads(Path(made.folder.mark).read_text())["parts"]
    tree = made.config.model_dump(mode="json")
    tree["data"]["caption"] = "json:caption"
    emit(made.run, parse_config(tree), made.inventory)
    with tarfile.open(f"{made.folder.shards}/00000.tar") as tar:
        texts = {tar.extractfile(info).read() for info in tar if info.name.endswith(".txt")}  # type: ignore[union-attr]
    assert texts == {b"from the json"}
    assert "`txt` members hold the captions at `json:caption`" in Path(made.folder.card).read_text()


def test_keys_are_suffixed_only_if_they_repeat(tmp_path: Path) -> None:
    assert not emitted(tmp_path / "a")[1].suffixed
    shards = [write_tar(tmp_path / f"{n}.tar", sample_members("same", b"x", f"caption {n}")) for n in range(3)]
    made, summary = emitted(tmp_path / "b", shards, keep=1.0)
    assert summary.suffixed
    assert "`KEY-00012`" in Path(made.folder.card).read_text()


def test_repeating_keys_are_found_across_the_first_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("pipeline.emit.keys.FIRST", 10)
    for number in range(4):
        pq.write_table(pa.table({"key": [f"{number}/{row}" for row in range(8)]}), tmp_path / f"{number}.parquet")
    pq.write_table(pa.table({"key": ["new", "3/5"]}), tmp_path / "4.parquet")
    urls = [str(tmp_path / f"{number}.parquet") for number in range(5)]
    assert not keys_repeat(urls[:4])
    assert keys_repeat(urls)
    assert keys_repeat([urls[0], urls[0]])
    assert not keys_repeat([])


@given(st.lists(st.text(max_size=20), max_size=20))
def test_equal_keys_alone_have_equal_words(keys: list[str]) -> None:
    import pyarrow as pa

    array = pa.array(["x", *keys, "y" * 15, "y" * 16], pa.string()).slice(1)
    words = key_words(array).tolist()
    assert len(set(words)) == len(set(array.to_pylist()))
    assert len(set(zip(words, array.to_pylist(), strict=True))) == len(set(words))


def test_the_card_has_front_matter_counts_and_provenance(tmp_path: Path) -> None:
    made, _ = emitted(tmp_path)
    text = Path(made.folder.card).read_text()
    _, front, body = text.split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["size_categories"] == ["n<1K"]
    assert card["configs"][0]["data_files"][0]["path"] == "shards/*.tar"
    for piece in ("12 image-text pairs, selected from 24", "diffprune run my.yaml", "tracin", '"abc"', "keep: 0.5"):
        assert piece in body
    for info in made.inventory:
        assert f"| `{info.url}` | 8 | {info.bytes} |" in body
    assert "\n\n\n" not in text


@pytest.mark.parametrize(
    ("pairs", "name"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (10**11, "100B<n<1T"), (10**12 - 1, "100B<n<1T"), (10**12, "n>1T")],
)
def test_sizes_have_the_names_of_the_hub(pairs: int, name: str) -> None:
    assert size_category(pairs) == name


def test_the_card_says_what_the_scores_and_the_selection_are_made_with_whatever_the_config_says(tmp_path: Path) -> None:
    made, _ = emitted(tmp_path, select={"keep": 0.5, "by": "-utility"})
    tree = made.config.model_dump(mode="json")
    tree["select"] |= {"keep": 0.9, "by": "utility"}
    tree |= {"score": {"estimator": "z0"}, "seed": 4}
    emit(made.run, parse_config(tree), made.inventory, command="diffprune run 'https://me:word@h/my.yaml?sig=a'")
    text = Path(made.folder.card).read_text()
    assert "Made by `diffprune run 'https://h/my.yaml?...'`." in text
    assert "the selection `default` keeps, ranked by `-utility`" in text
    assert "an estimate by `tracin`" in text
    settings = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert settings["select"] == made.config.select.model_dump(mode="json") | {"seed": 0}
    assert settings["seed"] == 4
    assert "z0" not in text


COMMAND = TrainCommand("open_clip_train.main", "", '"$here/shards/{00000..00006}.tar"', 700, 7, "ViT-B-32", 64, 10, 3)


def test_the_script_is_sound_shell(tmp_path: Path) -> None:
    from shutil import which

    shellcheck = which("shellcheck", path=str(Path(__import__("sys").executable).parent))
    assert shellcheck is not None
    for command in (COMMAND, replace(COMMAND, train_data="'s3://b/a.tar'", options='--keep "$here"', model="a b.json")):
        script = tmp_path / "train.sh"
        script.write_text(command.render())
        subprocess.run([shellcheck, str(script)], check=True)


@pytest.mark.parametrize(
    ("gpus", "workers", "warns"), [("1", "4", False), ("2", "3", False), ("8", "1", True)], ids=lambda value: str(value)
)
def test_the_script_passes_everything_on_and_shares_workers_out(
    tmp_path: Path, gpus: str, workers: str, warns: bool
) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    (folder / "train.sh").write_text(COMMAND.render())
    done = subprocess.run(
        ["bash", str(folder / "train.sh"), "--lr", "1e-3"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
        env={"PYTHON": str(python), "GPUS": gpus, "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    arguments = done.stdout.splitlines()
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", gpus] if gpus != "1" else []
    assert arguments == [
        *launch, "-m", "open_clip_train.main", "--train-data", f"{folder}/shards/{{00000..00006}}.tar",
        "--train-num-samples", "700", "--dataset-type", "webdataset", "--model", "ViT-B-32", "--batch-size", "64",
        "--epochs", "10", "--warmup", "11", "--workers", workers, "--seed", "3", "--lr", "1e-3",
    ]  # fmt: skip
    assert ("warning: 8 GPUs with 1 loading processes each, but more than 7 in all" in done.stderr) is warns


def test_few_pairs_get_few_workers_and_a_warning() -> None:
    (hint,) = replace(COMMAND, loaders=2).warnings()
    assert hint.endswith("(for more, lower emit.pairs_per_shard or emit.train_batch_size)")
    (hint,) = replace(COMMAND, loaders=2, options='--keep "$here"').warnings()
    assert hint.endswith("(for more, lower emit.train_batch_size)")
    assert COMMAND.warnings() == []


@pytest.mark.parametrize(
    ("pairs", "batch_size", "most"),
    [
        ([100] * 7, 100, 7),
        ([100] * 7, 101, 3),
        ([209, 209, 210, 210], 256, 2),
        ([1, 500, 500, 500], 256, 2),
        ([4], 4, 1),
        ([4, 4], 9, 0),
    ],
)
def test_each_loading_process_has_a_whole_batch_whichever_tars_it_gets(
    pairs: list[int], batch_size: int, most: int
) -> None:
    def fewest(processes: int) -> int:
        return min(sum(order[first::processes]) for order in permutations(pairs) for first in range(processes))

    assert most_loaders(pairs, batch_size) == most
    assert [fewest(processes) >= batch_size for processes in range(1, len(pairs) + 1)] == [
        processes <= most for processes in range(1, len(pairs) + 1)
    ]


@pytest.mark.parametrize(
    ("urls", "joined"),
    [
        (["d/00000.tar", "d/00001.tar", "d/00002.tar"], "d/{00000..00002}.tar"),
        (["d/9.tar", "d/10.tar"], "d/{9..10}.tar"),
        (["99999.tar", "100000.tar"], "{99999..100000}.tar"),
        (["09999.tar", "10000.tar", "10001.tar"], "{09999..10001}.tar"),
        (["099.tar", "0100.tar"], "099.tar::0100.tar"),
        (["a1.tar", "b2.tar"], "a1.tar::b2.tar"),
        (["a1.tar", "a3.tar", "a4.tar"], "a1.tar::a{3..4}.tar"),
        (["x{1}.tar", "x{2}.tar", "plain.tar"], "x{1}.tar::x{2}.tar::plain.tar"),
        ([f"{n:05d}.tar" for n in range(99_998, 100_002)], "{99998..100001}.tar"),
    ],
)
def test_joined_urls_expand_to_the_same_urls(urls: list[str], joined: str) -> None:
    from webdataset.shardlists import expand_urls

    assert join_urls(urls) == joined
    if "x{1}" not in joined:
        assert expand_urls(joined) == urls


def test_more_than_100000_tars_expand_right() -> None:
    from webdataset.shardlists import expand_urls

    assert expand_urls(shard_pattern("d", 100_003)) == [f"d/{n:05d}.tar" for n in range(100_003)]


def test_stores_without_a_client_in_webdataset_are_piped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert consumer_url("in/0.tar") == f"{tmp_path}/in/0.tar"
    assert consumer_url("s3://b/0.tar") == "pipe:aws s3 cp s3://b/0.tar -"
    assert consumer_url("https://h/0.tar") == "https://h/0.tar"


@pytest.mark.parametrize("name", ["a b.tar", "$(touch made).tar", "'; touch made; '.tar", '"`touch made`".tar'])
def test_no_part_of_a_name_is_run_by_the_shells_that_webdataset_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from webdataset.gopen import gopen

    monkeypatch.chdir(tmp_path)
    for program, address in (("aws", "$3"), ("curl", "${*: -1}")):
        (tmp_path / program).write_text(f'#!/usr/bin/env bash\nprintf %s "{address}"\n')
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for url in (f"s3://b/{name}", f"https://h/{name}"):
        with gopen(consumer_url(url)) as stream:
            assert stream.read().decode().replace("%27", "'") == url
    assert not (tmp_path / "made").exists()

"""What reads the handed-over files does read them: open_clip's trainer, webdataset, datasets, DuckDB and others."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pandas
import polars
import pytest
import webdataset
from PIL import Image

from pipeline.emit.emit import emit
from tests.emit.made_run import MadeRun, make_run
from tests.helpers import write_json_shards, write_shards

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    """Twelve of 24 pairs, as three tars."""
    folder = tmp_path_factory.mktemp("consumers")
    made = make_run(
        folder / "run",
        write_shards(folder / "in", shards=3),
        emit={"materialize": True, "pairs_per_shard": 4, "train_batch_size": 4, "train_epochs": 1},
        proxy={"model": "tiny-vit"},
    )
    emit(made.run, made.config, made.inventory)
    return made


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `python` in which torchvision imports whatever torch it was built for, as the trainer's machine would have."""
    path = tmp_path_factory.mktemp("bin") / "python"
    start = "import runpy, sys; import pipeline.models.compat; sys.argv[:2] = []; "
    start += "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    path.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -c "{start}" "$@"\n')
    path.chmod(0o755)
    return path


def train(folder: Path, python: Path, logs: Path, *arguments: str) -> str:
    """Run a printed train.sh on the CPU and return open_clip's log."""
    done = subprocess.run(
        ["bash", str(folder / "train.sh"), "--device", "cpu", "--logs", str(logs), "--name", "x", *arguments],
        capture_output=True, text=True, cwd=logs.parent, timeout=200,
        env={**os.environ, "PYTHON": str(python), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log = (logs / "x" / "out.log").read_text() if (logs / "x" / "out.log").exists() else ""
    assert done.returncode == 0, done.stderr[-3000:]
    return log


def test_open_clip_trains_on_the_pruned_tars(made: MadeRun, python: Path, tmp_path: Path) -> None:
    """A model that open_clip knows only with our help."""
    log = train(Path(made.folder.root), python, tmp_path / "logs")
    assert "pruned/shards/{00000..00002}.tar" in log
    assert "12/12 (100%)" in log
    assert (tmp_path / "logs" / "x" / "checkpoints" / "epoch_1.pt").exists()


def test_open_clip_itself_trains_on_braces(made: MadeRun, python: Path, tmp_path: Path) -> None:
    """open_clip's own `main`, which also finds the number of pairs in sizes.json."""
    script = Path(made.folder.train_script).read_text()
    config = ROOT / "pipeline" / "models" / "configs"
    start = "import sys, pipeline.models.compat, open_clip; from open_clip_train.main import main; "
    start += f"open_clip.add_model_config({str(config)!r}); main(sys.argv[1:])"
    assert "--train-num-samples 12" in script
    done = subprocess.run(
        [sys.executable, "-c", start, "--train-data", f"{made.folder.shards}/{{00000..00002}}.tar",
         "--dataset-type", "webdataset", "--model", "tiny-vit", "--device", "cpu", "--batch-size", "4",
         "--workers", "2", "--epochs", "1", "--logs", str(tmp_path / "logs"), "--name", "x"],
        capture_output=True, text=True, cwd=tmp_path, timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # Two workers with whole batches each: open_clip rounds the 12 pairs up to 16.
    assert "16/16 (100%)" in (tmp_path / "logs" / "x" / "out.log").read_text()


def test_open_clip_trains_on_the_original_shards_through_the_keep_lists(python: Path, tmp_path: Path) -> None:
    """In batches that no shard fills alone: two loading processes would never end."""
    made = make_run(
        tmp_path / "run",
        write_shards(tmp_path / "in", shards=3),
        emit={"train_batch_size": 12, "train_epochs": 1},
        proxy={"model": "tiny-vit"},
    )
    emit(made.run, made.config, made.inventory)
    log = train(Path(made.folder.root), python, tmp_path / "logs")
    assert "in/{00000..00002}.tar" in log
    assert "12/12 (100%)" in log


@pytest.mark.parametrize("materialize", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_open_clip_trains_on_pairs_whose_captions_are_in_the_json(
    python: Path, tmp_path: Path, materialize: bool
) -> None:
    made = make_run(
        tmp_path / "run",
        write_json_shards(tmp_path / "in", shards=3),
        data={"caption": "json:caption"},
        emit={"train_batch_size": 6, "train_epochs": 1, "materialize": materialize},
        proxy={"model": "tiny-vit"},
    )
    emit(made.run, made.config, made.inventory)
    log = train(Path(made.folder.root), python, tmp_path / "logs")
    assert "12/12 (100%)" in log


def test_the_hook_gives_open_clips_loader_the_kept_pairs_alone(made: MadeRun, tmp_path: Path) -> None:
    """In two workers: the number of batches is that of the kept pairs, and their captions are the only ones."""
    from pipeline.models import compat  # noqa: F401  isort: skip
    from types import SimpleNamespace

    import torch
    from open_clip_train import data

    from pipeline.loader import kept_shards, open_clip_hook

    before = data.tarfile_to_samples_nothrow
    try:
        open_clip_hook(made.folder.root)
        pickle.dumps(data.tarfile_to_samples_nothrow)  # what starting workers by spawning needs
        arguments = SimpleNamespace(
            train_data="::".join(kept_shards(made.folder.root)), train_num_samples=12, batch_size=1, workers=2,
            world_size=1, seed=0, train_data_upsampling_factors=None,
        )  # fmt: skip
        info = data.get_wds_dataset(
            arguments, lambda image: torch.zeros(1), True, tokenizer=lambda text: [torch.tensor([*text.encode()][:6])]
        )
        captions = [bytes(text[0].tolist()).decode() for _, text in info.dataloader]
    finally:
        data.tarfile_to_samples_nothrow = before
    kept = {sample["__key__"]: sample["txt"].decode()[:6] for sample in read_tars(made)}
    assert len(captions) == 12
    assert set(captions) <= set(kept.values())


def read_tars(made: MadeRun) -> list[dict[str, bytes]]:
    urls = f"{made.folder.shards}/{{00000..00002}}.tar"
    return list(webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=webdataset.split_by_node))


def test_webdataset_reads_the_tars(made: MadeRun) -> None:
    samples = read_tars(made)
    kept = made.kept()
    assert [sample["__key__"] for sample in samples] == [key for _, _, key, _ in kept]
    assert [json.loads(sample["json"])["uid"] for sample in samples] == [uid for _, uid, _, _ in kept]
    assert all(Image.open(io.BytesIO(sample["jpg"])).size[0] >= 32 for sample in samples)


def test_datasets_reads_tars_and_parquet_offline(
    made: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    tars = [f"{made.folder.shards}/{number:05d}.tar" for number in range(3)]
    pairs = datasets.load_dataset("webdataset", data_files={"train": tars}, split="train", cache_dir=str(tmp_path))
    kept = made.kept()
    assert pairs["__key__"] == [key for _, _, key, _ in kept]
    assert pairs[0]["jpg"].size[0] >= 32
    assert [entry["uid"] for entry in pairs["json"]] == [uid for _, uid, _, _ in kept]
    keep = [made.folder.keep(number) for number in range(3)]
    rows = datasets.load_dataset("parquet", data_files={"train": keep}, split="train", cache_dir=str(tmp_path))
    assert rows["uid"] == [uid for _, uid, _, _ in kept]


def test_duckdb_pandas_and_polars_read_keep_lists_and_sources(made: MadeRun) -> None:
    uids = [uid for _, uid, _, _ in made.kept()]
    keep, sources = f"{made.folder.root}/keep/*.parquet", f"{made.folder.shards}/*.parquet"
    assert [row[0] for row in duckdb.sql(f"select uid from '{keep}' order by filename, index").fetchall()] == uids
    joined = duckdb.sql(
        f"select count(*) from '{keep}' k join '{sources}' s on k.uid = s.uid and k.key = s.source_key "
        "and k.index = s.source_index"
    ).fetchall()
    assert joined == [(12,)]
    frames = [pandas.read_parquet(made.folder.keep(number)) for number in range(3)]
    assert [uid for frame in frames for uid in frame["uid"]] == uids
    assert polars.read_parquet(keep)["uid"].to_list() == uids
    assert pandas.read_json(made.folder.manifest, lines=True)["num_kept"].sum() == 12


def test_datacomps_rules_hold(made: MadeRun) -> None:
    """Its resharder asserts the dtype, binary-searches each uid, and reads the number of pairs of each shard."""
    subset = np.load(made.folder.uids, mmap_mode="r")
    assert subset.dtype == np.dtype("u8,u8")
    for sample in read_tars(made):
        uid = json.loads(sample["json"])["uid"]
        wanted = np.array([(int(uid[:16], 16), int(uid[16:], 16))], subset.dtype)[0]
        assert np.searchsorted(subset, wanted, "right") - np.searchsorted(subset, wanted, "left") == 1
    for number in range(3):
        assert json.loads((Path(made.folder.shards) / f"{number:05d}_stats.json").read_text())["successes"] == 4

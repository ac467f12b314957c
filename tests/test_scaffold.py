"""`diffprune init`: the config it writes is valid, fits the shards, and documents every key."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import Config, EvaluateConfig, load_config
from pipeline.errors import ConfigError, InputError
from pipeline.reference import iterate_settings
from pipeline.scaffold import Machine, draft_config, look_at_machine, shorten, write_config
from tests.helpers import caption_of, image_bytes, sample_members, write_tar

SMALL = Machine(cpus=2, memory=8 * 10**9)
LARGE = Machine(cpus=64, memory=10**12, gpus=8, gpu="some GPU", bfloat16=True)


def test_config_loads_and_fits_the_shards(make_shards: Callable[..., list[str]], tmp_path: Path) -> None:
    urls = make_shards(shards=3, samples=40)
    path = tmp_path / "my.yaml"
    found = write_config(str(path), urls, machine=SMALL, out="runs/mine")
    config = load_config(path)
    assert found.samples == 120
    assert config.data.shards == str(Path(urls[0]).parent / "*.tar")
    assert config.out == "runs/mine"
    assert config.proxy.model == "tiny-vit"
    assert config.proxy.batch_size * 4 <= 120
    assert config.target.pairs + config.reference.pairs + config.reference.gradient_pairs < 120
    assert config.data.caption == "txt"
    text = path.read_text()
    assert text.startswith("# 120 pairs in 3 shards, ")
    assert "2 CPUs, 8.0 GB of memory, no GPU" in text


def test_every_key_is_there_and_uncommenting_gives_the_defaults(
    make_shards: Callable[..., list[str]], tmp_path: Path
) -> None:
    text, _ = draft_config(make_shards(shards=1, samples=10), machine=SMALL)
    (tmp_path / "as-written.yaml").write_text(text)
    written = load_config(tmp_path / "as-written.yaml")
    (tmp_path / "uncommented.yaml").write_text(re.sub(r"^( *)#(?! )", r"\1", text, flags=re.MULTILINE))
    assert load_config(tmp_path / "uncommented.yaml") == written.model_copy(update={"evaluate": EvaluateConfig()})
    prose = " ".join(line.strip().removeprefix("# ") for line in text.splitlines() if line.strip().startswith("# "))
    for setting in iterate_settings(Config):
        assert re.search(rf"^ *#?{setting.key.split('.')[-1]}:", text, re.MULTILINE), setting.key
        assert " ".join(setting.meaning.split()) in prose, setting.key


def test_a_key_that_is_uncommented_by_itself_is_set_where_it_stands(
    make_shards: Callable[..., list[str]], tmp_path: Path
) -> None:
    text, _ = draft_config(make_shards(shards=1, samples=10), machine=SMALL)
    before, score, after = text.partition("\nscore:\n")
    path = tmp_path / "my.yaml"
    path.write_text(before + score + after.replace("#batch_size: 1024", "batch_size: 64", 1))
    config = load_config(path)
    assert config.score.batch_size == 64
    assert config.proxy == load_config_of(text, tmp_path).proxy


def load_config_of(text: str, folder: Path) -> Config:
    (folder / "text.yaml").write_text(text)
    return load_config(folder / "text.yaml")


def test_a_gpu_machine_gets_the_full_model(make_shards: Callable[..., list[str]]) -> None:
    text, _ = draft_config(make_shards(shards=1, samples=10), machine=LARGE)
    assert "\n  #model: ViT-B-32\n" in text
    assert "8 GPUs (some GPU)" in text
    assert "\n  precision: bf16\n" in text
    assert "\n  precision: tf32\n" in text
    old = draft_config(make_shards(shards=1, samples=10), machine=replace(LARGE, bfloat16=False))[0]
    assert "\n  #precision: fp32\n" in old


def test_captions_are_found_in_json(tmp_path: Path) -> None:
    members = []
    for number in range(12):
        meta = {"text": caption_of(number), "title": 7, "source": "somewhere"}
        members += sample_members(str(number), image_bytes(seed=number), None, meta)
    text, found = draft_config(write_tar(tmp_path / "a.tar", members), machine=SMALL)
    assert "\n  caption: json:text\n" in text
    assert "\n  source: source\n" in text
    assert found.status["ok"] == 12


def test_repeated_captions_become_classes(tmp_path: Path) -> None:
    members = []
    for number in range(20):
        members += sample_members(str(number), image_bytes(seed=number), "a cat" if number % 2 else "a dog")
    text, _ = draft_config(write_tar(tmp_path / "a.tar", members), machine=SMALL)
    assert "\n  equal_captions: ignore\n" in text
    assert "\n    by: caption\n" in text
    assert "# Chosen here: 100 % of the captions repeat" in text


def test_refuses_to_overwrite_and_to_guess(make_shards: Callable[..., list[str]], tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="of this name already"):
        write_config(str(path), make_shards(shards=1), machine=SMALL)
    assert path.read_text() == "mine"
    with pytest.raises(InputError, match="no pair can be used: no-caption 1"):
        draft_config(write_tar(tmp_path / "a.tar", sample_members("0", image_bytes(), None)), machine=SMALL)
    with pytest.raises(ConfigError):
        write_config(str(tmp_path / "other.yaml"), str(tmp_path / "nothing-*.tar"), machine=SMALL)
    assert not (tmp_path / "other.yaml").exists()


def test_lists_are_shortened_only_when_they_are_the_whole_folder(make_shards: Callable[..., list[str]]) -> None:
    urls = make_shards(shards=4, samples=1)
    pattern = str(Path(urls[0]).parent / "*.tar")
    assert shorten(urls) == pattern
    assert shorten(urls[:3]) == urls[:3]
    assert shorten([pattern]) == pattern
    assert shorten("a.tar") == "a.tar"


def test_machine_is_this_one() -> None:
    machine = look_at_machine()
    assert machine.cpus >= 1
    assert machine.memory > 10**8

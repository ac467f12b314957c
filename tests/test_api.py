"""The public surface: cheap to import, typed, and its doctests say what it does."""

from __future__ import annotations

import doctest
import importlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import pipeline
from pipeline import Batches, Checkpoint, ConfigError, InputError, Settings, StageError
from pipeline.data.decode import Decoder
from pipeline.data.reader import read_shard
from pipeline.models.clip import split_state
from tests.emit.made_run import make_run


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, pipeline; assert pipeline.load_config and pipeline.RunFolder; "
        "heavy = {'torch', 'ray', 'pyarrow', 'open_clip', 'PIL'} & set(sys.modules); assert not heavy, heavy; "
        "assert pipeline.open_scores and pipeline.select; "
        "heavy = {'torch', 'ray', 'open_clip', 'tqdm'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_every_public_name_is_there_and_others_are_not() -> None:
    for name in pipeline.__all__:
        assert getattr(pipeline, name).__doc__, name
        assert name in dir(pipeline)
    assert sorted(pipeline.__all__) == sorted(name for names in pipeline._HOME.values() for name in names)
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        pipeline.prune  # noqa: B018


@pytest.mark.parametrize("name", ["open_scores", "select", "encode_pairs", "score_pairs", "checkpoint_of"])
def test_doctests(name: str, tmp_path: Path, tiny_shards: list[str]) -> None:
    run = make_run(tmp_path / "run", tiny_shards).run.root
    home = importlib.import_module(getattr(pipeline, name).__module__)
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    found = finder.find(getattr(home, name), name, globs={**vars(home), "run": run})
    for case in found:
        runner.run(case)
    assert runner.summarize() == (0, len(found[0].examples))
    assert runner.tries > 0


def test_pairs_from_python_are_those_from_shards(make_shards: Callable[..., list[str]]) -> None:
    model = pipeline.build_model("digits-vit")
    (url,) = make_shards(shards=1, samples=5)
    with read_shard(url) as reader:
        samples = list(reader)
    read = Decoder(model.image_spec, model.tokenize, 10**6).decode_shard(samples).batch
    given = pipeline.encode_pairs(
        model, [s.image for s in samples], [s.caption for s in samples], [s.uid for s in samples]
    )
    for name in ("images", "tokens", "ids", "captions"):
        assert torch.equal(getattr(read, name), getattr(given, name))


def test_pairs_that_cannot_be_used_are_named() -> None:
    model = pipeline.build_model("digits-vit")
    image = Image.new("L", (20, 20))
    with pytest.raises(InputError, match="pair 1: corrupt-image"):
        pipeline.encode_pairs(model, [image, b"no image"], ["a", "b"])
    with pytest.raises(InputError, match="as many captions as images, 1, found 2"):
        pipeline.encode_pairs(model, [image], ["a", "b"])
    with pytest.raises(InputError, match="as many uids as images, 1, found 0"):
        pipeline.encode_pairs(model, [image], ["a"], [])
    broken = io.BytesIO()
    Image.new("RGB", (200, 200), "red").save(broken, "JPEG")
    with pytest.raises(InputError, match=r"pair 1: corrupt-image: .*truncated"):
        pipeline.encode_pairs(model, [image, Image.open(io.BytesIO(broken.getvalue()[:-100]))], ["a", "b"])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "F", "CMYK", "YCbCr", "HSV"])
def test_images_of_every_mode_are_taken(mode: str) -> None:
    model = pipeline.build_model("digits-vit")
    found = pipeline.encode_pairs(model, [Image.new(mode, (20, 20))], ["a"])
    if mode == "CMYK":
        assert bool((found.images == 255).all()), "no ink is white"


def test_runs_are_averaged_and_utility_has_the_sign_that_keeps() -> None:
    model = pipeline.build_model("digits-vit", seed=1)
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue", "white", "black", "grey")]
    pairs = pipeline.encode_pairs(model, images, [f"number {n}" for n in range(6)])
    batches = Batches(reference=pairs[:3], gradient=pairs[:3], target=pairs[3:])
    params, buffers = split_state(model)
    one = Checkpoint(step=2, lr=1e-3, run=0, params=params, buffers=buffers)
    two = Checkpoint(step=2, lr=3e-3, run=1, params=params, buffers=buffers)
    settings = Settings(estimator="diff-in", method="exact")
    alone = [pipeline.score_pairs(model, [c], pairs, batches, settings, dataset_size=10) for c in (one, two)]
    both = pipeline.score_pairs(model, [one, two], pairs, batches, settings, dataset_size=10)
    assert torch.allclose(both.score, (alone[0].score + alone[1].score) / 2)
    assert torch.equal(both.utility, -both.score)
    with pytest.raises(ConfigError, match="at least one checkpoint"):
        pipeline.score_pairs(model, [], pairs, batches)


def test_pairs_of_two_calls_are_the_same_only_where_they_are_equal() -> None:
    model = pipeline.build_model("digits-vit", seed=1)
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    first = pipeline.encode_pairs(model, [red, blue], ["red", "blue"])
    second = pipeline.encode_pairs(model, [blue, red, red], ["red", "crimson", "red"])
    assert len({*first.ids.tolist(), *second.ids.tolist()}) == 4
    assert second.ids[2] == first.ids[0]


@pytest.mark.parametrize(
    ("setting", "key"),
    [({"estimator": "diffin"}, "estimator"), ({"loss": "rows"}, "loss"), ({"precision": "fp16"}, "precision"),
     ({"precondition": "adamw"}, "precondition"), ({"equal_captions": "ignored"}, "equal_captions")],
)  # fmt: skip
def test_settings_that_there_are_not_are_refused(setting: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: expected one of "):
        Settings(**setting)


def test_the_order_of_checkpoints_does_not_matter() -> None:
    model = pipeline.build_model("digits-vit", seed=1)
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue", "white", "black", "grey")]
    pairs = pipeline.encode_pairs(model, images, [f"number {n}" for n in range(6)])
    batches = Batches(reference=pairs[:3], gradient=pairs[:3], target=pairs[3:])
    checkpoints = []
    for run, step in ((0, 5), (0, 10), (1, 5), (1, 10)):
        params, buffers = split_state(pipeline.build_model("digits-vit", seed=10 * run + step))
        checkpoints.append(Checkpoint(step=step, lr=1e-2, run=run, params=params, buffers=buffers))
    found, reversed_ = (
        pipeline.score_pairs(model, order, pairs, batches, Settings(estimator="unrolled"))
        for order in (checkpoints, checkpoints[::-1])
    )
    for name in ("utility", "score", "terms", "loss", "similarity"):
        assert torch.equal(getattr(found, name), getattr(reversed_, name)), name


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="expected a run's folder"):
        pipeline.open_scores(str(tmp_path))

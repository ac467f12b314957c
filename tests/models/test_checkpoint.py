"""Checkpoint files: exact round trips, equal bytes, and one clear line for each way a file can be wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline.errors import InputError
from pipeline.models.checkpoint import (
    METADATA_KEY,
    excluded_from_decay,
    load_checkpoint,
    save_checkpoint,
    serialise_checkpoint,
)
from pipeline.models.clip import PairModel, build_model, split_state
from pipeline.models.manifest import Manifest, ManifestEntry
from pipeline.models.takeover import import_checkpoints
from pipeline.store.tensors import parse_tensors
from pipeline.types import AdamState, Checkpoint, Tree


@pytest.fixture(scope="module")
def model() -> PairModel:
    return build_model("tiny-resnet", seed=1)


def like(tree: Tree, seed: int) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) for name, value in tree.items()}


def adam_checkpoint(model: PairModel) -> Checkpoint:
    params, buffers = split_state(model)
    adam = AdamState(steps=7, exp_avg=like(params, 1), exp_avg_sq=like(params, 2), beta1=0.9, beta2=0.98, eps=1e-6)
    return Checkpoint(step=7, lr=0.1 + 0.2, run=2, params=params, buffers=buffers, adam=adam)


def assert_equal_trees(left: Tree, right: Tree) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype
        assert torch.equal(value, right[name]), name


def test_everything_comes_back(model: PairModel, tmp_path: Path) -> None:
    first = adam_checkpoint(model)
    save_checkpoint(str(tmp_path / "a.safetensors"), first)
    again = load_checkpoint(str(tmp_path / "a.safetensors"), model)
    assert (again.step, again.lr, again.run) == (7, 0.1 + 0.2, 2)
    assert again.adam is not None
    assert first.adam is not None
    assert (again.adam.steps, again.adam.beta1, again.adam.beta2, again.adam.eps) == (7, 0.9, 0.98, 1e-6)
    for left, right in (
        (first.params, again.params),
        (first.buffers, again.buffers),
        (first.adam.exp_avg, again.adam.exp_avg),
        (first.adam.exp_avg_sq, again.adam.exp_avg_sq),
    ):
        assert_equal_trees(left, right)
    assert again.momentum is None


def test_momentum_comes_back_also_over_s3(model: PairModel, s3_bucket: Any) -> None:
    first = replace(adam_checkpoint(model), adam=None, momentum=like(split_state(model)[0], 3), gain=5.0)
    save_checkpoint(f"{s3_bucket.url}/a.safetensors", first)
    again = load_checkpoint(f"{s3_bucket.url}/a.safetensors")
    assert again.adam is None
    assert first.momentum is not None
    assert again.momentum is not None
    assert_equal_trees(first.momentum, again.momentum)
    assert again.gain == 5


def test_buffers_alone_do_not_say_of_what_momentum_they_are(model: PairModel, tmp_path: Path) -> None:
    momentum = like(split_state(model)[0], 3)
    save_checkpoint(str(tmp_path / "a"), replace(adam_checkpoint(model), adam=None, momentum=momentum))
    header = json.dumps({"step": 7, "lr": 0.1, "run": 0, "momentum": True})
    tensors, _ = parse_tensors((tmp_path / "a").read_bytes())
    safetensors.torch.save_file(tensors, tmp_path / "b.safetensors", metadata={METADATA_KEY: header})
    assert load_checkpoint(str(tmp_path / "b.safetensors")).gain is None


def test_equal_checkpoints_give_equal_bytes(model: PairModel) -> None:
    first = adam_checkpoint(model)
    shuffled = replace(first, params=dict(reversed(first.params.items())))
    assert serialise_checkpoint(first) == serialise_checkpoint(first) == serialise_checkpoint(shuffled)


def test_parameters_come_in_one_order_whoever_reads_them(model: PairModel, tmp_path: Path) -> None:
    save_checkpoint(str(tmp_path / "a.safetensors"), adam_checkpoint(model))
    read = load_checkpoint(str(tmp_path / "a.safetensors"))
    assert read.adam is not None
    for tree in (read.params, read.adam.exp_avg, read.adam.exp_avg_sq):
        assert list(tree) == sorted(split_state(model)[0])


def test_plain_safetensors_need_a_step_and_a_rate(model: PairModel, tmp_path: Path) -> None:
    path = str(tmp_path / "plain.safetensors")
    safetensors.torch.save_file(model.state_dict(), path)
    with pytest.raises(InputError, match="checkpoint_steps"):
        load_checkpoint(path, model)
    checkpoint = load_checkpoint(path, model, step=40, lr=1e-4)
    assert (checkpoint.step, checkpoint.lr, checkpoint.adam) == (40, 1e-4, None)
    assert_equal_trees(checkpoint.params, split_state(model)[0])
    assert_equal_trees(checkpoint.buffers, split_state(model)[1])


def open_clip_file(model: PairModel, path: Path, optimizer: dict[str, Any] | None, prefix: str = "module.") -> str:
    tree: dict[str, Any] = {
        "epoch": 3,
        "name": "x",
        "state_dict": {prefix + k: v for k, v in model.state_dict().items()},
    }
    torch.save(tree if optimizer is None else tree | {"optimizer": optimizer}, path)
    return str(path)


def optimizer_state(model: PairModel, lr: Any) -> dict[str, Any]:
    """The state dict of an optimizer with open_clip's two groups; exp_avg of each parameter is filled with a number
    that tells which one it is."""
    named = list(model.named_parameters())
    groups = [
        [p for n, p in named if excluded_from_decay(n, p)],
        [p for n, p in named if not excluded_from_decay(n, p)],
    ]
    optimizer = torch.optim.AdamW([{"params": g} for g in groups], lr=1e-3, betas=(0.8, 0.95), eps=1e-5)
    for number, (_, parameter) in enumerate(named):
        optimizer.state[parameter] = {
            "step": torch.tensor(12.0),
            "exp_avg": torch.full_like(parameter, number),
            "exp_avg_sq": torch.full_like(parameter, number + 0.5),
        }
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = lr
    return state


@pytest.mark.parametrize("prefix", ["module.", "", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("lr", [3e-4, np.float64(3e-4), np.float32(3e-4)])
def test_adams_state_finds_its_names(model: PairModel, tmp_path: Path, prefix: str, lr: Any) -> None:
    path = open_clip_file(model, tmp_path / "epoch_3.pt", optimizer_state(model, lr), prefix)
    checkpoint = load_checkpoint(path, model)
    assert checkpoint.lr == pytest.approx(3e-4)
    assert type(checkpoint.lr) is float
    assert checkpoint.step == 12
    assert checkpoint.adam is not None
    assert (checkpoint.adam.beta1, checkpoint.adam.beta2, checkpoint.adam.eps) == (0.8, 0.95, 1e-5)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        assert torch.equal(checkpoint.adam.exp_avg[name], torch.full_like(parameter, number)), name
        assert torch.equal(checkpoint.adam.exp_avg_sq[name], torch.full_like(parameter, number + 0.5)), name


def test_without_adams_state_the_step_must_be_given(model: PairModel, tmp_path: Path) -> None:
    path = open_clip_file(model, tmp_path / "e.pt", None)
    with pytest.raises(InputError, match="checkpoint_steps"):
        load_checkpoint(path, model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.2).state_dict()
    checkpoint = load_checkpoint(open_clip_file(model, tmp_path / "s.pt", sgd), model, step=5)
    assert (checkpoint.step, checkpoint.lr, checkpoint.adam, checkpoint.gain) == (5, 0.2, None, 1.0)
    for options, gain in (({}, 10), ({"nesterov": True}, 10), ({"dampening": 0.9}, 1)):
        sgd = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, **options).state_dict()
        imported = load_checkpoint(open_clip_file(model, tmp_path / "m.pt", sgd), model, step=5)
        assert imported.gain == pytest.approx(gain)


def test_half_precision_weights_become_float32(model: PairModel, tmp_path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "half.safetensors")
    checkpoint = load_checkpoint(str(tmp_path / "half.safetensors"), model, step=1, lr=1.0)
    assert {value.dtype for value in checkpoint.params.values()} == {torch.float32}


class Unsafe:
    def __reduce__(self) -> tuple[Any, ...]:
        raise_flag: tuple[Any, ...] = (print, ("executed",))
        return raise_flag


def test_wrong_files_are_one_clear_line(model: PairModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = str(tmp_path / "ours.safetensors")
    save_checkpoint(ours, adam_checkpoint(model))
    whole = open_clip_file(model, tmp_path / "whole.pt", optimizer_state(model, 1e-3))
    other = build_model("tiny-vit")
    cases: list[tuple[str, PairModel, str]] = [
        (ours, other, "differ in"),
        (whole, other, "lacks"),
        (str(tmp_path / "absent.pt"), model, "No such file"),
        (str(tmp_path / "absent.safetensors"), model, "No such file"),
    ]
    for source in (ours, whole):
        cut = tmp_path / f"cut-{Path(source).name}"
        data = Path(source).read_bytes()
        cut.write_bytes(data[: len(data) // 2])
        cases.append((str(cut), model, "whole"))
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    cases += [(str(tmp_path / "empty.pt"), model, "whole"), (str(tmp_path / "empty.safetensors"), model, "whole")]
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weights": 1}, tmp_path / "keys.pt")
    torch.save({"state_dict": {}, "evil": Unsafe()}, tmp_path / "unsafe.pt")
    cases += [
        (str(tmp_path / "list.pt"), model, "found list"),
        (str(tmp_path / "keys.pt"), model, "weights"),
        (str(tmp_path / "unsafe.pt"), model, "plain values"),
    ]
    state = optimizer_state(model, 1e-3)
    state["param_groups"][0]["params"].pop()
    cases.append((open_clip_file(model, tmp_path / "groups.pt", state), model, "two groups"))
    state = optimizer_state(model, 1e-3)
    state["state"][0]["exp_avg"] = torch.zeros(3, 3, 3)
    cases.append((open_clip_file(model, tmp_path / "moment.pt", state), model, "exp_avg of"))
    for name, key in (("rate", "lr"), ("betas", "betas")):
        state = optimizer_state(model, 1e-3)
        del state["param_groups"][0][key]
        cases.append((open_clip_file(model, tmp_path / f"{name}.pt", state), model, f"trainer: KeyError: '{key}'"))
    torch.save({"state_dict": dict.fromkeys(model.state_dict(), "x")}, tmp_path / "text.pt")
    cases.append((str(tmp_path / "text.pt"), model, "of ours or of open_clip's trainer"))
    metadata = {METADATA_KEY: '{"lr": 1}'}
    safetensors.torch.save_file({"params/a": torch.zeros(1)}, tmp_path / "header.safetensors", metadata)
    cases.append((str(tmp_path / "header.safetensors"), model, "of ours or of open_clip's trainer: KeyError: 'step'"))
    wrong_shape = adam_checkpoint(model)
    wrong_shape.params = wrong_shape.params | {"logit_scale": torch.zeros(2)}
    save_checkpoint(str(tmp_path / "shape.safetensors"), wrong_shape)
    cases.append((str(tmp_path / "shape.safetensors"), model, "logit_scale to have the shape"))
    for path, of, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            load_checkpoint(path, of)
        assert "\n" not in str(caught.value)
        assert path in str(caught.value)
    assert "executed" not in capsys.readouterr().out


def test_a_manifest_moves_with_its_folder(model: PairModel, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save_checkpoint(str(folder / "run-000" / "s.safetensors"), adam_checkpoint(model))
    entries = (
        ManifestEntry(str(folder / "run-000" / "s.safetensors"), 7, 0.25, 0, seed=4),
        ManifestEntry("s3://elsewhere/t.safetensors", 9, 0.125, 1),
    )
    manifest = Manifest(100, "adamw", entries)
    manifest.write(str(folder / "manifest.json"))
    assert Manifest.read(str(folder / "manifest.json")) == manifest
    folder.rename(tmp_path / "moved")
    moved = Manifest.read(str(tmp_path / "moved" / "manifest.json"))
    assert moved.runs == [0, 1]
    loaded = moved.of_run(0)[0].load(model)
    assert (loaded.step, loaded.lr, loaded.run) == (7, 0.25, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "manifest"),
        ("[]", "dataset_size"),
        ('{"dataset_size": 3, "optimizer": "sgd", "checkpoints": []}', "at least one"),
        ('{"dataset_size": 3, "optimizer": "sgd", "checkpoints": [{"path": "x", "step": 3}]}', "lr"),
    ],
)
def test_a_broken_manifest_is_one_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=message):
        Manifest.read(str(tmp_path / "manifest.json"))


def test_imported_checkpoints_keep_their_manifest(model: PairModel, tmp_path: Path) -> None:
    path = str(tmp_path / "source" / "s.safetensors")
    save_checkpoint(path, adam_checkpoint(model))
    entries = (ManifestEntry(path, 7, 0.5, 0), ManifestEntry(path, 7, 0.25, 1))
    Manifest(55, "adamw", entries).write(str(tmp_path / "source" / "manifest.json"))
    imported = import_checkpoints([str(tmp_path / "source" / "manifest.json")], model, str(tmp_path / "out"), 1)
    assert (imported.dataset_size, [(e.run, e.lr) for e in imported.checkpoints]) == (55, [(0, 0.5), (1, 0.25)])
    assert Manifest.read(str(tmp_path / "out" / "manifest.json")) == imported
    with pytest.raises(InputError, match="two of step 7"):
        import_checkpoints([path, path], model, str(tmp_path / "twice"), 1)
    plain = str(tmp_path / "plain.safetensors")
    safetensors.torch.save_file(model.state_dict(), plain)
    two = import_checkpoints([plain, plain], model, str(tmp_path / "plain"), 9, steps=[2, 1], rates=[0.1, 0.2])
    assert [(e.step, e.lr) for e in two.checkpoints] == [(1, 0.2), (2, 0.1)]
    assert two.optimizer == "sgd"
    with pytest.raises(InputError, match="in some"):
        import_checkpoints([path, plain], model, str(tmp_path / "mixed"), 9, steps=[2, 1], rates=[0.1, 0.2])

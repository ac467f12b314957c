"""What open_clip's own trainer writes is read back with the right names, rate and optimizer state."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipeline.models.checkpoint import load_checkpoint
from pipeline.models.clip import build_model
from pipeline.models.takeover import import_checkpoints
from tests.helpers import write_shards

CONFIG = Path(__file__).parents[2] / "pipeline" / "models" / "configs" / "tiny-vit.json"

# Runs open_clip_train.main and, independently of its files, notes the final parameters and Adam's state by name.
TRAINER = """
import sys
from pipeline.models import compat
import open_clip, safetensors.torch, torch
import open_clip_train.main as trainer

config, dump, *arguments = sys.argv[1:]
open_clip.add_model_config(config)
seen = {}
create, adamw = trainer.create_model_and_transforms, torch.optim.AdamW
def create_and_note(*args, **kwargs):
    made = create(*args, **kwargs)
    seen["model"] = made[0]
    return made
class NotedAdamW(adamw):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        seen["optimizer"] = self
trainer.create_model_and_transforms = create_and_note
trainer.optim.AdamW = NotedAdamW
trainer.main(arguments)
tensors = {}
for name, parameter in seen["model"].named_parameters():
    tensors["params/" + name] = parameter.detach().clone()
    for kind in ("exp_avg", "exp_avg_sq"):
        tensors[kind + "/" + name] = seen["optimizer"].state[parameter][kind].clone()
tensors["lr"] = torch.tensor(float(seen["optimizer"].param_groups[0]["lr"]), dtype=torch.float64)
safetensors.torch.save_file(tensors, dump)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of four steps each on 16 pairs."""
    folder = tmp_path_factory.mktemp("open-clip")
    shards = write_shards(folder / "shards")
    arguments = (
        f"--model tiny-vit --train-data {'::'.join(shards)} --train-num-samples 16 --dataset-type webdataset "
        f"--batch-size 4 --epochs 2 --lr 1e-3 --warmup 2 --wd 0.2 --beta2 0.97 --eps 1e-7 --workers 1 --seed 3 "
        f"--precision fp32 --device cpu --logs {folder / 'logs'} --name run"
    ).split()
    done = subprocess.run(
        [sys.executable, "-c", TRAINER, str(CONFIG), str(folder / "truth.safetensors"), *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_an_epoch_file_of_open_clips_trainer(trained: Path) -> None:
    truth = safetensors.torch.load_file(trained / "truth.safetensors")
    model = build_model("tiny-vit")
    checkpoint = load_checkpoint(str(trained / "logs/run/checkpoints/epoch_2.pt"), model)
    assert checkpoint.step == 8
    assert checkpoint.lr == pytest.approx(float(truth["lr"]), rel=1e-12)
    assert 0 < checkpoint.lr < 1e-4
    assert checkpoint.adam is not None
    assert (checkpoint.adam.steps, checkpoint.adam.beta1, checkpoint.adam.beta2) == (8, 0.9, 0.97)
    assert checkpoint.adam.eps == 1e-7
    names = [name for name, _ in model.named_parameters()]
    for kind, tree in (
        ("params", checkpoint.params),
        ("exp_avg", checkpoint.adam.exp_avg),
        ("exp_avg_sq", checkpoint.adam.exp_avg_sq),
    ):
        assert set(tree) == set(names)
        for name in names:
            assert torch.equal(tree[name], truth[f"{kind}/{name}"]), (kind, name)


def test_its_files_become_a_manifest_of_ours(trained: Path, tmp_path: Path) -> None:
    files = [str(trained / f"logs/run/checkpoints/epoch_{n}.pt") for n in (2, 1)]
    model = build_model("tiny-vit")
    manifest = import_checkpoints(files, model, str(tmp_path), dataset_size=16)
    assert (manifest.dataset_size, manifest.optimizer) == (16, "adamw")
    assert [entry.step for entry in manifest.checkpoints] == [4, 8]
    # open_clip's cosine after 2 steps of warm-up, in the 4th of 8 steps:
    assert manifest.checkpoints[0].lr == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 1 / 6)))
    ours, theirs = manifest.checkpoints[1].load(model), load_checkpoint(files[0], model)
    assert all(torch.equal(ours.params[name], theirs.params[name]) for name in theirs.params)

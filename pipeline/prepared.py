"""What the directions stage leaves in a run's folder for the scoring actors: settings, decoded batches, plans."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import safetensors.torch

from pipeline.config import Config
from pipeline.data.decode import ImageSpec
from pipeline.influence.plan import ProbePlan
from pipeline.influence.regressor import Regressor
from pipeline.influence.settings import Batches, Settings
from pipeline.run import RunFolder
from pipeline.store import marks, storage
from pipeline.store.tensors import parse_tensors
from pipeline.types import PairBatch

_METADATA_KEY = "diffprune.plan"

#: Estimators whose projected forms draw random vectors.
_DRAWN = ("diff-in-self", "tracin-self", "grand")


def settings_of(config: Config) -> Settings:
    """The part of a config that decides the mathematics of a score."""
    score = config.score
    return Settings(
        estimator=score.estimator,
        method=score.method,
        family=config.proxy.loss,
        loss=score.loss,
        target_loss=config.target.loss,
        equal_captions=config.reference.equal_captions,
        parameters=score.parameters,
        precondition=score.precondition,
        projections=score.projections,
        eigenpairs=score.eigenpairs,
        self_form=score.self_form,
        replay=score.replay,
        precision=score.precision,
        chunk=score.batch_size,
        seed=config.seed,
    )


def score_basis(config: Config, batches: Batches, images: ImageSpec) -> dict[str, Any]:
    """What decides a run's scores beside config and checkpoints, as plain values for `score_fingerprint`.

    Args:
        config: its settings of the mathematics count, except the size of a pass, which changes no score.
        batches: R, B and V; their pairs' ids count.
        images: the model's input.
    """
    settings = asdict(settings_of(config))
    del settings["chunk"], settings["target_loss"]
    digests = {name: _pairs_digest(getattr(batches, name)) for name in Batches.__slots__}
    # Directions of earlier versions hold Gaussian vectors: what is scored along these is never mixed with the new.
    draws = {"draws": "signs"} if config.score.estimator in _DRAWN and config.score.self_form == "projected" else {}
    return {"score": settings | config.target.of_loss, **digests, **draws, "images": asdict(images)}


def _pairs_digest(pairs: PairBatch) -> str:
    return storage.checksum(pairs.ids.numpy().astype("<i8").tobytes())


def batches_url(root: str) -> str:
    """Where R, B and V of a run are kept, decoded."""
    return storage.join(root, "directions", "batches.safetensors")


def save_batches(root: str, batches: Batches) -> str:
    """Write the decoded batches, so that each worker reads a few MB instead of shards; returns the file's checksum."""
    tensors = {
        f"{name}/{field}": getattr(getattr(batches, name), field).contiguous()
        for name in Batches.__slots__
        for field in PairBatch.__slots__
    }
    data = safetensors.torch.save(tensors)
    storage.write_bytes(batches_url(root), data)
    return storage.checksum(data)


def load_batches(root: str) -> Batches:
    """The inverse of `save_batches`."""
    tensors, _ = parse_tensors(storage.read_bytes(batches_url(root)))
    return Batches(
        *(PairBatch(*(tensors[f"{name}/{field}"] for field in PairBatch.__slots__)) for name in Batches.__slots__)
    )


def plan_url(root: str, number: int) -> str:
    """Where the directions of checkpoint `number` (its place in the manifest) are kept."""
    return storage.join(root, "directions", f"{number:05d}.safetensors")


def save_plan(root: str, number: int, plan: ProbePlan) -> str:
    """Write a checkpoint's plan: its vectors as tensors, its probes as metadata; returns the checksum of its file."""
    tensors, rest = plan.to_tensors()
    data = safetensors.torch.save(tensors, metadata={_METADATA_KEY: rest})
    storage.write_bytes(plan_url(root, number), data)
    return storage.checksum(data)


def load_plan(root: str, number: int) -> ProbePlan:
    """The inverse of `save_plan`."""
    tensors, metadata = parse_tensors(storage.read_bytes(plan_url(root, number)))
    return ProbePlan.from_tensors(tensors, metadata[_METADATA_KEY])


def save_regressor(root: str, regressor: Regressor) -> str:
    """Write what scores are predicted with; returns the checksum of its file."""
    tensors, rest = regressor.to_tensors()
    data = safetensors.torch.save(tensors, metadata={_METADATA_KEY: rest})
    storage.write_bytes(RunFolder(root).regressor, data)
    return storage.checksum(data)


def load_regressor(root: str, checksum: str) -> Regressor:
    """The inverse of `save_regressor`, which returned `checksum`. Raises as `marks.read_committed`."""
    run = RunFolder(root)
    tensors, metadata = parse_tensors(marks.read_committed(run.regressor, run.regressor_mark, checksum))
    return Regressor.from_tensors(tensors, metadata[_METADATA_KEY])

"""Makes a run's folder ready to be scored: inventory, checkpoints of a tiny proxy, directions. No Ray."""

from __future__ import annotations

import numpy as np
import pytest
import ray
import torch

from pipeline.config import Config, parse_config
from pipeline.data.decode import Decoder
from pipeline.data.inventory import ShardInfo, inspect_shard, write_inventory
from pipeline.data.sampling import load_pairs
from pipeline.engine import shard_scorer
from pipeline.engine.scorer_spec import score_fingerprint
from pipeline.influence import Batches, prepare
from pipeline.models.checkpoint import save_checkpoint
from pipeline.models.clip import build_model, split_state
from pipeline.models.manifest import Manifest, ManifestEntry
from pipeline.prepared import save_batches, save_plan, score_basis, settings_of
from pipeline.run import RunFolder
from pipeline.stages import calibration, training
from pipeline.stages.job import Job
from pipeline.store import marks, storage
from pipeline.store.fingerprint import Fingerprint
from pipeline.types import Checkpoint


def outside_ray(patch: pytest.MonkeyPatch) -> None:
    """Let what a task does be called in a process without Ray, as if it had one CPU and no GPU."""
    for module in (shard_scorer, calibration):
        patch.setattr(module, "reserved_here", lambda: ({"CPU": 1.0}, {"CPU": 1.0}))
    patch.setattr(ray, "get_gpu_ids", list)


def prepare_run(
    out: str, urls: list[str], *, runs: int = 1, checkpoints: int = 2, pairs: int = 6, **score: object
) -> tuple[Config, list[ShardInfo], Fingerprint]:
    """Fill the run folder `out` up to the score stage with random checkpoints; its config, inventory, fingerprint."""
    config = parse_config(
        {
            "out": out,
            "data": {"shards": urls},
            "proxy": {"model": "tiny-vit"},
            "score": {"estimator": "tracin", "batch_size": 5, **score},
            "engine": {"workers": 2, "cpus_per_worker": 1, "retry_wait": 0.05},
        }
    )
    run = RunFolder(out)
    infos = [inspect_shard(index, url) for index, url in enumerate(urls)]
    write_inventory(run.inventory, infos)
    model = build_model(config.proxy.model)
    decoder = Decoder(model.image_spec, model.tokenize, config.data.max_pixels)
    total = sum(info.samples for info in infos)
    some, _ = load_pairs(infos, np.arange(min(total, 3 * pairs)), decoder, "txt")
    batches = Batches(reference=some[:pairs], gradient=some[pairs : 2 * pairs], target=some[2 * pairs :])
    save_batches(out, batches)
    entries, digests = [], []
    settings = settings_of(config)
    for number in range(runs * checkpoints):
        step, own_run = 10 * (number % checkpoints + 1), number // checkpoints
        params, buffers = split_state(build_model(config.proxy.model, seed=number))
        checkpoint = Checkpoint(step, 0.1, own_run, {k: v.clone() for k, v in params.items()}, buffers)
        url = storage.join(run.checkpoints, f"{number:05d}.safetensors")
        save_checkpoint(url, checkpoint)
        entries.append(ManifestEntry(url, step, 0.1, own_run))
        digests.append(storage.file_checksum(url))
        plan = prepare(
            model,
            checkpoint,
            batches,
            settings,
            dataset_size=total,
            num_checkpoints=checkpoints,
            num_runs=runs,
        )
        save_plan(out, number, plan)
    Manifest(total, "adamw", tuple(entries)).write(run.checkpoint_manifest)
    mark, fingerprint = training._completion(Job(config))
    marks.write_mark(mark, fingerprint, {})
    torch.set_num_threads(1)
    return config, infos, score_fingerprint(config, digests, score_basis(config, batches, model.image_spec))

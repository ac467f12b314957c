"""Taking over checkpoints that exist: each is checked against the model and written in our form."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pipeline.errors import InputError
from pipeline.models.checkpoint import load_checkpoint, save_checkpoint
from pipeline.models.manifest import Manifest, ManifestEntry, by_run_and_step
from pipeline.store import storage


def import_checkpoints(
    sources: Sequence[str],
    model: nn.Module,
    folder: str,
    dataset_size: int,
    steps: Sequence[int] | None = None,
    rates: Sequence[float] | None = None,
) -> Manifest:
    """Take over existing checkpoints: each is checked against the model and written to `folder` in our form.

    What vouches for checkpoints that were there before, the list of them and the records of runs that were trained
    here, is removed before they are replaced.

    Args:
        sources: files of open_clip's trainer or safetensors, or one `manifest.json`.
        model: what they are checkpoints of.
        folder: where the copies and `manifest.json` (last) go.
        dataset_size: pairs that the run was trained on; a manifest given as the source knows it itself.
        steps: the step of each, for plain safetensors.
        rates: the rate of each, for plain safetensors.

    Raises `InputError`, also for two checkpoints of the same run and step.
    """
    if len(sources) == 1 and sources[0].endswith(".json"):
        listed = Manifest.read(sources[0])
        dataset_size = listed.dataset_size
        checkpoints = (entry.load(model) for entry in listed.checkpoints)
    else:
        checkpoints = (
            load_checkpoint(source, model, step=steps[i] if steps else None, lr=rates[i] if rates else None)
            for i, source in enumerate(sources)
        )
    manifest_url = storage.join(folder, "manifest.json")
    storage.remove(manifest_url)
    entries: dict[tuple[int, int], ManifestEntry] = {}
    optimizers = set()
    for checkpoint in checkpoints:
        key = (checkpoint.run, checkpoint.step)
        if key in entries:
            raise InputError(f"expected one checkpoint per step, found two of step {checkpoint.step}")
        run_folder = storage.join(folder, f"run-{checkpoint.run:03d}")
        for url in storage.list_files(run_folder, ".json"):
            storage.remove(url)
        path = storage.join(run_folder, f"step-{checkpoint.step:08d}.safetensors")
        save_checkpoint(path, checkpoint)
        entries[key] = ManifestEntry(path, checkpoint.step, checkpoint.lr, checkpoint.run)
        optimizers.add("adamw" if checkpoint.adam is not None else "sgd")
    if len(optimizers) > 1:
        raise InputError("expected Adam's state in all checkpoints or in none, found it in some")
    manifest = Manifest(dataset_size, optimizers.pop(), by_run_and_step(entries.values()))
    manifest.write(manifest_url)
    return manifest

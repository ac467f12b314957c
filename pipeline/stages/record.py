"""`config.yaml`: the resolved config that made what is in a run's folder, with versions and the git revision."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import yaml

from pipeline.engine.progress import say
from pipeline.stages.job import Job
from pipeline.stages.scoring import known_fingerprint
from pipeline.store import storage
from pipeline.store.fingerprint import Fingerprint

_PACKAGES = ("diffprune", "torch", "ray", "open_clip_torch", "webdataset", "pyarrow", "faiss-cpu", "timm", "pillow")

#: Those that decide numbers: models, pixels and arithmetic.
_DECISIVE = ("diffprune", "torch", "open_clip_torch", "timm", "pillow")


def begin_record(job: Job) -> None:
    """Write `config.yaml` where there is none."""
    if not storage.exists(job.folder.config):
        _write(job, None)


def say_other_versions(job: Job) -> None:
    """Print one line where a run goes on with other versions than those recorded: what it adds may differ a little."""
    try:
        versions = yaml.safe_load(storage.read_bytes(job.folder.config))["versions"]
        before = {name: str(versions[name]) for name in _DECISIVE if versions.get(name)}
    except (FileNotFoundError, yaml.YAMLError, TypeError, KeyError, AttributeError):  # none, or none that can be read
        return
    now = {name: str(_version(name)) for name in before}
    if before != now:
        others = ", ".join(
            f"{name} {before[name]} then, {now[name]} now" for name in before if before[name] != now[name]
        )
        say("engine", f"warning: what is in {job.folder.root} was begun with other versions: {others}")


def record_config(job: Job, stage: str) -> None:
    """Write `config.yaml` when a stage up to the scores is complete, unless the next one has begun before.

    So it is the record of what made the scores once there are any, and what is chosen from them leaves it alone. Its
    fingerprint is theirs, null before the directions are complete.
    """
    folder = job.folder
    made_next = {
        "inventory": (folder.checkpoints,),
        "train": (folder.directions,),
        "directions": (folder.sample, folder.scores),
        "score": (),
    }
    if stage not in made_next:
        return
    if not storage.exists(folder.config) or not any(storage.exists(url) for url in made_next[stage]):
        _write(job, known_fingerprint(job) if stage in ("directions", "score") else None)


def _write(job: Job, fingerprint: Fingerprint | None) -> None:
    record = {
        "config": job.config.model_dump(mode="json"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "git_revision": git_revision(str(Path(__file__).resolve().parents[1])),
        "fingerprint": fingerprint.digest if fingerprint else None,
    }
    storage.write_bytes(job.folder.config, yaml.safe_dump(record, sort_keys=False).encode())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_revision(package: str) -> str | None:
    """The commit that the folder of a package is checked out at; None where git does not track it.

    An environment may lie within the checkout of another project, which does not track what is installed there.
    """
    tracked = _git(package, "ls-files", "__init__.py")
    return _git(package, "rev-parse", "HEAD") if tracked else None


def _git(folder: str, *arguments: str) -> str | None:
    command = ["git", "-C", folder, *arguments]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None

"""Where a config differs from the scores and the selection that a stage uses."""

from __future__ import annotations

from typing import Any

from pipeline.config import Config, TargetConfig
from pipeline.data.shards import expand
from pipeline.engine.progress import say
from pipeline.errors import ConfigError
from pipeline.selection.summary import read_summary
from pipeline.stages.job import Job
from pipeline.store.commits import read_marks
from pipeline.store.fingerprint import Fingerprint, name_differences

#: Keys of `data` that decide scores.
_DATA = ("caption", "max_pixels", "draft", "source")
#: Keys of the config by their names in the `score` part of a score's fingerprint, where these are not the same.
_KEYS = {
    "family": "proxy.loss",
    "equal_captions": "reference.equal_captions",
    "target_loss": "target.loss",
    "seed": "seed",
}


def say_other_scores(job: Job, stage: str) -> None:
    """Print one line where the scores were made with an estimator, settings or shards that are not the config's.

    The score stage refuses such scores; the stages after it take those that are there.
    """
    mark = next(read_marks(job.folder), None)
    found = (_other_settings(job.config, mark.parts) if mark is not None else []) + _other_shards(job)[:1]
    if found:
        others = name_differences(found)
        say(stage, f"warning: the scores used were made with other settings than the config's: {others}")


def say_other_selection(job: Job, stage: str) -> None:
    """Print one line where the selection of this name was made with settings that are not the config's."""
    selection = read_summary(job.folder, job.config.select.name)
    now = {"select": job.config.select.model_dump(mode="json"), "seed": job.config.seed}
    found = Fingerprint(now).differences({"select": selection.config, "seed": selection.seed})
    if found:
        name = selection.name
        say(stage, f"warning: {name!r} was selected with other settings than the config's: {name_differences(found)}")


def _other_shards(job: Job) -> list[str]:
    """Where the config names other shards than were counted; nothing where those it names are gone."""
    try:
        now = expand(job.config.data.shards)
    except ConfigError:
        return []
    return Fingerprint({"data.shards": now}).differences({"data.shards": [info.url for info in job.inventory]})


def _other_settings(config: Config, parts: dict[str, Any]) -> list[str]:
    """Where the settings in a score's fingerprint differ from the config's; those that it lacks are passed over."""
    now: dict[str, Any] = {f"score.{name}": value for name, value in config.score.model_dump(mode="json").items()}
    now |= {f"data.{name}": getattr(config.data, name) for name in _DATA}
    now |= {"proxy.loss": config.proxy.loss, "reference.equal_captions": config.reference.equal_captions}
    now |= {"target.loss": config.target.loss, "seed": config.seed}
    score = parts.get("score", {})
    if score:
        score = {"target_loss": TargetConfig().loss, **score}
    there = {_KEYS.get(name, f"score.{name}"): value for name, value in score.items()}
    if "preprocessing" in parts:
        there |= {f"data.{name}": value for name, value in {"draft": None, **parts["preprocessing"]}.items()}
    both = now.keys() & there.keys()
    return Fingerprint({name: now[name] for name in both}).differences({name: there[name] for name in both})

"""A first config for someone's own shards: chosen after a look at shards and machine, every key explained."""

from __future__ import annotations

import math
import os
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import BaseModel

from pipeline.config import Config, DataConfig, ProxyConfig, ReferenceConfig, Shards, TargetConfig, parse_config
from pipeline.data.shards import expand
from pipeline.errors import ConfigError
from pipeline.inspecting import Inspection, first_problem, inspect_shards
from pipeline.reference import meaning, section_of
from pipeline.selection.tasks import usable_cpus
from pipeline.store import storage
from pipeline.text import count, percent, plural, size

#: Width of the comments.
WIDTH = 100
#: Share of repeated captions from which on they are taken for classes.
CLASSES = 0.3
#: Steps below which a proxy has hardly learnt anything.
FEWEST_STEPS = 300
#: Json keys that captions and sources are usually found under, in order of preference.
CAPTION_KEYS = ("caption", "text", "TEXT", "alt", "title", "description")
SOURCE_KEYS = ("url", "source", "domain", "page_url", "image_url", "URL")


@dataclass(frozen=True)
class Machine:
    """What a machine has to work with; memory in bytes; whether its GPUs multiply bfloat16."""

    cpus: int
    memory: int
    gpus: int = 0
    gpu: str = ""
    bfloat16: bool = False

    def __str__(self) -> str:
        gpus = f"{plural(self.gpus, 'GPU')} ({self.gpu})" if self.gpus else "no GPU"
        return f"{plural(self.cpus, 'CPU')}, {size(self.memory)} of memory, {gpus}"


@dataclass
class Choices:
    """Values that differ from the defaults, by dotted key, each with its reason."""

    values: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def choose(self, key: str, value: Any, why: str) -> None:
        """Set a key."""
        self.values[key] = value
        self.reasons[key] = why


def look_at_machine() -> Machine:
    """What this machine has: CPUs that this process may use, memory, GPUs."""
    import torch

    cpus = usable_cpus()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        return Machine(cpus, memory)
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Machine(cpus, memory, gpus, torch.cuda.get_device_name(0), bfloat16)


def write_config(path: str, shards: Shards, *, machine: Machine | None = None, out: str | None = None) -> Inspection:
    """Look at shards and write a commented config to `path`; returns what was found in the shards.

    Raises `ConfigError` when something is at `path` already or `shards` names nothing, `InputError` when no pair of
    the shards can be used.
    """
    if storage.exists(path):
        raise ConfigError(
            "there is a file of this name already, which is not overwritten: expected another name", file=path
        )
    text, found = draft_config(shards, machine=machine, out=out, name=path)
    storage.write_bytes(path, text.encode())
    return found


def draft_config(
    shards: Shards, *, machine: Machine | None = None, out: str | None = None, name: str = "my.yaml"
) -> tuple[str, Inspection]:
    """The text of a commented config for these shards, and what was found in them (errors as `write_config`)."""
    machine = machine or look_at_machine()
    caption, found = _find_captions(shards)
    choices = _choose(shorten(shards), caption, found, machine, out)
    tree = _nested(choices.values)
    parse_config(tree, file=name)  # what is offered must be valid
    about = f"{'' if found.exact else 'about '}{plural(found.samples, 'pair')} in {plural(len(found.urls), 'shard')}"
    head = [
        f"# {about}, {size(sum(found.sizes))}; {machine}.",
        "# Keys that keep their defaults are commented out.",
        f"# Start with: diffprune run {shlex.quote(name)}",
        "",
    ]
    return "\n".join([*head, *_section(Config, "", choices, 0)]).rstrip() + "\n", found


def shorten(shards: Shards) -> Shards:
    """A list that a shell made of a pattern, turned back into that pattern if it names exactly the same files."""
    if isinstance(shards, str) or len(shards) < 3:
        return shards[0] if isinstance(shards, list) and len(shards) == 1 else shards
    folders = {os.path.dirname(url) for url in shards}
    endings = {os.path.basename(url).partition(".")[2] for url in shards}
    if len(folders) == len(endings) == 1:
        pattern = os.path.join(folders.pop(), f"*.{endings.pop()}")
        if expand(pattern) == sorted(expand(shards)):
            return pattern
    return shards


def _find_captions(shards: Shards) -> tuple[str, Inspection]:
    """Where the captions are: `txt`, or the json key under which most pairs have one."""
    found = inspect_shards(DataConfig(shards=shards), examples=0)
    best = ("txt", found)
    if found.status["no-caption"] > found.looked_at / 2:
        keys = [key for key in CAPTION_KEYS if found.json_keys[key]]
        for key in keys:
            other = inspect_shards(DataConfig(shards=shards, caption=f"json:{key}"), examples=0)
            if other.status["ok"] > best[1].status["ok"]:
                best = (f"json:{key}", other)
    problem = first_problem(best[1])
    if problem is not None:
        raise problem
    return best


def _choose(shards: Shards, caption: str, found: Inspection, machine: Machine, out: str | None) -> Choices:
    pairs = found.samples
    chosen = Choices()
    if out is not None:
        chosen.choose("out", out, "as asked for")
    chosen.choose("data.shards", shards, f"{plural(len(found.urls), 'shard')}")
    if caption != "txt":
        chosen.choose("data.caption", caption, "the samples have no txt member; most have a string here")
    source = next((key for key in SOURCE_KEYS if found.json_keys[key]), None)
    if source not in (None, "url"):
        chosen.choose("data.source", source, "the samples' json has this key")
    chosen.choose(
        "target.loss",
        "margin",
        "how well the target's pairs match. The target's loss, the paper's choice and the default, depends on the "
        "model's confidence, too, and its influences carried over to other seeds less (docs/validation.md)",
    )
    target, reference = TargetConfig(), ReferenceConfig()
    for key, default, share in (
        ("target.pairs", target.pairs, 10),
        ("reference.pairs", reference.pairs, 8),
        ("reference.gradient_pairs", reference.gradient_pairs, 4),
    ):
        if pairs < default * share:
            chosen.choose(key, max(pairs // share, 1), f"one in {share} of {count(pairs)} pairs")
    classes = found.repeated >= CLASSES
    repeats = f"{percent(found.repeated, 0)} of the captions repeat"
    if classes:
        chosen.choose(
            "reference.equal_captions", "ignore", f"{repeats}: pairs with the same caption are not treated as negatives"
        )
    _choose_proxy(chosen, pairs, machine)
    if classes:
        chosen.choose("select.balance.by", "caption", f"{repeats}: quotas keep each caption represented")
    return chosen


def _choose_proxy(chosen: Choices, pairs: int, machine: Machine) -> None:
    default = ProxyConfig()
    batch = default.batch_size
    if not machine.gpus:
        chosen.choose("proxy.model", "tiny-vit", "no GPU here; with one, an open_clip name such as ViT-B-32")
    if machine.bfloat16:
        chosen.choose("proxy.precision", "bf16", "mixed precision, as CLIP models are usually trained on such GPUs")
        chosen.choose("score.precision", "tf32", "fast on such GPUs, and rankings survive it")
    if pairs < 8 * batch:
        batch = max(8, 2 ** int(math.log2(max(pairs // 8, 8))))
        chosen.choose("proxy.batch_size", batch, f"an eighth of {count(pairs)} pairs")
    epochs = math.ceil(FEWEST_STEPS * batch / max(pairs, 1))
    if epochs > default.epochs:
        chosen.choose("proxy.epochs", min(epochs, 60), f"about {FEWEST_STEPS} steps of {batch} pairs")
    if pairs <= 50_000:
        chosen.choose("proxy.runs", 3, "one run's influence is mostly noise, and few pairs make several runs cheap")


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _section(section: type[BaseModel], prefix: str, choices: Choices, depth: int) -> Iterator[str]:
    """Lines of a section: prose after `# `, keys that keep their defaults after `#` alone, sections as they are."""
    pad = "  " * depth
    for name, info in section.model_fields.items():
        key = f"{prefix}{name}"
        inner = section_of(info.annotation)
        if inner is not None:
            if depth == 0:
                yield ""
            yield from _prose(inner.__doc__ or "", pad)
            yield f"{pad}{name}:"
            yield from _section(inner, f"{key}.", choices, depth + 1)
            continue
        yield from _prose(meaning(info), pad)
        if key in choices.values:
            yield from _prose(f"Chosen here: {choices.reasons[key]}.", pad)
            yield f"{pad}{name}: {_value(choices.values[key])}"
        else:
            default = info.get_default(call_default_factory=True, validated_data={})
            yield f"{pad}#{name}: {_value(default)}"


def _prose(text: str, pad: str) -> Iterator[str]:
    for line in textwrap.wrap(" ".join(text.split()), WIDTH - len(pad) - 2, break_long_words=False):
        yield f"{pad}# {line}"


def _value(value: Any) -> str:
    """A value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()

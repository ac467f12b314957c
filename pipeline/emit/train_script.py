"""`train.sh`: the open_clip command that trains on a selection."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import accumulate

from pipeline.emit.templates import render
from pipeline.store import storage
from pipeline.text import plural

#: Loading processes per GPU where there are pairs enough for them (open_clip's own default).
WORKERS = 4

#: How webdataset is told to read a store that it has no client for: in a shell.
_PIPES = {"s3": "aws s3 cp {} -", "gs": "gcloud storage cat {}", "hdfs": "hdfs dfs -cat {}"}


@dataclass(frozen=True)
class TrainCommand:
    """What the script fills in.

    Attributes:
        module: the Python module that is run.
        options: further arguments before open_clip's own: those that name the keep lists, "" where there are tars.
        train_data: `--train-data`, as a bash word (quoted; `$here` is the folder of the script).
        num_samples: `--train-num-samples`.
        loaders: the most loading processes of all GPUs together that `most_loaders` allows.
        model: an open_clip model name, or a model config file.
        batch_size: pairs per GPU and step.
        epochs: passes over the kept pairs.
        seed: of the training.
    """

    module: str
    options: str
    train_data: str
    num_samples: int
    loaders: int
    model: str
    batch_size: int
    epochs: int
    seed: int

    @property
    def warmup(self) -> int:
        """Steps of warm-up: open_clip's 10,000, but at most a tenth of the training."""
        steps = self.epochs * math.ceil(self.num_samples / self.batch_size)
        return max(1, min(10_000, steps // 10))

    def render(self) -> str:
        """The text of the script."""
        return render("train.sh.j2", command=self, per_gpu=WORKERS, quote=shlex.quote)

    def warnings(self) -> list[str]:
        """What a user should know before training."""
        if self.loaders >= WORKERS:
            return []
        what = "emit.train_batch_size" if self.options else "emit.pairs_per_shard or emit.train_batch_size"
        return [
            f"train.sh starts at most {plural(self.loaders, 'worker')}, as more would not all fill batches of "
            f"{self.batch_size} (for more, lower {what})"
        ]


def most_loaders(pairs: Sequence[int], batch_size: int) -> int:
    """The most loading processes of which each fills a batch, whichever tars fall to it; 0 where not even one does.

    `pairs` are the kept pairs of each tar. open_clip shares tars out to processes and drops what is short of a batch;
    a process that never fills one starts over for ever, and training waits for it.
    """
    fewest = accumulate(sorted(pairs))
    return next((len(pairs) // tars for tars, least in enumerate(fewest, 1) if least >= batch_size), 0)


def shard_pattern(folder: str, shards: int) -> str:
    """The tars of a folder as a brace pattern; `folder` is used as it is."""
    return join_urls([f"{folder}/{shard:05d}.tar" for shard in range(shards)])


def consumer_url(url: str) -> str:
    """A shard as webdataset opens it: an absolute path, or a command for stores it has no client for."""
    if storage.is_local(url):
        return os.path.abspath(storage.local_path(url))
    protocol = url.partition("://")[0]
    if protocol in _PIPES:
        return f"pipe:{_PIPES[protocol].format(shlex.quote(url))}"
    # webdataset puts it between single quotes in a shell's command.
    return url.replace("'", "%27")


def is_our_model(model: str) -> bool:
    """Whether open_clip knows the model only after it was told of its config: a `.json` file or one shipped here."""
    return model.endswith(".json") or (resources.files("pipeline.models") / "configs" / f"{model}.json").is_file()


def consumer_model(model: str) -> str:
    """The model as the training command names it: files by absolute path."""
    return os.path.abspath(model) if model.endswith(".json") else model


def join_urls(urls: Sequence[str]) -> str:
    """Shards as one `--train-data`: a brace pattern where their names count up, else joined by `::`."""
    parts: list[str] = []
    run: list[str] = []
    for url in urls:
        if run and _follows(run, url):
            run.append(url)
            continue
        parts += _brace(run)
        run = [url]
    return "::".join(parts + _brace(run))


def _brace(run: list[str]) -> list[str]:
    if len(run) < 2:
        return run
    (head, first, tail), (_, last, _) = _split(run[0]), _split(run[-1])
    return [f"{head}{{{first}..{last}}}{tail}"]


def _follows(run: list[str], url: str) -> bool:
    """Whether `url` is the last of `run` with its last number raised by one."""
    head, number, tail = _split(run[-1])
    if not number:
        return False
    following = str(int(number) + 1).zfill(len(number))
    # A brace pattern pads all its numbers to one width.
    padded = _split(run[0])[1].startswith("0") and len(following) > len(number)
    return not padded and _split(url) == (head, following, tail)


def _split(url: str) -> tuple[str, str, str]:
    match = re.fullmatch(r"(.*?)(\d+)(\D*)", url)
    # What braceexpand would take for a pattern of its own stays as it is.
    if match is None or "{" in url or "}" in url:
        return url, "", ""
    return match.group(1), match.group(2), match.group(3)

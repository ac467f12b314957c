"""Training on the kept pairs without copying them: reads the original shards through a selection's keep lists.

Three ways, all of which take a selection's folder (`RUN/pruned`, or `RUN/selections/NAME`) and give each pair the
caption that it was scored with as `txt`:

- a webdataset stage::

      webdataset.DataPipeline(
          webdataset.SimpleShardList(kept_shards(folder)), webdataset.split_by_node, webdataset.split_by_worker,
          webdataset.tarfile_to_samples(), keep_only(folder), ...)

- a map-style dataset over uncompressed local shards: `KeptPairs(folder)`;
- open_clip's own trainer: `open_clip_hook(folder)` before `open_clip_train.main.main(arguments)`, or
  `python -m pipeline.loader --keep FOLDER OPEN_CLIP_ARGUMENTS...`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from torch.utils.data import Dataset

from pipeline.data.places import is_mappable, map_file, read_places
from pipeline.emit.captions import caption_text, emitted_caption, with_caption
from pipeline.emit.manifest import ManifestLine, SelectionFolder, read_manifest
from pipeline.emit.members import locate_samples, sample_in
from pipeline.emit.plan import printable
from pipeline.emit.train_script import consumer_url
from pipeline.errors import ConfigError, DiffpruneError, InputError, StageError
from pipeline.run import run_of
from pipeline.store import marks, storage

#: A sample as webdataset passes it on: `__key__`, `__url__`, and the bytes of each member by ending.
RawSample = dict[str, Any]

#: Mapped shards that a process keeps open.
OPEN_SHARDS = 64


def kept_shards(folder: str) -> list[str]:
    """The input shards of which something is kept, as webdataset opens them, in input order."""
    return [consumer_url(line.url) for line in _read_lines(folder) if line.num_kept]


class keep_only:  # noqa: N801 (a webdataset stage, named like webdataset's own)
    """A webdataset stage that passes the kept samples of the original shards on and drops the others.

    It goes behind `tarfile_to_samples`; shards are shared out among nodes and workers before that, as always. Samples
    are identified by shard and key; where a key repeats within a shard the first one counts, as in scoring. Where
    captions were scored as `json:KEY`, a sample's `txt` is set from there. Picklable, so that workers may be spawned;
    each reads the keep lists of its own shards.

    Raises `StageError` where nothing was emitted in `folder`, and, when it meets one, `InputError` for a shard that is
    not in the selection's manifest, or that has changed since it was scored.
    """

    def __init__(self, folder: str) -> None:
        self._folder = SelectionFolder(folder)
        self._caption = _read_caption(folder)
        self._lines: dict[str, ManifestLine] = {}
        for line in _read_lines(folder):
            self._lines[line.url] = self._lines[consumer_url(line.url)] = line

    def __call__(self, samples: Iterable[RawSample]) -> Iterator[RawSample]:
        """Filter raw samples (dictionaries with `__key__` and `__url__`)."""
        url, passed = "", 0
        line: ManifestLine | None = None
        left: set[str] = set()
        for sample in samples:
            # A shard may come twice in a row (resampling): its samples are over when as many as it has went by.
            if line is None or sample["__url__"] != url or passed == line.num_samples:
                url, passed = sample["__url__"], 0
                line = self._line(url)
                left = self._keys(line)
            passed += 1
            key = printable(sample["__key__"])
            if key in left:
                left.remove(key)
                if self._caption != "txt":
                    sample["txt"] = caption_text(sample.get("json"), self._caption, f"{url}: sample {key!r}")
                yield sample

    def _line(self, url: str) -> ManifestLine:
        line = self._lines.get(url) or self._lines.get(consumer_url(url))
        if line is None:
            raise InputError(f"{url}: expected a shard of {self._folder.manifest}, found none of this name there")
        return line

    def _keys(self, line: ManifestLine) -> set[str]:
        if line.keep is None:
            return set()
        with storage.open_read(storage.join(self._folder.root, line.keep)) as handle:
            return set(pq.read_table(handle, columns=["key"])["key"].to_pylist())


class KeptPairs(Dataset[Any]):
    """The kept pairs of uncompressed local shards, by number in input order, for `torch.utils.data.DataLoader`.

    An item is a dictionary like webdataset's (`__key__`, `__url__`, `uid`, and bytes by ending: `jpg`, `txt`, ...),
    or what `transform` makes of it. Each process finds the members of a shard when it first needs one of them: from
    what the run's inventory keeps of them, or by reading the shard's headers.

    Raises `StageError` where nothing was emitted in `folder`, and `InputError` for shards that are compressed or
    remote.
    """

    def __init__(self, folder: str, transform: Callable[[RawSample], Any] | None = None) -> None:
        self.transform = transform
        self._folder = SelectionFolder(folder)
        self._caption = _read_caption(folder)
        self._lines = [line for line in _read_lines(folder) if line.num_kept]
        for line in self._lines:
            if not is_mappable(line.url):
                raise InputError(
                    f"{line.url}: expected an uncompressed local tar to read pairs by number; use keep_only"
                )
        self._ends = np.cumsum([line.num_kept for line in self._lines], dtype=np.int64)
        self._forget()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> Any:
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = int(np.searchsorted(self._ends, number, side="right"))
        row = number - (int(self._ends[shard - 1]) if shard else 0)
        places, keys, uids = self._index(shard)
        start, end = places[row]
        sample = sample_in(self._map(shard)[start:end], 0)
        url = self._lines[shard].url
        if printable(sample.key) != keys[row]:
            raise InputError(f"{url}: expected the key {keys[row]!r}, found {sample.key!r}: the shard has changed")
        item: RawSample = {"__key__": sample.key, "__url__": url, "uid": uids[row]}
        sample = with_caption(sample, self._caption, url)
        item |= {ending[1:].lower(): bytes(content) for ending, content in sample.members}
        return item if self.transform is None else self.transform(item)

    def _read_index(self, shard: int) -> tuple[list[tuple[int, int]], list[str], list[str]]:
        """Where the kept samples of a shard lie, their keys and uids."""
        line = self._lines[shard]
        with storage.open_read(storage.join(self._folder.root, str(line.keep))) as handle:
            table = pq.read_table(handle, columns=["index", "key", "uid"])
        indices = table["index"].to_pylist()
        number = int(storage.basename(str(line.keep)).partition(".")[0])
        known = read_places(run_of(self._folder.root).places(number), line.url, indices)
        places = known.spans() if known is not None else locate_samples(line.url, indices)
        if places is None:
            raise InputError(f"{line.url}: expected a plain tar, found links or sparse files; use keep_only")
        return places, table["key"].to_pylist(), table["uid"].to_pylist()

    def _forget(self) -> None:
        self._index = lru_cache(OPEN_SHARDS)(self._read_index)
        self._map = lru_cache(OPEN_SHARDS)(lambda shard: map_file(self._lines[shard].url))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_index", "_map")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def open_clip_hook(folder: str) -> None:
    """Make open_clip's trainer in this process read its training shards through the keep lists of a selection.

    `--train-data` then names the original shards (`kept_shards`), `--train-num-samples` the number of kept pairs.
    It replaces the step of `open_clip_train.data` that turns shards into samples; validation data is read as before.
    """
    from pipeline.models import compat  # noqa: F401  isort: skip (before open_clip, which imports torchvision)
    from open_clip_train import data

    data.tarfile_to_samples_nothrow = _KeptSamples(folder)


class _KeptSamples:
    """open_clip's `tarfile_to_samples_nothrow`, followed by `keep_only`."""

    def __init__(self, folder: str) -> None:
        self._keep = keep_only(folder)

    def __call__(self, shards: Iterable[RawSample]) -> Iterator[RawSample]:
        from open_clip_train import data

        streams = data.url_opener(shards, handler=data.log_and_continue)
        members = data.tar_file_expander(streams, handler=data.log_and_continue)
        return self._keep(data.group_by_keys_nothrow(members, handler=data.log_and_continue))


def train(arguments: Sequence[str]) -> None:
    """Run open_clip's trainer with its own arguments, after `--keep FOLDER` where the keep lists are to be used.

    Beside open_clip's models, `--model` takes a `.json` model config and the small ones that come with this package.
    """
    from pipeline.models import compat  # noqa: F401  isort: skip
    import open_clip
    from open_clip_train.main import main

    given = list(arguments)
    if given[:1] == ["--keep"]:
        if len(given) < 2:
            raise ConfigError("expected a selection's folder", key="--keep")
        open_clip_hook(given[1])
        del given[:2]
    open_clip.add_model_config(Path(__file__).parent / "models" / "configs")
    for place, (name, value) in enumerate(pairwise(given)):
        if name == "--model" and value.endswith(".json"):
            open_clip.add_model_config(value)
            given[place + 1] = Path(value).stem
    main(given)


def _read_lines(folder: str) -> list[ManifestLine]:
    url = SelectionFolder(folder).manifest
    try:
        return read_manifest(url)
    except FileNotFoundError:
        raise _not_emitted(url) from None


def _read_caption(folder: str) -> str:
    url = SelectionFolder(folder).mark
    mark = marks.read_mark(url)
    if mark is None:
        raise _not_emitted(url)
    return emitted_caption(mark)


def _not_emitted(url: str) -> StageError:
    return StageError(f"{url}: expected an emitted selection; make it with `diffprune emit`")


if __name__ == "__main__":
    try:
        train(sys.argv[1:])
    except DiffpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)

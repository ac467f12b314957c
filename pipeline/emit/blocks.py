"""Kept samples of plain local tars as arrays: what lies together in the inputs is copied to the output together."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from pipeline.data.layout import BLOCK, NAME_BYTES, Bool, Bytes, Int64, Layout
from pipeline.data.places import is_mappable, locate_members, read_places
from pipeline.emit.files import OpenFiles
from pipeline.emit.members import too_few
from pipeline.emit.plan import Input, KeptColumns, changed
from pipeline.emit.tar import ChangedError, TarWriter, headers, json_of
from pipeline.errors import InputError

#: Runs of members that are asked for before they are copied.
AHEAD = 64


@dataclass(frozen=True)
class Block:
    """Kept samples in the order in which they are written.

    Attributes:
        inputs: the shards that they come from.
        owner: which of the inputs each sample is of, int64 `[k]`.
        uids: of the samples `[k]`.
        keys: of the samples `[k]`.
        suffixes: what follows the keys in the output, for each of the inputs.
        indices: of the samples in their input `[k]`.
        layout: where their members lie.
    """

    inputs: list[Input]
    owner: Int64
    uids: list[str]
    keys: list[str]
    suffixes: list[str]
    indices: list[int]
    layout: Layout

    @property
    def sources(self) -> list[Input]:
        """The input of each sample `[k]`."""
        return [self.inputs[number] for number in self.owner.tolist()]

    @property
    def targets(self) -> list[str]:
        """The key of each sample in the output `[k]`."""
        return [key + self.suffixes[number] for key, number in zip(self.keys, self.owner.tolist(), strict=True)]

    def write(self, writer: TarWriter, files: OpenFiles) -> list[bool]:
        """Append the samples; a json with the uid is added where there is none. Returns which had one `[k]`.

        Contents are followed by the bytes that fill their last block in the input. Raises `InputError` for an input
        that has changed meanwhile.
        """
        layout = self.layout
        if not self.keys:
            return []
        has_json = np.add.reduceat(layout.json, layout.first[:-1]) > 0
        begins, ends = layout.data - BLOCK, layout.ends
        names = layout.names.view(f"S{layout.names.shape[1]}").reshape(-1).tolist()
        made = headers(self._new_names(names), layout.sizes).reshape(-1).data
        blocks = [made[start : start + BLOCK] for start in range(0, len(made), BLOCK)]
        members = list(zip(begins.tolist(), names, blocks, strict=True))
        first = layout.first.tolist()
        runs = list(zip(*(column.tolist() for column in self._runs(begins, ends, has_json)), strict=True))
        for number, (sample, start, stop) in enumerate(runs):
            if number % AHEAD == 0:
                self._ask_for(files, runs[number + AHEAD if number else 0 : number + 2 * AHEAD], begins, ends)
            url = self.inputs[self.owner[sample]].url
            try:
                writer.copy(files.descriptor(url), members[start][0], int(ends[stop - 1]), members[start:stop])
            except ChangedError:
                raise InputError(
                    f"{url}: expected the sample {self.keys[sample]!r} where it was found before; the shard has changed"
                ) from None
            if stop == first[sample + 1] and not has_json[sample]:
                key = self.keys[sample] + self.suffixes[self.owner[sample]]
                writer.add(*json_of(key, self.uids[sample]))
        found: list[bool] = has_json.tolist()
        return found

    def _new_names(self, names: list[bytes]) -> Bytes:
        """The members' names in the output, uint8 `[m, w]`."""
        if not any(self.suffixes):
            return self.layout.names
        first = self.layout.first.tolist()
        samples = zip(self.keys, self.targets, first, first[1:], strict=False)
        new = [target.encode() + n[len(key) :] for key, target, start, stop in samples for n in names[start:stop]]
        array = np.array(new, "S")
        return array.view(np.uint8).reshape(len(new), array.itemsize)

    def _ask_for(self, files: OpenFiles, runs: list[tuple[int, int, int]], begins: Int64, ends: Int64) -> None:
        """Have the system read runs from disk that will be copied soon, all at once rather than one after the other.

        Systems without such a call (macOS) read them when they are copied.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        for sample, start, stop in runs:
            begin, end = int(begins[start]), int(ends[stop - 1])
            file = files.descriptor(self.inputs[self.owner[sample]].url)
            os.posix_fadvise(file, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def _runs(self, begins: Int64, ends: Int64, has_json: Bool) -> tuple[Int64, Int64, Int64]:
        """Members with nothing between them, in the inputs or to be added: the sample of the last one of each run,
        the run's first member, and the first one after it, int64 `[runs]` each.
        """
        layout = self.layout
        sample = np.repeat(np.arange(len(layout)), np.diff(layout.first))
        breaks = begins[1:] != ends[:-1]
        breaks |= (np.diff(sample) > 0) & (~has_json[sample[:-1]] | (np.diff(self.owner[sample]) != 0))
        starts = np.concatenate([[0], np.flatnonzero(breaks) + 1])
        stops = np.append(starts[1:], len(sample))
        return sample[stops - 1], starts, stops


def read_block(kept: KeptColumns, suffix: str) -> Block | None:
    """The kept samples of an input shard; None for other shards than usual plain local tars.

    Raises `InputError` when the shard holds other samples than the keep list says.
    """
    layout = locate(kept, suffix)
    if layout is None:
        return None
    owner = np.zeros(len(kept.keys), np.int64)
    return Block([kept.source], owner, kept.uids, kept.keys, [suffix], kept.indices, layout)


def locate(kept: KeptColumns, suffix: str) -> Layout | None:
    """Where the kept samples of an input shard lie in it, as `read_block` finds them."""
    url = kept.source.url
    found = read_places(kept.source.places, url, kept.indices) if is_mappable(url) else None
    if found is None:
        layout = locate_members(url)
        if layout is None:
            return None
        missing = next((index for index in kept.indices if index >= len(layout)), None)
        if missing is not None:
            raise too_few(url, missing)
        found = layout.of(np.array(kept.indices, np.int64))
    keys = [key.decode() for key in found.keys.tolist()]
    for index, expected, key in zip(kept.indices, kept.keys, keys, strict=True):
        if key != expected:
            raise changed(kept.source, index, expected, key)
    return found if found.names.shape[1] + len(suffix) <= NAME_BYTES else None

"""Checks what a run wrote against itself: counts, uids, fingerprints, checksums, and what interrupted writes left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.data.inventory import ShardInfo, read_inventory
from pipeline.emit.captions import emitted_caption
from pipeline.emit.manifest import SelectionFolder
from pipeline.emit.summary import account
from pipeline.emit.verify_prepared import check_prepared
from pipeline.emit.verify_scores import check_sample, check_scores
from pipeline.emit.verify_selection import check_selection
from pipeline.emit.verify_tars import check_tars
from pipeline.errors import DiffpruneError
from pipeline.run import RunFolder
from pipeline.selection.summary import begun_selections, read_summary
from pipeline.store import marks, storage
from pipeline.store.commits import read_marks


def verify(run: RunFolder | str) -> list[str]:
    """Everything that is off in a run's folder, one line each; an empty list for a sound run.

    Reads checkpoints, directions, all score files, keep lists and, of pruned tars, the headers (remote ones whole);
    never the input's content.
    A run that has not come to selecting or handing over yet is checked as far as it is.
    """
    folder = RunFolder(run) if isinstance(run, str) else run
    try:
        inventory = read_inventory(folder.inventory)
    except FileNotFoundError:
        return [f"{folder.inventory}: missing; there is no run to check without it"]
    except (OSError, ValueError) as error:
        return [f"{folder.inventory}: cannot be read: {error}"]
    return [" ".join(problem.split()) for problem in _problems(folder, inventory)]


def _problems(run: RunFolder, inventory: Sequence[ShardInfo]) -> Iterator[str]:
    yield from _leftovers(run)
    yield from check_prepared(run)
    yield from check_scores(run, inventory)
    yield from check_sample(run, inventory)
    scored_with = _scored_caption(run)
    for name in begun_selections(run):
        try:
            selection = read_summary(run, name)
            account(selection)
        except (DiffpruneError, ValueError, TypeError, KeyError) as error:
            yield f"selection {name!r}: {error}"
            continue
        yield from check_selection(run, inventory, selection)
        folder = SelectionFolder(run.selection(name))
        mark = marks.read_mark(folder.mark)
        if mark is not None:
            caption = emitted_caption(mark)
            if scored_with not in (None, caption):
                yield f"{folder.mark}: stale: its captions are at {caption}, expected {scored_with} as in the scores"
            yield from check_tars(folder, inventory, selection, mark)
    yield from _check_summary(run)


def _scored_caption(run: RunFolder) -> str | None:
    """Where the captions are that pairs were scored with; None where no scores say so."""
    mark = next(read_marks(run), None)
    found: str | None = None if mark is None else mark.parts.get("preprocessing", {}).get("caption")
    return found


def _leftovers(run: RunFolder) -> Iterator[str]:
    """Files and folders that were being written when something stopped."""
    fs, root = storage.filesystem(run.root)
    for path in sorted(fs.find(root, withdirs=True)):
        below = path[len(root) :].strip("/")
        *parents, name = below.split("/")
        hidden = [part.startswith(storage.TEMPORARY_PREFIX) for part in parents]
        if name.startswith(storage.TEMPORARY_PREFIX) and not any(hidden):
            yield f"{storage.join(run.root, below)}: left over from an interrupted write; remove it"


def _check_summary(run: RunFolder) -> Iterator[str]:
    """Whether the counts of `summary.json` are those of the selection it speaks of."""
    try:
        summary: Any = storage.read_json(run.summary)
    except FileNotFoundError:
        return
    except ValueError as error:
        yield f"{run.summary}: expected JSON: {error}"
        return
    if isinstance(summary, dict) and "counts" not in summary and not begun_selections(run):
        return  # nothing is selected yet: the summary knows of the stages before
    counts = summary.get("counts") if isinstance(summary, dict) else None
    if not isinstance(counts, dict):
        yield f"{run.summary}: expected an object with counts"
        return
    try:
        expected = account(read_summary(run, counts.get("selection", "default")))
    except (DiffpruneError, ValueError, TypeError, KeyError):
        # Said of the selection already.
        return
    for name, value in expected.items():
        if counts.get(name) != value:
            yield f"{run.summary}: counts.{name}: expected {value!r} as in the selection, found {counts.get(name)!r}"

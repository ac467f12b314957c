"""How scoring stands: what earlier calls committed or set aside, what is left to do, and how it ended."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.config import EngineConfig
from pipeline.data.inventory import ShardInfo
from pipeline.engine.failures import Aside, read_aside
from pipeline.errors import StageError
from pipeline.run import RunFolder
from pipeline.store import commits, storage
from pipeline.store.fingerprint import Fingerprint


@dataclass
class Outcome:
    """How scoring ended: shards committed (earlier ones included), rows by status, and the shards set aside."""

    total: int
    done: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    failed: list[Aside] = field(default_factory=list)
    seconds: float = 0.0

    def check(self, allowed_failures: float, failed_folder: str) -> None:
        """Raise `StageError` with the list when more than the allowed share of the shards failed."""
        if len(self.failed) > allowed_failures * self.total:
            named = "; ".join(str(aside) for aside in self.failed[:5])
            more = f"; and {len(self.failed) - 5} more" if len(self.failed) > 5 else ""
            raise StageError(
                f"score: {len(self.failed)} of {self.total} shards failed ({named}{more}); the reasons are in "
                f"{failed_folder}; --retry-failed takes them up again"
            )


def pending_shards(
    shards: Sequence[ShardInfo],
    run: RunFolder,
    fingerprint: Fingerprint,
    config: EngineConfig,
    outcome: Outcome,
    retry_failed: bool,
) -> Sequence[int]:
    """Places in `shards` that are left to do; counts the others into `outcome`.

    Scores of other settings that are to be done again count no more from here on, whatever becomes of their shards.
    """
    places = {shard.index: place for place, shard in enumerate(shards)}
    settled = bytearray(len(shards))
    outdated = array("q")
    for mark, current in commits.judged(run, shards, fingerprint, config.stale):
        if not current:
            outdated.append(mark.shard)
            continue
        settled[places[mark.shard]] = 1
        outcome.done += 1
        outcome.statuses.update(mark.statuses)
    commits.withdraw(run, outdated)
    for url in storage.list_files(storage.join(run.root, "failed"), ".json"):
        aside = read_aside(url)
        place = places.get(aside.item) if aside is not None else None
        if aside is None or place is None:
            continue
        current = aside.fingerprint == commits.shard_fingerprint(fingerprint, shards[place]).digest
        if settled[place] or retry_failed or not current:
            storage.remove(url)
        else:
            settled[place] = 1
            outcome.failed.append(aside)
    return array("q", (place for place, value in enumerate(settled) if not value))


def rejected(statuses: dict[str, int]) -> int:
    """Rows of these statuses without a score."""
    return sum(count for status, count in statuses.items() if status != "ok")

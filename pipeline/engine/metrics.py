"""The custom metrics on Ray's Prometheus endpoint, where each name appears with `ray_` in front."""

from __future__ import annotations

from ray.util.metrics import Counter, Histogram

#: Upper bounds of the buckets, seconds.
BOUNDARIES = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]


class WorkerMetrics:
    """What a scoring actor counts: pairs, rejected pairs by reason, shards, and seconds per phase of a shard."""

    def __init__(self, worker: str) -> None:
        self._worker = {"worker": worker}
        self._pairs = Counter("diffprune_pairs", "Pairs read, rejected ones included.", ("worker",))
        self._rejected = Counter("diffprune_rejected", "Pairs without a score, by reason.", ("worker", "reason"))
        self._shards = Counter("diffprune_shards", "Shards committed.", ("worker",))
        self._seconds = Histogram(
            "diffprune_phase_seconds",
            "Seconds of one shard in a phase: load, waiting (device idle), score, commit.",
            BOUNDARIES,
            ("worker", "phase"),
        )

    def count(self, statuses: dict[str, int], seconds: dict[str, float]) -> None:
        """Add one committed shard."""
        self._shards.inc(1, self._worker)
        if pairs := sum(statuses.values()):
            self._pairs.inc(pairs, self._worker)
        for reason, number in statuses.items():
            if reason != "ok" and number:
                self._rejected.inc(number, {**self._worker, "reason": reason})
        for phase, value in seconds.items():
            self._seconds.observe(value, {**self._worker, "phase": phase})


class DriverMetrics:
    """What the driver counts: shards set aside, and deaths of workers."""

    def __init__(self) -> None:
        self._failed = Counter("diffprune_failed_shards", "Shards set aside after their retries.")
        self._deaths = Counter("diffprune_worker_deaths", "Deaths of scoring actors.")

    def shard_failed(self) -> None:
        """Count a shard that is set aside."""
        self._failed.inc(1)

    def worker_died(self) -> None:
        """Count the death of an actor."""
        self._deaths.inc(1)

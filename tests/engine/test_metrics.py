"""The metrics on Ray's Prometheus endpoint."""

from __future__ import annotations

import pytest

from pipeline.engine import metrics


class Recorder:
    """Stands in for Ray's metric classes: remembers what was counted, by name and tags."""

    values: dict[tuple[str, tuple[str, ...]], float]

    def __init__(self, name: str, description: str, *rest: object) -> None:
        self._name = name
        self._keys = rest[-1] if rest else ()

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        assert set(tags or {}) == set(self._keys)  # type: ignore[arg-type]
        key = (self._name, tuple((tags or {}).values()))
        Recorder.values[key] = Recorder.values.get(key, 0) + value

    observe = inc


def test_a_committed_shard_is_counted_by_worker_reason_and_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder.values = {}
    monkeypatch.setattr(metrics, "Counter", Recorder)
    monkeypatch.setattr(metrics, "Histogram", Recorder)
    counter = metrics.WorkerMetrics("3")
    counter.count({"ok": 8, "no-image": 2}, {"load": 0.5, "score": 2.0})
    counter.count({"ok": 0, "no-image": 1}, {"load": 0.25})
    driver = metrics.DriverMetrics()
    driver.shard_failed()
    driver.worker_died()
    assert Recorder.values == {
        ("diffprune_shards", ("3",)): 2,
        ("diffprune_pairs", ("3",)): 11,
        ("diffprune_rejected", ("3", "no-image")): 3,
        ("diffprune_phase_seconds", ("3", "load")): 0.75,
        ("diffprune_phase_seconds", ("3", "score")): 2.0,
        ("diffprune_failed_shards", ()): 1,
        ("diffprune_worker_deaths", ()): 1,
    }

"""The shard queue: bounded, fair to fast workers, and strict with shards that fail or kill."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.shard_queue import LOST_NODES, ShardQueue


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(count: int, *, depth: int = 3, retries: int = 2, wait: float = 1.0) -> tuple[ShardQueue, Clock]:
    clock = Clock()
    return ShardQueue(range(count), depth=depth, retries=retries, wait=wait, clock=clock), clock


def take_all(queue: ShardQueue, worker: str) -> list[int]:
    taken = []
    while (shard := queue.take(worker)) is not None:
        taken.append(shard)
    return taken


def test_nobody_takes_more_than_a_share_of_what_is_left() -> None:
    queue, _ = make(5)
    assert [queue.take("early", workers=2) for _ in range(4)] == [0, 1, 2, None]
    assert [queue.take("late", workers=2) for _ in range(3)] == [3, 4, None]
    queue.succeeded("early", 0)
    assert queue.take("early", workers=2) is None
    four, _ = make(4)
    assert [four.take("early", workers=2) for _ in range(3)] == [0, 1, None]
    assert [four.take("late", workers=2) for _ in range(3)] == [2, 3, None]
    one, _ = make(1)
    assert one.take("early", workers=100) == 0


def test_a_worker_holds_at_most_depth_and_comes_back_for_more() -> None:
    queue, _ = make(6, depth=2)
    assert take_all(queue, "fast") == [0, 1]
    assert take_all(queue, "slow") == [2, 3]
    queue.succeeded("fast", 0)
    assert take_all(queue, "fast") == [4]
    queue.succeeded("fast", 4)
    queue.succeeded("fast", 1)
    assert take_all(queue, "fast") == [5]
    assert not queue.finished()
    for worker, shard in (("fast", 5), ("slow", 2), ("slow", 3)):
        queue.succeeded(worker, shard)
    assert queue.finished()


def test_a_failed_shard_waits_twice_as_long_each_time_and_is_given_up_after_its_retries() -> None:
    queue, clock = make(1, retries=2, wait=1.0)
    queue.take("a")
    assert queue.failed("a", 0)
    clock.now = 0.9
    assert queue.take("a") is None
    clock.now = 1.0
    assert queue.take("b") == 0
    assert queue.failed("b", 0)
    clock.now = 2.9
    assert queue.take("a") is None
    clock.now = 3.0
    assert queue.take("a") == 0
    assert not queue.failed("a", 0)
    assert queue.attempts(0) == (3, 0)
    assert queue.finished()


def test_after_a_death_the_suspects_go_back_to_that_worker_one_at_a_time() -> None:
    queue, _ = make(9)
    assert take_all(queue, "a") == [0, 1, 2]
    assert queue.died("a") is None
    assert take_all(queue, "b") == [3, 4, 5]
    assert take_all(queue, "a") == [0]
    queue.succeeded("a", 0)
    assert take_all(queue, "a") == [1]
    assert queue.died("a") is None
    assert take_all(queue, "a") == [1]
    assert queue.died("a") == 1
    assert queue.attempts(1) == (0, 2)
    assert take_all(queue, "a") == [2]
    queue.succeeded("a", 2)
    assert take_all(queue, "a") == [6, 7, 8]


def test_a_lost_machine_is_no_fault_of_the_shard() -> None:
    queue, _ = make(1, retries=1)
    for _ in range(5):
        assert take_all(queue, "a") == [0]
        assert queue.died("a", blame=False) is None
    assert take_all(queue, "a") == [0]


def test_what_a_lost_worker_had_goes_to_others_alone() -> None:
    queue, _ = make(5)
    take_all(queue, "a")
    queue.died("a", blame=False)
    queue.removed("a")
    assert take_all(queue, "b") == [0]
    assert take_all(queue, "c") == [1]
    queue.succeeded("b", 0)
    assert take_all(queue, "b") == [2]


@given(st.lists(st.tuples(st.sampled_from(["done", "fail", "die", "lost", "gone"]), st.sampled_from("abc"))))
def test_no_shard_is_lost_or_settled_twice_whatever_happens(events: list[tuple[str, str]]) -> None:
    queue, clock = make(7, retries=2)
    in_hand: dict[str, list[int]] = {worker: [] for worker in "abc"}
    settled: list[int] = []

    def step(event: str, worker: str) -> None:
        clock.now += 10
        in_hand[worker] += take_all(queue, worker)
        assert len(in_hand[worker]) <= 3
        if event in ("die", "lost", "gone"):
            given_up = queue.died(worker, blame=event == "die")
            settled.extend([] if given_up is None else [given_up])
            in_hand[worker].clear()
            if event == "gone":
                queue.removed(worker)
        elif in_hand[worker]:
            shard = in_hand[worker].pop(0)
            if event == "done":
                queue.succeeded(worker, shard)
                settled.append(shard)
            elif not queue.failed(worker, shard):
                settled.append(shard)

    for event, worker in events:
        step(event, worker)
    for _ in range(60):
        for worker in "abc":
            step("done", worker)
    assert queue.finished()
    assert sorted(settled) == list(range(7))


def test_a_worker_that_fails_while_others_go_on_rests_longer_each_time() -> None:
    queue, clock = make(100, retries=9)
    take_all(queue, "good")
    for rest in (10, 20, 40):
        while not queue.rest("bad"):
            shard = queue.take("bad")
            assert shard is not None
            queue.failed("bad", shard)
        assert queue.rest("bad") == rest
        clock.now += rest - 0.5
        assert take_all(queue, "bad") == []
        clock.now += 0.5
        assert len(take_all(queue, "bad")) == 1, "one at a time, until it commits one"
        queue.failed("bad", max(queue._lanes["bad"].in_hand))
        clock.now += queue.rest("bad") - rest * 2
    clock.now += 1000
    (probe,) = take_all(queue, "bad")
    queue.succeeded("bad", probe)
    assert len(take_all(queue, "bad")) == 3


def test_nobody_rests_where_all_fail_or_alone() -> None:
    queue, _ = make(20, retries=0)
    for _ in range(5):
        for worker in "ab":
            queue.failed(worker, take_all(queue, worker)[0])
            assert queue.rest(worker) == 0
    alone, _ = make(5, retries=0)
    for shard in range(5):
        assert alone.take("a") == shard
        alone.failed("a", shard)
    assert alone.finished()


@pytest.mark.parametrize(("dies", "workers", "restart"), [(False, 2, 0), (False, 8, 0), (True, 2, 9), (True, 8, 25)])
def test_a_broken_gpu_costs_no_shard(dies: bool, workers: int, restart: int) -> None:
    """Workers with shards of a minute each, of which one fails at once or dies with whatever it is given."""
    queue, clock = make(40 * workers, retries=3)
    events: list[tuple[float, str, int]] = []
    free = dict.fromkeys(map(str, range(workers)), 0.0)
    lost = []
    while not queue.finished():
        for worker in free:
            while free["0"] <= clock.now or worker != "0":
                shard = queue.take(worker, workers)
                if shard is None:
                    break
                if worker != "0":
                    free[worker] = max(free[worker], clock.now) + 60
                    heapq.heappush(events, (free[worker], worker, shard))
                elif not dies:
                    heapq.heappush(events, (clock.now + 0.1, worker, shard))
            if worker == "0" and dies and queue.in_hand("0"):
                free["0"] = clock.now + restart
                lost += [] if (given_up := queue.died("0")) is None else [given_up]
        clock.now += 1
        while events and events[0][0] <= clock.now:
            _, worker, shard = heapq.heappop(events)
            if worker != "0":
                queue.succeeded(worker, shard)
            elif not queue.failed(worker, shard):
                lost.append(shard)
    assert lost == []
    assert clock.now < 1.3 * 60 * 40 * workers / (workers - 1)


def test_while_storage_is_away_shards_wait_and_no_try_counts() -> None:
    clock = Clock()
    queue = ShardQueue(range(40), depth=2, retries=1, wait=1.0, longest_outage=600, clock=clock)
    back = 300.0
    tries = 0
    first = queue.take("a")
    assert first == 0
    queue.succeeded("a", first)
    while not queue.finished():
        for worker in "ab":
            for shard in take_all(queue, worker):
                if clock.now < back:
                    tries += 1
                    assert queue.failed(worker, shard, no_answer=True), "given up for an outage"
                else:
                    queue.succeeded(worker, shard)
        clock.now += 0.5
        assert queue.outage == (clock.now if len(queue._pending) - 1 == queue.left() else 0)
        assert clock.now < back + 70, "the longest wait is 64 s"
    assert tries < 39 * 11, "waits are doubled"


def test_an_outage_is_one_only_after_something_was_committed_and_over_several_shards() -> None:
    never, _ = make(5, retries=0)
    for shard in range(5):
        assert never.take("a") == shard
        assert not never.failed("a", shard, no_answer=True)
    clock = Clock()
    single = ShardQueue(range(2), depth=2, retries=2, wait=1.0, longest_outage=600, clock=clock)
    assert take_all(single, "a") == [0, 1]
    single.succeeded("a", 0)
    assert single.failed("a", 1, no_answer=True)
    for again in (True, False):
        clock.now += 10
        assert single.take("a") == 1
        assert single.failed("a", 1, no_answer=True) == again
    assert single.finished()
    assert single.outage == 0


def test_shards_of_a_storage_that_is_gone_for_good_are_given_up_while_those_of_another_go_on() -> None:
    """Odd shards never answer. Even ones take a minute, so that failures come in rows that look like an outage."""
    clock = Clock()
    queue = ShardQueue(range(200), depth=3, retries=2, wait=1.0, longest_outage=600, clock=clock)
    busy: dict[str, tuple[float, int]] = {}
    done, lost, seen_away = [], [], False
    while not queue.finished() and clock.now < 30_000:
        for worker in ("a", "b", "c", "d"):
            if worker in busy and busy[worker][0] <= clock.now:
                _, shard = busy.pop(worker)
                queue.succeeded(worker, shard)
                done.append(shard)
            if worker not in busy and (shard := queue.take(worker)) is not None:
                if shard % 2 == 0:
                    busy[worker] = (clock.now + 60, shard)
                elif not queue.failed(worker, shard, no_answer=True):
                    lost.append(shard)
        seen_away = seen_away or queue.outage > 0
        assert queue.outage < 600
        clock.now += 1
    assert sorted(done) == list(range(0, 200, 2))
    assert sorted(lost) == list(range(1, 200, 2))
    assert seen_away
    assert clock.now < 1.5 * 100 / 4 * 60 + 600


def test_machines_that_go_away_cost_no_try_until_there_were_many() -> None:
    queue, clock = make(1, retries=1)
    given_out = 0
    while (shard := queue.take("a")) is not None:
        given_out += 1
        if not queue.failed("a", shard, node_lost=True):
            break
        clock.now += 5
    assert given_out == LOST_NODES + 2
    assert queue.attempts(0) == (2, 0)
    assert queue.finished()

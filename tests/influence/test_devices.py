"""Everything is where it is computed with, on a pretended device; pairs are copied ahead in the right order."""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from inspect import unwrap
from typing import get_args

import numpy as np
import pytest
import torch

from pipeline.evaluation.zeroshot import HeldOut, measure
from pipeline.influence import Batches, Replay, Scorer, Settings, prepare_run, with_reference
from pipeline.influence.arithmetic import arithmetic
from pipeline.influence.gradients import BatchLoss
from pipeline.influence.optimizer import RunState, advanced
from pipeline.influence.passes import Passes
from pipeline.influence.transfers import _copied_ahead, on_device, to_device
from pipeline.literals import EstimatorName
from pipeline.models.checkpoint import load_checkpoint, save_checkpoint
from pipeline.models.clip import split_state
from pipeline.prepared import load_plan, save_plan
from pipeline.replay.schedule import TrainingSettings, data_order
from pipeline.replay.train import Trainer
from pipeline.types import Checkpoint, PairBatch
from tests.influence.test_diff_in import N, assert_close, make_case
from tests.influence.test_unrolled import RATES, RULES, batch_of, checkpoint_of, literal_run
from tests.influence.towers import SmallTowers, make_pairs
from tests.pretended import Pretended, machine
from tests.replay.pairs import Factory, MemoryPairs

ALL = {estimator: Settings(estimator=estimator) for estimator in get_args(EstimatorName)} | {
    "diff-in exact": Settings(method="exact"),
    "diff-in by losses": Settings(method="forward"),
    "tracin by losses": Settings(estimator="tracin", method="forward"),
    "diff-in-self exact": Settings(estimator="diff-in-self", self_form="exact", parameters="projections"),
    "tracin-self exact": Settings(estimator="tracin-self", self_form="exact"),
    "grand exact": Settings(estimator="grand", self_form="exact"),
    "siglip, row, equal captions": Settings(family="siglip", loss="row", equal_captions="ignore"),
}


def scored(model, checkpoints, batches, pairs, settings, device, replay=None, folder=None):
    """Scores and what is observed; with `folder` plans are stored and read again on the way."""
    model.to(device)
    plans = prepare_run(model, checkpoints, batches, settings, dataset_size=N, replay=replay)
    plans = [
        with_reference(model, checkpoint, plan, batches.reference, settings, 3)
        for checkpoint, plan in zip(checkpoints, plans, strict=True)
    ]
    if folder is not None:
        for number, plan in enumerate(plans):
            save_plan(str(folder), number, plan)
        plans = [load_plan(str(folder), number) for number in range(len(plans))]
    trained = {0: pairs.ids[:2].sort().values}
    parts = list(zip(checkpoints, plans, strict=True))
    scorer = Scorer(model, parts, batches.reference, settings, device, 3)
    held_out = Scorer(model, parts, batches.reference, settings, device, 3, trained=trained)
    return scorer.score(pairs), held_out.score(pairs[2:]), scorer.observe(pairs)


def assert_same(found, expected):
    for part, other in zip(found, expected, strict=True):
        for name in part.__slots__ if hasattr(part, "__slots__") else vars(part):
            value, wanted = getattr(part, name), getattr(other, name)
            assert not isinstance(value, Pretended), name
            torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("settings", ALL.values(), ids=ALL)
def test_plans_and_scores_mix_no_devices(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.influence.unrolled._KRYLOV_STEPS", 4)
    settings = replace(settings, projections=3, eigenpairs=2, chunk=4)
    expected = scored(*make_case(settings), settings, torch.device("cpu"))
    case = make_case(settings)
    with machine() as device:
        assert_same(scored(*case, settings, device, folder=tmp_path), expected)


@pytest.mark.parametrize("settings", [Settings(), Settings(parameters="projections"), Settings(method="exact")])
def test_open_clips_towers_mix_no_devices(settings, tmp_path):
    """On the CPU dense layers go through oneDNN, on the device they must not."""

    def case():
        pairs, model = MemoryPairs().all, Factory(tmp_path)(0)
        params, buffers = split_state(model)
        checkpoint = Checkpoint(10, 1e-3, 0, {name: value.clone() for name, value in params.items()}, buffers)
        return model, [checkpoint], Batches(pairs[:6], pairs[6:12], pairs[12:18]), pairs[18:]

    expected = scored(*case(), settings, torch.device("cpu"))
    made = case()
    with machine() as device:
        found = scored(*made, settings, device)
    assert_close(found[0].terms, expected[0].terms, 1e-2)  # float32


def test_a_gradient_per_pair_is_not_taken_in_bfloat16(tmp_path):
    pairs, model = MemoryPairs().all, Factory(tmp_path)(0)
    params, buffers = split_state(model)
    checkpoint, found = Checkpoint(10, 1e-3, 0, params, buffers), []
    for precision in ("fp32", "bf16"):
        settings = Settings(estimator="grand", self_form="exact", precision=precision)
        plans = prepare_run(model, [checkpoint], Batches(pairs[:6], pairs[6:9], pairs[9:12]), settings, dataset_size=N)
        found.append(Scorer(model, [(checkpoint, plans[0])], pairs[:6], settings).score(pairs[12:16]).terms)
    assert_close(found[1], found[0], 1e-6)


def test_a_replay_mixes_no_devices():
    rule, settings = RULES["clipped"], Settings(estimator="unrolled", replay="exact")
    found = []
    for there in (False, True):
        model = SmallTowers()
        states = literal_run(model, rule)
        checkpoints = [checkpoint_of(states, step, rule) for step in (3, 7)]
        replay = Replay(rule, RATES, batch_of, checkpoint_of(states, 0, rule))
        _, _, batches, pairs = make_case(settings)
        if not there:
            found.append(scored(model, checkpoints, batches, pairs, settings, torch.device("cpu"), replay))
            continue
        with machine() as device:
            found.append(scored(model, checkpoints, batches, pairs, settings, device, replay))
    assert_same(found[1], found[0])


class Held:
    """How many vectors of so many values the memory of the pretended device holds at most, rows of tables included."""

    def __init__(self, monkeypatch, size):
        self.most, alive, made = 0, weakref.WeakSet(), Pretended.__new__

        def noted(cls, held):
            new = made(cls, held)
            if held.numel() and held.numel() % size == 0:
                alive.add(new)
                storages = {tensor.held.untyped_storage()._cdata: tensor.held for tensor in alive}
                values = sum(held.untyped_storage().nbytes() // held.itemsize for held in storages.values())
                self.most = max(self.most, values // size)
            return new

        monkeypatch.setattr(Pretended, "__new__", staticmethod(noted))


def test_a_replay_holds_few_states_on_the_device(monkeypatch):
    """As many of a long run as of a short one: those on the way back are in main memory."""
    rule, settings, most = RULES["adamw"], Settings(estimator="unrolled", replay="exact"), []
    model = SmallTowers()
    state = RunState.of(checkpoint_of(literal_run(model, rule), 0, rule), torch.device("cpu"))
    initial = Checkpoint(0, 0.0, 0, state.params, {})
    width = model.visual[0].weight.numel()
    for steps in (4, 36):
        while state.step < steps:
            loss = BatchLoss(Passes(model, settings), batch_of(state.step), list(state.params))
            state = advanced(state, loss.gradient(state.params), 0.01, rule)
        last, replay = Checkpoint(steps, 0.01, 0, state.params, {}), Replay(rule, [0.01] * steps, batch_of, initial)
        batches = make_case(settings)[2]
        with machine() as device, monkeypatch.context() as patched:
            held = Held(patched, width)
            plans = prepare_run(model.to(device), [last], batches, settings, dataset_size=N, replay=replay)
        most.append(held.most)
        assert not any(isinstance(value, Pretended) for value in plans[0].vectors["v"].values())
        model = SmallTowers()
    assert most[1] <= most[0]


@pytest.mark.parametrize("estimator", ["unrolled", "diff-in-self"])
def test_krylov_bases_are_in_main_memory(estimator, monkeypatch):
    monkeypatch.setattr("pipeline.influence.unrolled._KRYLOV_STEPS", 30)
    settings = Settings(estimator=estimator, eigenpairs=11)
    model, checkpoints, batches, _ = make_case(settings)
    with machine() as device:
        held = Held(monkeypatch, sum(value.numel() for value in checkpoints[0].params.values()))
        plans = prepare_run(model.to(device), checkpoints, batches, settings, dataset_size=N)
    assert held.most < 8
    assert not any(
        isinstance(value, Pretended) for plan in plans for t in plan.vectors.values() for value in t.values()
    )


def test_z0_holds_few_checkpoints_on_the_device(monkeypatch):
    settings, most = Settings(estimator="z0"), []
    for count in (5, 20):
        model, (checkpoint, *_), batches, _ = make_case(settings)
        checkpoints = [
            replace(checkpoint, step=step, params={name: value + step for name, value in checkpoint.params.items()})
            for step in range(count)
        ]
        with machine() as device, monkeypatch.context() as patched:
            held = Held(patched, model.visual[0].weight.numel())
            prepare_run(model.to(device), checkpoints, batches, settings, dataset_size=N)
        most.append(held.most)
    assert most[1] <= most[0]


@pytest.mark.parametrize("estimator", ["diff-in", "tracin", "grand", "moso"])
def test_plans_are_in_main_memory(estimator):
    settings = Settings(estimator=estimator)
    model, checkpoints, batches, _ = make_case(settings)
    with machine() as device:
        plans = prepare_run(model.to(device), checkpoints, batches, settings, dataset_size=N)
    assert not any(
        isinstance(value, Pretended) for plan in plans for t in plan.vectors.values() for value in t.values()
    )


def test_what_mixes_devices_is_seen():
    with machine() as device:
        there = torch.ones(3, device=device)
        assert isinstance(there + 1.0, Pretended)
        assert isinstance(there * torch.tensor(2.0), Pretended)  # a number of the CPU, as CUDA allows
        with pytest.raises(RuntimeError, match="on the CPU"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="on the CPU"):
            torch.stack([there.sum(), torch.tensor(1.0)])
        with pytest.raises(RuntimeError, match="on the CPU"):
            torch.ones(3)[there.long()]
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, generator=torch.Generator(), device=device)
        with pytest.raises(RuntimeError):
            there.numpy()


def trainer_of(folder, settings, device):
    pairs = MemoryPairs()
    return Trainer(Factory(folder)(0), pairs, data_order(np.arange(len(pairs)), settings), settings, device)


def training_that_moves(folder, settings, first, second):
    """Six steps, the last three of them on another device, from a checkpoint file; their losses, and the trainer."""
    before = trainer_of(folder, settings, first)
    losses = [before.advance() for _ in range(3)]
    save_checkpoint(str(folder / "resume.safetensors"), before.checkpoint())
    after = trainer_of(folder, settings, second)
    after.restore(load_checkpoint(str(folder / "resume.safetensors"), after.model))
    return [*losses, *(after.advance() for _ in range(3))], after


@pytest.mark.filterwarnings("ignore:for .* to a meta parameter")  # the pretended ones do take the values
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("begins", ["there", "here"])
def test_training_goes_on_on_another_device(tmp_path, optimizer, begins):
    """Steps, checkpoints and what is restored from them, whichever device wrote and whichever reads."""
    settings = TrainingSettings(
        steps=6, batch_size=8, lr=3e-3, eps=1e-3, optimizer=optimizer, momentum=0.9, augment=True, grad_clip=0.5
    )
    whole = trainer_of(tmp_path, settings, "cpu")
    expected = [whole.advance() for _ in range(6)]
    with machine() as device:
        first, second = (device, "cpu") if begins == "there" else ("cpu", device)
        losses, after = training_that_moves(tmp_path, settings, first, second)
        made = after.checkpoint()
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, value in whole.checkpoint().params.items():
        assert not isinstance(made.params[name], Pretended)
        torch.testing.assert_close(made.params[name], value, rtol=1e-4, atol=1e-6)


def test_measuring_a_model_mixes_no_devices(tmp_path):
    pairs = MemoryPairs(classes=4)
    model = Factory(tmp_path)(0)
    for labels in (None, pairs.all.captions):
        expected = measure(model.to("cpu"), HeldOut(pairs.all, labels))
        fresh = Factory(tmp_path)(0)
        with machine() as device, torch.no_grad():
            # Tensors of inference mode cannot be pretended.
            found = unwrap(measure)(fresh.to(device), HeldOut(pairs.all.to(device), labels))
        assert found == pytest.approx(expected)


def test_images_are_bytes_until_they_are_on_the_device(tmp_path):
    seen = []
    model = Factory(tmp_path)(0)
    model.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0].dtype, inputs[0].device.type)))
    model.visual.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0].dtype, "pixels")))
    with machine() as device:
        batch = next(on_device(MemoryPairs().all, torch.arange(24), 24, device))
        model.to(device)(batch.images, batch.tokens)
    assert seen == [(torch.uint8, device.type), (torch.float32, "pixels")]


def test_float32_is_float32_in_convolutions_too_and_the_callers_settings_come_back():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

    def now():
        return matmul.allow_tf32, cudnn.allow_tf32, matmul.allow_bf16_reduced_precision_reduction

    before = now()
    for precision, tf32 in (("fp32", False), ("tf32", True), ("bf16", False)):
        with arithmetic(precision):
            assert now() == (tf32, tf32, False)
        assert now() == before


class _Stream:
    """Notes what is asked of a stream."""

    events: list[str]

    def wait_stream(self, other):
        self.events.append("wait")


@pytest.mark.parametrize("rows", [0, 1, 7, 8])
def test_each_part_is_waited_for_before_the_next_is_copied(monkeypatch, rows):
    """The order of calls that CUDA's rules ask for; the streams themselves are stand-ins."""
    events: list[str] = []
    here, copies, current = _Stream(), _Stream(), threading.local()
    here.events = copies.events = events

    @contextmanager
    def within(stream):
        current.stream = stream
        yield
        current.stream = None

    def moved(batch, device, non_blocking=False):
        assert current.stream is copies
        assert non_blocking
        events.append("copy")
        return batch

    def recorded(batch, stream):
        assert stream is here
        events.append("record")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(PairBatch, "pinned", lambda batch: batch)
    monkeypatch.setattr(PairBatch, "to", moved)
    monkeypatch.setattr(PairBatch, "record_stream", recorded)
    pairs = make_pairs(rows, seed=1) if rows else make_pairs(1, seed=1)[:0]
    order = torch.arange(rows).flip(0)
    parts = []
    for part in _copied_ahead((pairs[some] for some in order.split(2) if len(some)), torch.device("cuda", 0)):
        parts.append(part.ids)
        events.append("use")
    assert torch.equal(torch.cat([pairs.ids[:0], *parts]), pairs.ids.flip(0))
    places = {
        name: [n for n, event in enumerate(events) if event == name] for name in ("copy", "wait", "record", "use")
    }
    assert {len(found) for found in places.values()} == {(rows + 1) // 2}
    for number, (copied, waited, kept, used) in enumerate(zip(*places.values(), strict=True)):
        assert copied < waited < kept < used
        assert number == 0 or copied > places["wait"][number - 1]


@pytest.mark.parametrize("broken", [None, 0, 2])
def test_the_thread_that_copies_ends_with_what_it_copies_for(monkeypatch, broken):
    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(PairBatch, "pinned", lambda batch: batch)
    monkeypatch.setattr(PairBatch, "to", lambda batch, device, non_blocking=False: batch)
    monkeypatch.setattr(PairBatch, "record_stream", lambda batch, stream: None)
    before = set(threading.enumerate())

    def parts():
        for number in range(4):
            if number == broken:
                raise OSError("the disk is gone")
            yield make_pairs(2, seed=number)

    found = to_device(parts(), torch.device("cuda", 0))
    if broken is None:
        next(found)
        assert set(threading.enumerate()) > before
    else:
        for number in range(broken):
            assert torch.equal(next(found).ids, make_pairs(2, seed=number).ids)
        with pytest.raises(OSError, match="the disk is gone"):
            next(found)
    del found
    assert set(threading.enumerate()) <= before


def test_on_a_cpu_parts_are_taken_in_order():
    pairs = make_pairs(5, seed=1)
    parts = list(on_device(pairs, torch.tensor([4, 0, 3, 1, 2]), 2, torch.device("cpu")))
    assert [part.ids.tolist() for part in parts] == [[4, 0], [3, 1], [2]]

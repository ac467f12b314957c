"""Where a task computes: on the GPU that Ray gave it, within its part of the memory, or it says why it cannot."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray
import torch

from pipeline.device import CONTEXT_BYTES, device_of_this_task, gpu_is_lost, gpus_for_a_task
from pipeline.errors import InputError

TOTAL = 80 << 30


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU as Ray and torch show it to a task: the share that it was given, and what was set."""
    found = SimpleNamespace(share=1.0, usable=True, bf16=True, fraction=None)
    context = SimpleNamespace(get_assigned_resources=lambda: {"CPU": 1.0, "GPU": found.share})
    properties = SimpleNamespace(total_memory=TOTAL)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [0])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found.usable)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: found.bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part: setattr(found, "fraction", part))
    return found


def test_a_task_without_a_gpu_computes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get_gpu_ids", list)
    assert device_of_this_task("bf16") == "cpu"


def test_a_gpu_that_torch_cannot_use_is_an_error_in_one_line(gpu: SimpleNamespace) -> None:
    gpu.usable = False
    with pytest.raises(InputError, match=r"^expected a GPU that torch can use.* is built for .*gpus_per_worker: 0$"):
        device_of_this_task()


@pytest.mark.parametrize("share", [1.0, 2.0])
def test_a_whole_gpu_is_taken_without_a_limit(gpu: SimpleNamespace, share: float) -> None:
    gpu.share = share
    assert device_of_this_task() == "cuda"
    assert gpu.fraction is None


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_a_part_of_a_gpu_is_a_part_of_its_memory_context_included(gpu: SimpleNamespace, share: float) -> None:
    gpu.share = share
    assert device_of_this_task() == "cuda"
    assert gpu.fraction * TOTAL + CONTEXT_BYTES == pytest.approx(share * TOTAL)


def test_bfloat16_is_refused_where_it_would_be_emulated(gpu: SimpleNamespace) -> None:
    gpu.bf16 = False
    with pytest.raises(InputError, match=r"^precision: bf16: expected .* 8\.0 or more, found Tesla T4"):
        device_of_this_task("bf16")
    for precision in ("fp32", "tf32"):
        assert device_of_this_task(precision) == "cuda"


@pytest.mark.parametrize("there", [0, 4])
def test_gpus_are_asked_for_as_the_config_says_else_where_there_are_any(
    there: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": there} if there else {"CPU": 8.0})
    assert gpus_for_a_task() == float(there > 0)
    assert [gpus_for_a_task(given) for given in (0, 0.25, 2)] == [0, 0.25, 2]


def test_a_gpu_is_lost_when_every_call_comes_back_with_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert not gpu_is_lost()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not gpu_is_lost(), "as after a lack of memory"
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    assert gpu_is_lost()

"""GPUs of Ray tasks: what to ask for, and where a task or an actor then computes. Loads torch only within a task."""

from __future__ import annotations

import sys

import ray

from pipeline.allocator import keep_freed_memory
from pipeline.errors import InputError

#: Bytes of a GPU that a process takes beside torch's allocator, roughly: its CUDA context and loaded kernels.
CONTEXT_BYTES = 512 << 20


def gpus_for_a_task(given: float | None = None) -> float:
    """GPUs to ask for: what the config's key says; without it one where the connected cluster has any."""
    if given is not None:
        return given
    return float(ray.cluster_resources().get("GPU", 0) > 0)  # type: ignore[no-untyped-call]


def device_of_this_task(precision: str = "fp32") -> str:
    """`cuda` where Ray gave this task or actor a GPU, or a part of one; else `cpu`.

    With a part of a GPU the process takes no more than that part of its memory; on a CPU it keeps the memory it frees.
    Raises `InputError` when torch cannot use the GPU, or it does not multiply in `precision` (a config's).
    """
    import torch

    if not ray.get_gpu_ids():
        keep_freed_memory()
        return "cpu"
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        raise InputError(
            f"expected a GPU that torch can use, as Ray gave this process one; torch {torch.__version__} is built for "
            f"{built}: install a driver that is new enough for it or a torch for the driver, or set gpus_per_worker: 0"
        )
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(
            f"precision: bf16: expected a GPU of compute capability 8.0 or more, found {torch.cuda.get_device_name()}, "
            "which would emulate it: use fp32"
        )
    share = ray.get_runtime_context().get_assigned_resources().get("GPU", 1.0)  # type: ignore[no-untyped-call]
    if share < 1:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(max(share - CONTEXT_BYTES / total, share / 2))
    return "cuda"


def gpu_is_lost() -> bool:
    """Whether CUDA no longer works in this process, as after an illegal address or a memory error (but not after a lack
    of memory)."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # such an error comes back from every later call
        return True
    return False

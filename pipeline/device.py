"""GPUs of Ray tasks: what to ask for, and where a task or an actor then computes. Loads torch only inside of these."""

from __future__ import annotations

import ray

from pipeline.allocator import keep_freed_memory


def gpus_for_a_task() -> float:
    """GPUs to ask for where no config key says it: one where the connected cluster has any."""
    return float(ray.cluster_resources().get("GPU", 0) > 0)  # type: ignore[no-untyped-call]


def device_of_this_task() -> str:
    """`cuda` where Ray gave this task or actor a GPU, or a part of one, that torch can use; else `cpu`.

    On a CPU this process then keeps the memory that it frees.
    """
    import torch

    if ray.get_gpu_ids() and torch.cuda.is_available():
        return "cuda"
    keep_freed_memory()
    return "cpu"

"""Reading safetensors files: tensors in an order that is always the same, and the metadata beside them."""

from __future__ import annotations

import json

import safetensors.torch
from torch import Tensor


def parse_tensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, sorted, and its metadata. Raises `SafetensorError` for a broken file.

    safetensors itself gives the tensors in another order each time. Sums over all of them, such as a norm, would then
    differ in the last digit from one process to the next, and files made of them in their bytes.
    """
    tensors = dict(sorted(safetensors.torch.load(data).items()))
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return tensors, metadata

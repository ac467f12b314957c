"""Tensors come back in one order whatever order they were written in, and with their metadata."""

from __future__ import annotations

import safetensors.torch
import torch

from pipeline.store.tensors import parse_tensors


def test_the_order_is_that_of_the_names() -> None:
    names = [f"part{number:02d}" for number in range(40)]
    data = safetensors.torch.save({name: torch.ones(2) for name in reversed(names)}, metadata={"key": "value"})
    for _ in range(3):
        tensors, metadata = parse_tensors(data)
        assert list(tensors) == names
        assert metadata == {"key": "value"}


def test_a_file_without_metadata_has_none() -> None:
    assert parse_tensors(safetensors.torch.save({"a": torch.ones(1)}))[1] == {}

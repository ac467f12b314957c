"""Random numbers from a hash of what they belong to: the same on every device, in any order, for any part of them."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.types import Tree


def uniform(ids: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) for each id, float64 `[b]`."""
    return _shifted(_mixed(ids, seed), 11).double() / 2.0**53


def signed(tree: Tree, seed: int, index: int) -> Tree:
    """The tree with a random sign for each entry, drawn anew for each `index`.

    An entry's hash has a bit for each of 64 indices. Names are taken in alphabetical order, whatever the tree's.
    """
    start = 0
    found: Tree = {}
    stream = int(_mixed(torch.tensor([index // 64]), seed))
    for name in sorted(tree):
        value = tree[name]
        places = torch.arange(start, start + value.numel(), device=value.device)
        bits = _shifted(_mixed(places, stream), index % 64) & 1
        found[name] = torch.where(bits.bool().view_as(value), value, -value)
        start += value.numel()
    return found


def _mixed(values: Tensor, seed: int) -> Tensor:
    """A hash of each int64 value and the seed, int64 (SplitMix64)."""
    # int64 products wrap around, as the hash wants them to.
    mixed = values + (torch.full_like(values, seed) + 1) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ _shifted(mixed, shift)) * factor
    return mixed ^ _shifted(mixed, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return value if bits == 0 else (value >> bits) & ((1 << (64 - bits)) - 1)

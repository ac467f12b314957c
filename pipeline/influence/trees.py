"""Arithmetic on vectors in parameter space, kept as named tensors; a name that is missing stands for zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pipeline.types import Tree


def tree_map(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """Apply a function to every tensor."""
    return {name: function(value) for name, value in tree.items()}


def scaled(tree: Tree, factor: float) -> Tree:
    """`factor * tree`."""
    return tree_map(lambda value: value * factor, tree)


def times(left: Tree, right: Tree) -> Tree:
    """Elementwise product, over the names that both have."""
    return {name: value * right[name] for name, value in left.items() if name in right}


def plus(left: Tree, right: Tree, factor: float = 1.0) -> Tree:
    """`left + factor * right`, over the names that either has."""
    total = dict(left)
    for name, value in right.items():
        total[name] = total[name] + factor * value if name in total else factor * value
    return total


def dot(left: Tree, right: Tree) -> Tensor:
    """Inner product, a scalar in float64: long sums in float32 lose digits."""
    products = [(value.double() * right[name].double()).sum() for name, value in left.items() if name in right]
    return torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float64)


def norm(tree: Tree) -> float:
    """Euclidean length."""
    return float(dot(tree, tree).detach().sqrt())


def restricted(tree: Tree, names: Iterable[str]) -> Tree:
    """The part of the tree that lies on these names."""
    return {name: tree[name] for name in names if name in tree}


def filled(tree: Tree, like: Tree) -> Tree:
    """The tree on the names of `like`, with zeros where it has none."""
    return {name: tree[name] if name in tree else torch.zeros_like(value) for name, value in like.items()}


def moved(state: Tree, vector: Tree, step: float) -> Tree:
    """`state + step * vector`; a vector on some of the state's names."""
    return {**state, **plus(restricted(state, vector), vector, step)}


def without_zeros(tree: Tree) -> Tree:
    """Drop tensors that are zero throughout: no tangent is carried for them."""
    return {name: value for name, value in tree.items() if bool(value.any())}


def flattened(tree: Tree, like: Tree) -> Tensor:
    """One vector `[p]` with the entries in the order of `like`."""
    return torch.cat([value.reshape(-1) for value in filled(tree, like).values()])


def unflattened(vector: Tensor, like: Tree) -> Tree:
    """The inverse of `flattened`."""
    parts = torch.split(vector, [value.numel() for value in like.values()])
    return {name: part.reshape(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}


def to_device(tree: Tree, device: torch.device | str) -> Tree:
    """The same tree on another device, outside of any autograd graph."""
    return tree_map(lambda value: value.detach().to(device), tree)

"""Krylov subspaces of a symmetric operator: functions of a Hessian applied to a vector, and its leading eigenpairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]

#: A Krylov subspace is complete when what is left of the new vector is this small against the operator.
_EXHAUSTED = 1e-10


@dataclass(frozen=True)
class Krylov:
    """An operator seen from a start vector.

    Attributes:
        basis: orthonormal rows `[k, p]`, the first along the start vector.
        values: Ritz values `[k]`, ascending; the outermost approach the outermost eigenvalues.
        vectors: eigenvectors of the small matrix in columns `[k, k]`.
        length: length of the start vector.
    """

    basis: Tensor
    values: Tensor
    vectors: Tensor
    length: float

    def apply(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`f(A) start`, exact for polynomials of degree below `k`."""
        small = self.vectors @ (function(self.values) * self.vectors[0])
        return self.length * (small.to(self.basis.dtype) @ self.basis)


def krylov(operator: Operator, start: Tensor, steps: int) -> Krylov:
    """Lanczos with full reorthogonalisation: at most `steps` products with the operator.

    Args:
        operator: symmetric, on vectors `[p]`.
        start: a vector that is not zero.
        steps: the largest dimension of the subspace.
    """
    length = float(start.norm())
    most = min(steps, start.numel())
    rows = start.new_empty(most, start.numel())
    rows[0] = start / length
    diagonal: list[float] = []
    beside: list[float] = []
    for count in range(1, most + 1):
        image = operator(rows[count - 1])
        size = float(image.norm())
        diagonal.append(float(rows[count - 1] @ image))
        for _again in range(2):  # once is not enough in float32
            image = image - (rows[:count] @ image) @ rows[:count]
        left = float(image.norm())
        if left <= _EXHAUSTED * max(size, 1e-300) or count == most:
            break
        beside.append(left)
        rows[count] = image / left
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device=start.device))
    off = torch.tensor(beside, dtype=torch.float64, device=start.device)
    matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return Krylov(rows[: len(diagonal)], values, vectors, length)


def leading_eigenpairs(operator: Operator, start: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The eigenpairs of largest absolute value: values `[k]` and unit vectors in rows `[k, p]`, `k <= count`."""
    space = krylov(operator, start, 2 * count + 8)
    order = space.values.abs().argsort(descending=True)[:count]
    rows = space.vectors[:, order].T.to(space.basis.dtype) @ space.basis
    return space.values[order], rows

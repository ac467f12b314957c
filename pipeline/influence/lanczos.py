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
        basis: orthonormal rows `[k, p]`, the first along the start vector; on the CPU, like the rest.
        values: Ritz values `[k]`, ascending; the outermost approach the outermost eigenvalues.
        vectors: eigenvectors of the small matrix in columns `[k, k]`.
        length: length of the start vector.
    """

    basis: Tensor
    values: Tensor
    vectors: Tensor
    length: float

    def apply(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`f(A) start` `[p]`, exact for polynomials of degree below `k`.

        Args:
            function: of the Ritz values `[k]`, float64, elementwise.
        """
        small = self.vectors @ (function(self.values) * self.vectors[0])
        return self.length * (small.to(self.basis.dtype) @ self.basis)


def krylov(operator: Operator, start: Tensor, steps: int) -> Krylov:
    """Lanczos with full reorthogonalisation: at most `steps` products with the operator.

    The basis is kept in main memory, and made orthogonal there; the operator's device holds one vector of it at a time.

    Args:
        operator: symmetric, on vectors `[p]` on the device of `start`.
        start: the vector `[p]`; of zeros the subspace is one row of zeros, with the value 0.
        steps: the largest dimension of the subspace.
    """
    device, start = start.device, start.cpu()
    length = float(start.norm())
    most = min(steps, start.numel())
    rows = start.new_empty(most, start.numel())
    rows[0] = start / (length or 1.0)
    diagonal: list[float] = []
    beside: list[float] = []
    for count in range(1, most + 1):
        image = operator(rows[count - 1].to(device)).cpu()
        size = float(image.norm())
        diagonal.append(float(rows[count - 1] @ image))
        for _again in range(2):  # once is not enough in float32
            image = image - (rows[:count] @ image) @ rows[:count]
        left = float(image.norm())
        if left <= _EXHAUSTED * max(size, 1e-300) or count == most:
            break
        beside.append(left)
        rows[count] = image / left
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside, dtype=torch.float64)
    matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return Krylov(rows[: len(diagonal)], values, vectors, length)


def leading_eigenpairs(operator: Operator, start: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The eigenpairs of largest absolute value: values `[k]` and unit vectors in rows `[k, p]`, `k <= count`.

    Arguments as of `krylov`, where `start` is not zero; what comes back is on the CPU.
    """
    space = krylov(operator, start, 2 * count + 8)
    order = space.values.abs().argsort(descending=True)[:count]
    rows = space.vectors[:, order].T.to(space.basis.dtype) @ space.basis
    return space.values[order], rows

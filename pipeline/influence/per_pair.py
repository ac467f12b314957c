"""A gradient per pair, for the exact forms of the self-influences: costly, for small models and for tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad

from pipeline.influence.forward_mode import push_forward
from pipeline.influence.losses import Neighbours
from pipeline.influence.passes import Passes
from pipeline.influence.trees import dot, filled, flattened, times
from pipeline.influence.twice import TwiceDifferentiable
from pipeline.types import Features, PairBatch, Tree

LossOfPair = Callable[[Features, Features, Neighbours], Tensor]


def self_values(
    passes: Passes,
    state: Tree,
    vectors: dict[str, Tree],
    batch: PairBatch,
    reference: PairBatch,
    loss: LossOfPair,
    near: Callable[[PairBatch], Neighbours],
    bracket: bool,
) -> Tensor:
    """`<G_z, P G_z>`, or with `bracket` Eq. 12's `<G_z, P H_B P G_z + P H_z P G_B>`, of each pair, `[b]`.

    Args:
        passes: the model.
        state: parameters and buffers.
        vectors: `scale` (the diagonal of `P`), and for the bracket `push` (`P G_B`) and `hessian` (`H_B` as a matrix
            over the parameters of `scale` in the order of their names).
        batch: the pairs.
        reference: R; its features move with the parameters, as in every derivative of `l_z`.
        loss: of pairs against R.
        near: the neighbours of pairs in R.
        bracket: which of the two.
    """
    scale = vectors["scale"]
    point = {name: state[name] for name in sorted(scale)}  # stored vectors come back in another order
    values: list[Tensor] = []
    for index in range(len(batch)):
        pair = batch[index : index + 1]
        beside = near(pair)

        def of_pair(params: Tree, pair: PairBatch = pair, beside: Neighbours = beside) -> Tensor:
            moved = {**state, **params}
            return loss(passes.features(moved, pair), passes.features(moved, reference), beside)[0]

        if not bracket:
            gradient = grad(of_pair)(point)
            values.append(dot(gradient, times(gradient, scale)))
            continue
        with TwiceDifferentiable():
            gradient, bent = push_forward(grad(of_pair), (point,), (filled(vectors["push"], point),))
        scaled = times(gradient, scale)
        flat = flattened(scaled, point)
        values.append(flat @ (vectors["hessian"]["matrix"] @ flat) + dot(scaled, bent))
    return torch.stack(values)

"""Gradient and Hessian-vector products of the mean loss of a whole batch, however large.

The loss couples the pairs of a batch, the towers do not: features are computed in chunks, the loss is differentiated
with respect to the features, and each chunk is run again to carry that back to the parameters (gradient caching).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad

from pipeline.influence.forward_mode import pull_back, push_forward
from pipeline.influence.losses import batch_loss, similar_captions
from pipeline.influence.passes import Passes, chunks, joined, pass_size
from pipeline.influence.trees import plus
from pipeline.types import Features, PairBatch, Tree


class BatchLoss:
    """The mean contrastive loss of a fixed batch as a function of the parameters.

    Args:
        passes: the model.
        batch: the pairs, on the device of the parameters.
        names: the parameters that it is differentiated by.
    """

    def __init__(self, passes: Passes, batch: PairBatch, names: list[str]) -> None:
        self.passes = passes
        self.batch = batch
        self.names = names
        settings = passes.settings
        self.size = pass_size(settings.chunk, passes.model, batch)
        self.parts = list(chunks(batch, self.size))
        self.family = settings.family
        self.excluded = similar_captions(batch.captions, batch.captions, settings.equal_captions == "ignore")

    def _of_features(self, features: Features) -> Tensor:
        return batch_loss(features, self.excluded, self.family)

    @torch.no_grad()
    def value(self, state: Tree) -> Tensor:
        """The loss, a scalar."""
        with self.passes.ready(differentiable=False):
            return self._of_features(joined([self.passes.features(state, part) for part in self.parts]))

    def gradient(self, state: Tree) -> Tree:
        """`grad L` at `state`, on the named parameters."""
        point = {name: state[name] for name in self.names}
        with self.passes.ready():
            with torch.no_grad():
                features = joined([self.passes.jet(state, {}, part, [()])[()] for part in self.parts])
            pull = self._split(grad(self._of_features)(features))
            total: Tree = {}
            for part, cotangent in zip(self.parts, pull, strict=True):
                total = plus(total, self._pulled_back(state, point, part, cotangent))
        return {name: value.detach() for name, value in total.items()}

    def hessian_product(self, state: Tree, vector: Tree) -> Tree:
        """`H v` at `state` (exact, forward over reverse), on the named parameters.

        `H v = d/ds J(theta + s v)^T c(s)`, with `c` the loss's gradient with respect to the features.
        """
        point = {name: state[name] for name in self.names}
        moved = {name: vector[name] if name in vector else torch.zeros_like(point[name]) for name in self.names}
        with self.passes.ready():
            with torch.no_grad():
                values, slopes = [], []
                for part in self.parts:
                    jet = self.passes.jet(state, {"v": vector}, part, [("v",)])
                    values.append(jet[()])
                    slopes.append(jet[("v",)])
            pull, pull_slope = push_forward(grad(self._of_features), (joined(values),), (joined(slopes),))
            total: Tree = {}
            for part, cotangent, change in zip(self.parts, self._split(pull), self._split(pull_slope), strict=True):
                _, product = push_forward(
                    lambda p, c, part=part: self._pulled_back(state, p, part, c), (point, cotangent), (moved, change)
                )
                total = plus(total, product)
        return {name: value.detach() for name, value in total.items()}

    def _pulled_back(self, state: Tree, point: Tree, part: PairBatch, cotangent: Features) -> Tree:
        tree: Tree = pull_back(lambda p: self.passes.features({**state, **p}, part), point, cotangent)
        return tree

    def _split(self, features: Features) -> list[Features]:
        """Cotangents of the chunks; scale and bias are the same number in each, so one chunk carries theirs."""
        images = torch.split(features.image, self.size)
        texts = torch.split(features.text, self.size)
        nothing = torch.zeros_like(features.scale)
        return [
            Features(image, text, *((features.scale, features.bias) if index == 0 else (nothing, nothing)))
            for index, (image, text) in enumerate(zip(images, texts, strict=True))
        ]

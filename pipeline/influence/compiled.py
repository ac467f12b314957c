"""Passes with tangents as compiled programs: traced with the rules they run by, then fused by TorchInductor.

A program has fixed shapes: a number of pairs (where there are fewer, the last one is repeated) and captions of a
multiple of 8 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_map

from pipeline.errors import InputError
from pipeline.influence.arithmetic import PrecisionRecorded
from pipeline.influence.memory import lacks_memory
from pipeline.types import Features, PairBatch, Tree, longest_caption

#: A pass: state, one or several directions, images and tokens in; features and their derivatives out.
Pass = Callable[[Tree, Any, Tensor, Tensor], list[Features]]

#: Captions are cut to a multiple of this many tokens.
_TOKENS = 8


class Programs:
    """Compiles a pass once for each number of tokens, and runs it.

    Args:
        model: whose pass it is.
        size: pairs of each program.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        self.model = model
        self.size = size
        self._compiled: dict[tuple[Any, ...], Callable[..., list[Features]]] = {}

    def take(self, pairs: PairBatch) -> bool:
        """Whether a program runs these pairs: where they fill more than half of it, or are the very first ones."""
        return len(pairs) <= self.size and (not self._compiled or self.size // 2 < len(pairs))

    def run(self, work: Pass, state: Tree, along: Any, pairs: PairBatch) -> list[Features]:
        """What `work` gives for the pairs.

        Raises `InputError` where it cannot be compiled.
        """
        images, tokens = (_filled(part, self.size) for part in (pairs.images, self._cut(pairs.tokens)))
        state, along = (tree_map(Tensor.contiguous, each) for each in (state, along))
        inputs = [state, along, images, tokens]
        key = (work.__name__, images.shape, tokens.shape, _shapes(along))
        if key not in self._compiled:
            self._compiled[key] = self._compile(work, inputs)
        rows = slice(len(pairs))
        return [
            Features(part.image[..., rows, :], part.text[..., rows, :], part.scale, part.bias)
            for part in self._compiled[key](*inputs)
        ]

    def _cut(self, tokens: Tensor) -> Tensor:
        """The tokens up to the next multiple of 8 after the longest caption, if the model cuts captions itself."""
        if not getattr(self.model, "cuts_captions", False):
            return tokens
        return tokens[:, : -(-longest_caption(tokens) // _TOKENS) * _TOKENS]

    def _compile(self, work: Pass, inputs: list[Any]) -> Callable[..., list[Features]]:
        import torch._inductor  # takes a second

        def recorded(*given: Any) -> list[Features]:
            with PrecisionRecorded():
                return work(*given)

        try:
            with _captions_as_given(self.model):
                graph = make_fx(recorded)(*inputs)
            graph.graph.eliminate_dead_code()
            graph.recompile()
            # Kernels have their number of threads built in, and the cache on disk is other processes', too.
            options = {"cpp.threads": torch.get_num_threads()}
            compiled: Callable[..., list[Features]] = torch._inductor.compile(graph, inputs, options=options)
        except Exception as error:  # tracing and compiling raise many types
            if lacks_memory(error):
                raise
            text = " ".join(str(error).split())[:300]
            raise InputError(f"the model's passes could not be compiled: {text}; use score.compile: false") from error
        return compiled


@contextmanager
def _captions_as_given(model: nn.Module) -> Iterator[None]:
    """Within this context the model does not cut captions, which would take a look at the tokens."""
    before = getattr(model, "cuts_captions", None)
    if before:
        model.cuts_captions = False  # type: ignore[assignment]
    try:
        yield
    finally:
        if before:
            model.cuts_captions = before


def _filled(rows: Tensor, size: int) -> Tensor:
    """The rows, the last one repeated until there are `size`."""
    if len(rows) == size:
        return rows.contiguous()
    return torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])])


def _shapes(directions: Any) -> tuple[Any, ...]:
    """Names and shapes of the directions."""
    leaves, names = tree_flatten(directions)
    return (names, *(leaf.shape for leaf in leaves))

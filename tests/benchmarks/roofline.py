"""What a GPU could do at best, on paper: operations and bytes of each kernel of a pass, against a GPU's rates.

    python -m tests.benchmarks.roofline [--models ViT-B-32 ViT-B-16] [--pairs 8] [--matrix 790] [--bandwidth 4.0]

The passes run here, on the CPU, with random images and captions of full length; every operator but views is taken for a
kernel that reads its arguments from memory once and writes its result; those of `pipeline.influence.fused` count as the
one kernel that they are on a GPU. A kernel takes as long as its operations at the matrix rate (TFlop/s in bfloat16;
half of it in tf32) or its bytes at the bandwidth (TB/s), whichever is longer. `share`: useful operations, 3 and 6 times
those of a forward pass, over what the matrix rate would do in that time. What a pass does once whatever its size
(casting weights, moving them) is taken per `--batch` pairs. This is a limit of these kernels, not a measurement of a
GPU.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.evaluation.flops import flop_counter
from pipeline.influence import Scorer, Settings, fused
from pipeline.models.clip import PairModel, build_model
from tests.benchmarks.gpu import forward_flops
from tests.benchmarks.passes import LIMITS, plans_of, random_pairs

PRECISIONS: list[Literal["bf16", "tf32"]] = ["bf16", "tf32"]

#: Shares of the time that are printed.
KINDS = ("products", "norms", "softmax", "activations", "casts and copies", "others")


class Kernels(TorchDispatchMode):
    """Adds up what kernels would take, by kind: operations, bytes, seconds.

    Args:
        rates: operations per second by dtype.
        bandwidth: bytes per second.
    """

    def __init__(self, rates: dict[torch.dtype, float], bandwidth: float) -> None:
        super().__init__()
        self.rates = rates
        self.bandwidth = bandwidth
        self.seconds: Counter[str] = Counter()
        self.bytes = 0
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with flop_counter() as counter:
            found = func(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(part) if isinstance(t, Tensor)] for part in ((args, kwargs), found))
        if _starts_none(func, made):
            return found
        self.add(str(func), counter.get_total_flops(), given, made)
        return found

    def add(self, name: str, flops: int, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """One kernel."""
        moved = sum(_size(tensor) for tensor in [*given, *made])
        rate = self.rates.get(made[0].dtype, self.rates[torch.float32])
        self.seconds[_kind(name, flops)] += max(flops / rate, moved / self.bandwidth)
        self.bytes += moved
        self.flops += flops

    def attention(self, tensors: list[Tensor], mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        """The kernel of attention, in place of which nothing is computed: six products, of which none is written."""
        pairs, heads, tokens, width = tensors[0].shape
        made = [tensors[0].new_empty(pairs, tokens, heads, width).transpose(1, 2) for _ in range(2)]
        self.add("attention", 6 * 2 * pairs * heads * tokens * tokens * width, tensors, made)
        return made[0], made[1]

    def norm(self, x: list[Tensor], parameters: list[Tensor], eps: float) -> tuple[Tensor, Tensor]:
        """The kernel of layer norm."""
        self.add("norm", 0, x, x)
        return x[0], x[1]

    def gelu(self, x: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The kernel of gelu."""
        self.add("gelu", 0, x, x)
        return x[0], x[1]

    @contextmanager
    def as_on_a_gpu(self) -> Iterator[None]:
        """Within this context passes take the kernels that they would on a GPU, and count them."""
        with ExitStack() as stack:
            for name in ("attention", "norm", "gelu"):
                stack.enter_context(patch.object(fused, f"takes_{name}", lambda *given: True))
                stack.enter_context(patch.object(fused, f"{name}_with_tangent", getattr(self, name)))
            yield


def _starts_none(func: Any, made: list[Tensor]) -> bool:
    """Whether it gives an argument under another shape, or tells something about it, and so starts no kernel."""
    aliases = [result.alias_info for result in func._schema.returns]
    views = any(alias is not None and not alias.is_write for alias in aliases)
    views |= any(name in str(func) for name in ("_unsafe_view", "empty"))
    return views or not made or max(tensor.numel() for tensor in made) <= 1


def _size(tensor: Tensor) -> int:
    """Bytes, of expanded tensors once."""
    return tensor.itemsize * prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)


def _kind(name: str, flops: int) -> str:
    if flops:
        return "products"
    for kind, parts in {
        "norms": ("norm", "addcmul"),
        "softmax": ("softmax",),
        "activations": ("gelu", "sigmoid", "silu"),
        "casts and copies": ("_to_copy", "copy_", "clone", "cat"),
    }.items():
        if any(part in name for part in parts):
            return kind
    return "others"


def measured(
    scorer: Scorer, model: PairModel, count: int, rates: dict[torch.dtype, float], bandwidth: float
) -> Kernels:
    """The kernels of one part of `count` pairs."""
    pairs = random_pairs(model, count, 1)
    part = scorer._parts[0]
    with torch.no_grad(), scorer.passes.ready():
        near = scorer.neighbours(pairs)
        with Kernels(rates, bandwidth) as kernels, kernels.as_on_a_gpu():
            part.score(pairs, near)
    return kernels


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "ViT-B-16"])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--matrix", type=float, default=790.0)
    parser.add_argument("--bandwidth", type=float, default=4.0)
    options = parser.parse_args()
    matrix, bandwidth = options.matrix * 1e12, options.bandwidth * 1e12
    rates = {torch.bfloat16: matrix, torch.float32: matrix / 2}
    columns = ["model", "precision", "passes", "GFlop", "MB", "pairs/s at most", "share", *KINDS]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in options.models:
        model = build_model(name)
        forward = forward_flops(model, random_pairs(model, 1, 1))
        for precision in PRECISIONS:
            peak = rates[torch.bfloat16 if precision == "bf16" else torch.float32]
            for form in ("tracin", "diff-in central"):
                reference, settings = random_pairs(model, 4, 2), Settings(precision=precision)
                scorer = Scorer(model, plans_of(form, model), reference, settings)
                one, more = (measured(scorer, model, n, rates, bandwidth) for n in (options.pairs, 2 * options.pairs))

                def per_pair(first: float, second: float) -> float:
                    slope = (second - first) / options.pairs
                    return slope + (first - slope * options.pairs) / options.batch

                seconds = {kind: per_pair(one.seconds[kind], more.seconds[kind]) for kind in KINDS}
                total = sum(seconds.values())
                share = LIMITS[form] * forward / total / peak
                cells = [name, precision, form.split()[0], f"{per_pair(one.flops, more.flops) / 1e9:.3g}"]
                cells += [f"{per_pair(one.bytes, more.bytes) / 1e6:.3g}", f"{1 / total:,.0f}", f"{share:.0%}"]
                print(f"| {' | '.join(cells + [f'{seconds[kind] / total:.0%}' for kind in KINDS])} |", flush=True)


if __name__ == "__main__":
    main()

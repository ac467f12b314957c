"""Rates of products of matrices on a GPU, at the shapes of a ViT's layers and with both products of a tangent as one.

    python -m tests.benchmarks.products [--pairs 1024] [--device cuda]

In bfloat16, TFlop/s. `x W`: a layer's value; `sliced`: of operands that are slices of those of `deep`. `+= x W`: added
in place to what is there. `deep`: `[dx x] [W dW]`, both products of a tangent as one of twice the depth. `tall`: the
value and the first of them as one of twice the rows. The last line is what a copy reads and writes per second.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from pipeline.influence.arithmetic import arithmetic
from tests.benchmarks.timing import device_named, seconds

#: Tokens of a pair, and width, of the towers of ViT-B-32.
TOWERS = {"image": (50, 768), "text": (77, 512)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = device_named(options.device)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).bfloat16()

    print("| tower | rows | deep | wide | x W | sliced | += x W | deep | tall |\n|---|---|---|---|---|---|---|---|---|")
    for tower, (tokens, width) in TOWERS.items():
        for deep, wide in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
            rows = options.pairs * tokens
            x, dx, w, dw, b = drawn(rows, deep), drawn(rows, deep), drawn(wide, deep), drawn(wide, deep), drawn(wide)
            total, beside, weights = drawn(rows, wide), torch.cat([dx, x], 1), torch.cat([w, dw], 1)
            stacked = torch.cat([x, dx])
            forms: list[tuple[int, Callable[[], object]]] = [
                (1, lambda x=x, w=w, b=b: linear(x, w, b)),  # type: ignore[misc]
                (1, lambda x=beside, w=weights, n=deep, b=b: linear(x[:, n:], w[:, :n], b)),  # type: ignore[misc]
                (1, lambda t=total, x=x, dw=dw: t.addmm_(x, dw.t())),  # type: ignore[misc]
                (2, lambda x=beside, w=weights, b=b: linear(x, w, b)),  # type: ignore[misc]
                (2, lambda x=stacked, w=w: linear(x, w)),  # type: ignore[misc]
            ]
            with arithmetic("bf16"):
                rates = [2e-12 * n * rows * deep * wide / seconds(form, device, 20, 3) for n, form in forms]
            print(f"| {tower} | {rows} | {deep} | {wide} | {' | '.join(f'{rate:.3g}' for rate in rates)} |", flush=True)
    source = drawn(options.pairs, 2**20 if device.type == "cuda" else 2**10)
    target = torch.empty_like(source)
    taken = seconds(lambda: target.copy_(source), device, 20, 3)
    print(f"\ncopy: {2e-12 * source.nbytes / taken:.2f} TB/s")


if __name__ == "__main__":
    main()

"""Attention and its tangent on a GPU: torch's own derivative, the rule used here, and differences of the fused kernel.

    python -m tests.benchmarks.attention [--pairs 1024] [--precision bf16] [--device cuda] [--blocks 64 32 4 2 ...]

Image towers of ViT-B-32 and ViT-B-16 at 224 px and the text tower with its mask, one layer each. `ms`: the median of
ten calls, for value and tangent; `GB`: what a call takes at most beyond what it is given; `error`: of the tangent of 4
pairs to float64, relative to its largest value. The fused kernel has no forward derivative: a central difference of two
calls takes its place, with the step that balances rounding and curvature for inputs of unit size. Queries, keys and
values are slices of one projection, as in a model. `--blocks`, once or more, tries the kernel with so many queries and
keys in a block, warps, and blocks that are loaded at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pipeline.influence import fused
from pipeline.influence.arithmetic import arithmetic
from pipeline.influence.forward_mode import carrying, parted, push_named_forward
from pipeline.influence.tangents import TangentRules
from tests.benchmarks.timing import device_named, seconds

#: Heads and tokens of a layer, and whether it is masked; 64 values per head.
LAYERS = {"ViT-B-32 image": (12, 50, False), "ViT-B-16 image": (12, 197, False), "text": (8, 77, True)}

Inputs = tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]
Form = Callable[[Inputs], tuple[Tensor, Tensor]]


def inputs(pairs: int, layer: str, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Queries, keys and values `[pairs, heads, tokens, 64]`, their tangents, and the mask."""
    heads, tokens, masked = LAYERS[layer]
    generator = torch.Generator(device).manual_seed(0)
    at, along = (
        dict(
            zip(
                "qkv",
                torch.randn(shape, generator=generator, device=device).to(dtype).transpose(1, 3).unbind(2),
                strict=True,
            )
        )
        for shape in [(pairs, tokens, 3, heads, 64)] * 2  # apart: a tangent must lie in its storage as the value does
    )
    mask = torch.full((tokens, tokens), -torch.inf, device=device, dtype=dtype).triu(1) if masked else None
    return at, along, mask


def by_torch(given: Inputs) -> tuple[Tensor, Tensor]:
    """torch's derivative of its attention in single products."""
    at, along, mask = given
    with sdpa_kernel(SDPBackend.MATH):
        value, tangent = push_named_forward(
            lambda p: [scaled_dot_product_attention(p["q"], p["k"], p["v"], mask)], at, along
        )
    return value[0], tangent[0]


def by_single_products(given: Inputs) -> tuple[Tensor, Tensor]:
    """The rule of passes with tangents where there is no kernel."""
    with patch.object(fused, "takes_attention", lambda *given: False):
        return by_rule(given)


def by_rule(given: Inputs) -> tuple[Tensor, Tensor]:
    """The rule of passes with tangents, by the kernel where it takes these."""
    at, along, mask = given
    with torch.autograd.forward_ad.dual_level(), TangentRules():
        q, k, v = (carrying(at[name], along[name]) for name in "qkv")
        value, tangent = parted(scaled_dot_product_attention(q, k, v, mask))
    assert tangent is not None
    return value, tangent


def by_differences(given: Inputs) -> tuple[Tensor, Tensor]:
    """A central difference of the fused kernel, two calls; the value is their mean."""
    at, along, mask = given
    step = torch.finfo(at["q"].dtype).eps ** (1 / 3)
    ahead, behind = (
        scaled_dot_product_attention(*(torch.add(at[name], along[name], alpha=sign * step) for name in "qkv"), mask)
        for sign in (1, -1)
    )
    return (ahead + behind) / 2, (ahead - behind) / (2 * step)


FORMS: dict[str, Form] = {
    "torch's derivative": by_torch,
    "single products": by_single_products,
    "kernel": by_rule,
    "differences of the fused kernel": by_differences,
    "fused kernel, value alone": lambda given: (scaled_dot_product_attention(*given[0].values(), given[2]),) * 2,
}


def with_blocks(blocks: list[int]) -> Form:
    """The kernel with other blocks than its own."""

    def form(given: Inputs) -> tuple[Tensor, Tensor]:
        with patch.object(fused, "_blocks", return_value=tuple(blocks)):
            return by_rule(given)

    return form


def measured(form: Form, given: Inputs, device: torch.device) -> tuple[float, int]:
    """Seconds of a call, and the bytes it takes at most."""
    taken = seconds(lambda: form(given), device, 10, 2)
    if device.type != "cuda":
        return taken, 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    form(given)
    return taken, torch.cuda.max_memory_allocated() - before


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1024)
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=int, nargs=4, action="append", default=[])
    options = parser.parse_args()
    device = device_named(options.device)
    forms = FORMS | {f"kernel, blocks {' '.join(map(str, blocks))}": with_blocks(blocks) for blocks in options.blocks}
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    print("| layer | form | ms | GB | error |\n|---|---|---|---|---|")
    for layer in LAYERS:
        given, few = inputs(options.pairs, layer, dtype, device), inputs(4, layer, dtype, device)
        doubled = [{name: value.double() for name, value in part.items()} for part in few[:2]]
        exact = by_torch((*doubled, None if few[2] is None else few[2].double()))[1]  # type: ignore[arg-type]
        for name, form in forms.items():
            with torch.no_grad(), arithmetic(options.precision):
                if name.startswith("kernel"):
                    tensors = [*given[0].values(), *given[1].values()]
                    if not fused.takes_attention(tensors, given[2]):
                        print(f"| {layer} | {name} | not taken | - | - |")
                        continue
                try:
                    found = form(few)[1].double()
                    taken, most = measured(form, given, device)
                except Exception as problem:  # one row less, not a table
                    print(f"| {layer} | {name} | {type(problem).__name__} | - | - |", flush=True)
                    torch.cuda.empty_cache()
                    continue
            error = "-" if "alone" in name else f"{float((found - exact).abs().max() / exact.abs().max()):.1e}"
            print(f"| {layer} | {name} | {1e3 * taken:.2f} | {most / 1e9:.2f} | {error} |", flush=True)


if __name__ == "__main__":
    main()

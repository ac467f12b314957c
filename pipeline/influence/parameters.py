"""Which parameters of an open_clip model directions live on: all, the projections, or the last blocks as well."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pipeline.errors import InputError

# open_clip's names: ViT `visual.proj`, ResNet `visual.attnpool`, timm towers `visual.head` and their own pooling, text
# towers `text_projection`, and the loss's own scale and bias.
_PROJECTION = re.compile(
    r"(^|\.)(visual\.(proj$|attn_pool\.|attnpool\.|head\.|trunk\.(head|attn_pool)\.)|text_projection(\.|$)|text\.proj(\.|$)"
    r"|logit_scale$|logit_bias$)"
)
_BLOCK = re.compile(r"^(?P<stem>.*?(resblocks|blocks|stages|layers?))\.?(?P<index>\d+)\.(?P<rest>.*)$")
_FINAL = re.compile(r"(^|\.)(visual\.ln_post|visual\.trunk\.(norm|fc_norm|final_conv)|ln_final|text\.ln_final)\.")


def chosen_names(names: Iterable[str], choice: str) -> list[str]:
    """Names of the parameters that directions live on, in the order given.

    Args:
        names: all parameters of the model.
        choice: `all`; `projections` (the maps into the shared space, scale and bias); `last-K-blocks` (these, the
            norms before them and the last K blocks of each tower).

    Raises `InputError` for another choice, or when the model has no such parameters.
    """
    names = list(names)
    if choice == "all":
        return names
    if choice == "projections":
        chosen = [name for name in names if _PROJECTION.search(name)]
        if not any(not name.endswith(("logit_scale", "logit_bias")) for name in chosen):
            raise InputError(
                "score.parameters: expected a model with projections, found none; use last-K-blocks or all"
            )
        return chosen
    match = re.fullmatch(r"last-(\d+)-blocks", choice)
    if not match or int(match[1]) < 1:
        raise InputError(f"score.parameters: expected all, projections or last-K-blocks, found {choice!r}")
    last = _last_blocks(names, int(match[1]))
    if not last:
        raise InputError(f"score.parameters: expected a model with numbered blocks for {choice}, found none; use all")
    return [name for name in names if name in last or _PROJECTION.search(name) or _FINAL.search(name)]


def _last_blocks(names: list[str], count: int) -> set[str]:
    """Names in the `count` last blocks of each tower; blocks nested in stages are ordered stage first."""
    towers: dict[str, dict[tuple[int, int], list[str]]] = {}
    for name in names:
        match = _BLOCK.match(name)
        if not match:
            continue
        inner = _BLOCK.match(match["rest"])
        place = (int(match["index"]), int(inner["index"]) if inner else -1)
        towers.setdefault(match["stem"], {}).setdefault(place, []).append(name)
    chosen: set[str] = set()
    for blocks in towers.values():
        for place in sorted(blocks)[-count:]:
            chosen.update(blocks[place])
    return chosen

"""Lets torchvision import beside a torch of another build (CPU torch with a CUDA torchvision, or the reverse).

torchvision's C++ library does not load there, so its operators are never declared, and importing the package fails
while it registers shape functions for them. Declaring the two schemas it asks for at import is enough for the
transforms, which use no such operator. Import this module before torchvision, timm or open_clip.
"""

from __future__ import annotations

import importlib
import sys

import torch

_MISSING = "operator torchvision::nms does not exist"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _import_torchvision() -> torch.library.Library | None:
    """Import torchvision; returns the library of declared operators where that took declaring them."""
    try:
        importlib.import_module("torchvision")
        return None
    except RuntimeError as error:
        if _MISSING not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    importlib.import_module("torchvision")
    return library


#: Held for the life of the process: the operators vanish with it. None where torchvision imports unaided.
declared_operators = _import_torchvision()

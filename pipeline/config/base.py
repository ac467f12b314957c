"""What every section of the config is, and the types that several of them use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(gt=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0)]
Shards = str | list[str]

EstimatorName = Literal[
    "diff-in", "diff-in-self", "tracin", "tracin-self", "moso", "unrolled", "z0",
    "clip-score", "neg-clip-loss", "el2n", "grand", "random",
]  # fmt: skip


class Section(BaseModel):
    """Base of all config sections: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, use_attribute_docstrings=True)

"""What every pair is evaluated along at one checkpoint: named vectors and a list of probes, ready to be stored."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

from pipeline.types import Tree

#: The quantity of a pair that a probe evaluates: its loss against R or one of the plain baselines.
Quantity = Literal["loss", "similarity", "neg-clip-loss", "el2n", "random", "gradient-square", "self-bracket"]


@dataclass(frozen=True)
class Probe:
    """One number per pair: `weight * (derivative of the quantity) ** power`.

    Attributes:
        weight: factor of the probe in the checkpoint's term.
        along: names of the vectors along which the quantity is differentiated (none, one or two).
        at: the point: the checkpoint plus the sum of coefficient times vector.
        power: 1, or 2 for estimators that are quadratic in the pair's gradient.
        of: the quantity.
    """

    weight: float
    along: tuple[str, ...] = ()
    at: tuple[tuple[str, float], ...] = ()
    power: int = 1
    of: Quantity = "loss"


@dataclass
class ProbePlan:
    """How the term of every pair at one checkpoint is computed.

    Attributes:
        probes: their sum is the term (its square root, times `root_weight`, where `root_weight` is given).
        vectors: vectors in parameter space by name; parameters that are missing count as zero.
        root_weight: for estimators that are a norm: factor of the square root.
        facts: what was found out on the way and belongs into the run's record, such as the step size.
    """

    probes: list[Probe]
    vectors: dict[str, Tree] = field(default_factory=dict)
    root_weight: float | None = None
    facts: dict[str, float] = field(default_factory=dict)

    def to_tensors(self) -> tuple[Tree, str]:
        """The vectors as one flat dictionary of tensors, and the rest as JSON."""
        tensors = {
            f"{v}/{name}": value.contiguous() for v, tree in self.vectors.items() for name, value in tree.items()
        }
        rest = {
            "probes": [asdict(probe) for probe in self.probes],
            "vectors": list(self.vectors),
            "root_weight": self.root_weight,
            "facts": self.facts,
        }
        return tensors, json.dumps(rest)

    @staticmethod
    def from_tensors(tensors: Tree, metadata: str) -> ProbePlan:
        """The inverse of `to_tensors`."""
        rest = json.loads(metadata)
        vectors: dict[str, Tree] = {name: {} for name in rest["vectors"]}
        for key, value in tensors.items():
            vector, _, name = key.partition("/")
            vectors[vector][name] = value
        probes = [
            Probe(
                weight=probe["weight"],
                along=tuple(probe["along"]),
                at=tuple((name, coefficient) for name, coefficient in probe["at"]),
                power=probe["power"],
                of=probe["of"],
            )
            for probe in rest["probes"]
        ]
        return ProbePlan(probes, vectors, rest["root_weight"], rest["facts"])

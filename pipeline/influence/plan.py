"""What every pair is evaluated along at one checkpoint: named vectors and a list of probes, ready to be stored."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

from pipeline.influence.passes import Jet
from pipeline.types import Features, Tree

#: Where a probe is taken: the checkpoint plus the sum of coefficient times vector.
Point = tuple[tuple[str, float], ...]

#: The quantity of a pair that a probe evaluates: its loss against R or one of the plain baselines.
Quantity = Literal["loss", "similarity", "neg-clip-loss", "el2n", "random", "gradient-square", "self-bracket"]


@dataclass(frozen=True)
class Probe:
    """One number per pair: `weight * (derivative of the quantity) ** power`.

    Attributes:
        weight: factor of the probe in the checkpoint's term.
        along: names of the vectors along which the quantity is differentiated (none, one or two).
        at: the point.
        power: 1, or 2 for estimators that are quadratic in the pair's gradient.
        of: the quantity.
    """

    weight: float
    along: tuple[str, ...] = ()
    at: Point = ()
    power: int = 1
    of: Quantity = "loss"


@dataclass(frozen=True)
class Drawn:
    """A random vector that is drawn anew wherever it is needed: memory would not hold as many as there are.

    Attributes:
        of: name of the vector whose entries it has, each with a random sign.
        seed, index: decide the signs.
    """

    of: str
    seed: int
    index: int


@dataclass
class ProbePlan:
    """How the term of every pair at one checkpoint is computed.

    Attributes:
        probes: their sum is the term (its square root, times `root_weight`, where `root_weight` is given).
        vectors: vectors in parameter space by name; parameters that are missing count as zero.
        drawn: random ones by name; no point is displaced along them.
        root_weight: for estimators that are a norm: factor of the square root.
        facts: what was found out on the way and belongs in the run's record, such as the step size.
        reference: R's features and derivatives at the points of the probes, computed once for all workers that score;
            each of them computes what is missing.
    """

    probes: list[Probe]
    vectors: dict[str, Tree] = field(default_factory=dict)
    drawn: dict[str, Drawn] = field(default_factory=dict)
    root_weight: float | None = None
    facts: dict[str, float] = field(default_factory=dict)
    reference: dict[Point, Jet] = field(default_factory=dict)

    def to_tensors(self) -> tuple[Tree, str]:
        """The vectors and R's part as one flat dictionary of tensors, and the rest as JSON."""
        tensors = {
            f"{v}/{name}": value.contiguous() for v, tree in self.vectors.items() for name, value in tree.items()
        }
        jets: list[tuple[Point, list[tuple[str, ...]]]] = []
        for number, (point, jet) in enumerate(self.reference.items()):
            jets.append((point, list(jet)))
            for place, features in enumerate(jet.values()):
                for side, value in features._asdict().items():
                    tensors[f"{_reference(number, place)}/{side}"] = value.clone()  # scale and bias may share memory
        rest = {
            "probes": [asdict(probe) for probe in self.probes],
            "vectors": list(self.vectors),
            "drawn": {name: asdict(drawn) for name, drawn in self.drawn.items()},
            "root_weight": self.root_weight,
            "facts": self.facts,
            "reference": jets,
        }
        return tensors, json.dumps(rest)

    @staticmethod
    def from_tensors(tensors: Tree, metadata: str) -> ProbePlan:
        """The inverse of `to_tensors`."""
        rest = json.loads(metadata)
        trees: dict[str, Tree] = {name: {} for name in rest["vectors"]}
        for key, value in tensors.items():
            tree, _, name = key.partition("/")
            trees.setdefault(tree, {})[name] = value
        probes = [
            Probe(
                weight=probe["weight"],
                along=tuple(probe["along"]),
                at=_point(probe["at"]),
                power=probe["power"],
                of=probe["of"],
            )
            for probe in rest["probes"]
        ]
        reference = {
            _point(point): {
                tuple(names): Features(**trees.pop(_reference(number, place))) for place, names in enumerate(jet)
            }
            for number, (point, jet) in enumerate(rest["reference"])
        }
        drawn = {name: Drawn(**values) for name, values in rest.get("drawn", {}).items()}  # older plans: all are kept
        return ProbePlan(probes, trees, drawn, rest["root_weight"], rest["facts"], reference)


def _point(items: list[tuple[str, float]]) -> Point:
    return tuple((name, coefficient) for name, coefficient in items)


def _reference(number: int, place: int) -> str:
    return f"reference {number} {place}"

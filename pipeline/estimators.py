"""What each estimator computes, what it costs and what it is good for: the table of `diffprune estimators`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.literals import EstimatorName


@dataclass(frozen=True)
class EstimatorFacts:
    """One line of the table; costs are per pair and checkpoint, with the defaults of `score`.

    Attributes:
        name: the value of `score.estimator`.
        score: the formula, one term of its sum over checkpoints.
        tangents: directions that forward-mode passes carry.
        forwards: plain forward passes.
        needs: what it needs beyond checkpoints and pairs.
        purpose: what it is good for.
    """

    name: EstimatorName
    score: str
    tangents: int
    forwards: int
    needs: str
    purpose: str

    @property
    def for_a_target(self) -> bool:
        """Whether its utility is the expected help to the target."""
        return self.needs.startswith("target")

    @property
    def passes(self) -> str:
        """The cost in words."""
        parts = [(self.tangents, "tangent"), (self.forwards, "forward")]
        return " + ".join(f"{count} {kind}" for count, kind in parts if count) or "none"


ESTIMATORS: tuple[EstimatorFacts, ...] = (
    EstimatorFacts(
        "diff-in",
        "-t η² / (N m) ⟨g_V, H_B G_z + H_z G_B⟩",
        2,
        0,
        "target",
        "the effect of a pair on the target through later steps (Eq. 9)",
    ),
    EstimatorFacts(
        "diff-in-self",
        "the same with V = {z}",
        144,
        0,
        "-",
        "pairs that conflict with the rest of the data: candidates for wrong captions (Eq. 12)",
    ),
    EstimatorFacts(
        "tracin", "η ⟨g_V, G_z⟩", 1, 0, "target", "the effect of a pair on the target, at half the price of Diff-In"
    ),
    EstimatorFacts(
        "tracin-self", "η ⟨G_z, G_z⟩", 64, 0, "-", "pairs with large gradients: hard ones and wrong ones alike"
    ),
    EstimatorFacts(
        "moso", "η ⟨g_B, G_z⟩", 1, 0, "-", "agreement with the training set itself, where no target is at hand"
    ),
    EstimatorFacts(
        "unrolled",
        "η ⟨u, G_z⟩, u carried back from g_V at the last step",
        1,
        0,
        "target; the whole run",
        "the effect of a pair with what later steps forget or amplify, which Eq. 9 drops",
    ),
    EstimatorFacts(
        "z0",
        "⟨ĝ_V, ĝ_z⟩, ĝ from loss differences between checkpoints",
        0,
        1,
        "target; two checkpoints",
        "influence from losses alone, for models without forward derivatives",
    ),
    EstimatorFacts("clip-score", "cos(image, text)", 0, 1, "-", "wrong captions; the baseline to beat"),
    EstimatorFacts(
        "neg-clip-loss",
        "-row loss / logit scale",
        0,
        1,
        "-",
        "the same, corrected for captions and images that match everything",
    ),
    EstimatorFacts("el2n", "|p - onehot|", 0, 1, "-", "hard pairs; often used with a band"),
    EstimatorFacts("grand", "|G_z|", 64, 0, "-", "hard pairs, by the size of their gradient"),
    EstimatorFacts("random", "a hash of the uid", 0, 0, "-", "the floor that every other one has to beat"),
)


def facts_of(name: str) -> EstimatorFacts:
    """The line of an estimator."""
    return next(facts for facts in ESTIMATORS if facts.name == name)


def markdown_table() -> Iterator[str]:
    """The table as lines of Markdown."""
    yield "| `score.estimator` | passes per pair and checkpoint | needs | good for |"
    yield "|---|---|---|---|"
    for facts in ESTIMATORS:
        needs = "–" if facts.needs == "-" else facts.needs
        yield f"| `{facts.name}` | {facts.passes} | {needs} | {facts.purpose} |"

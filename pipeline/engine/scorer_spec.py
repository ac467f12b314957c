"""What the driver knows of scoring: what decides a run's scores, and how an actor makes its scorer. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config import Config
from pipeline.store import storage
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.scores import SCHEMA_VERSION

if TYPE_CHECKING:
    from pipeline.engine.predictor import ShardPredictor
    from pipeline.engine.sample_scorer import SampleScorer
    from pipeline.engine.shard_scorer import ShardScorer


def score_fingerprint(config: Config, checkpoints: list[str], basis: dict[str, Any]) -> Fingerprint:
    """The fingerprint of a run's scores, without a shard.

    Args:
        config: decides preprocessing and what is stored.
        checkpoints: digest of each checkpoint's content, in manifest order.
        basis: `pipeline.prepared.score_basis` of the directions: settings, R, B, V and the model's input.
    """
    parts = dict(basis)
    images = parts.pop("images")
    sampled = {"sample": config.score.sample} if config.score.sample < 1 else {}
    return Fingerprint(
        {
            **sampled,
            "schema_version": SCHEMA_VERSION,
            "checkpoints": checkpoints,
            "embeddings": config.score.embeddings,
            "held_out": config.score.held_out,
            **parts,
            "preprocessing": {
                **images,
                "model": model_identity(config),
                "caption": config.data.caption,
                **config.data.pixels,
                "source": config.data.source,
            },
        }
    )


def model_identity(config: Config) -> str:
    """What names the proxy's architecture: open_clip's name, or the digest of the JSON file's content."""
    model = config.proxy.model
    return storage.file_checksum(model) if model.endswith(".json") else model


@dataclass(frozen=True)
class ScorerSpec:
    """Makes the scorer of an actor from the files of a run's folder.

    Attributes:
        config: the run's.
        fingerprint: of the run's scores, without a shard.
    """

    config: Config
    fingerprint: Fingerprint

    def build(self, worker: str) -> ShardScorer:
        """Load model, checkpoints and plans once for this process."""
        from pipeline.engine.shard_scorer import ShardScorer, build_scorer

        return build_scorer(ShardScorer, self.config, self.fingerprint, worker)


@dataclass(frozen=True)
class SampleSpec(ScorerSpec):
    """Makes the work of amortised scoring's first pass: scores of the sampled pairs, embeddings of all."""

    def build(self, worker: str) -> SampleScorer:
        """Load model, checkpoints and plans once for this process."""
        from pipeline.engine.sample_scorer import SampleScorer
        from pipeline.engine.shard_scorer import build_scorer

        return build_scorer(SampleScorer, self.config, self.fingerprint, worker)


@dataclass(frozen=True)
class PredictorSpec:
    """Makes the work of the second pass: score files from those of the first and the regressor.

    Attributes:
        config: the run's.
        fingerprint: of the run's scores, the regressor's content included, without a shard.
        sampled: of the first pass, without a shard.
        runs: the proxy run of each checkpoint.
        error: root mean square error of predicted scores on held-out pairs.
    """

    config: Config
    fingerprint: Fingerprint
    sampled: Fingerprint
    runs: tuple[int, ...]
    error: float

    def build(self, worker: str) -> ShardPredictor:
        """Load the regressor."""
        from pipeline.engine.predictor import build_predictor

        return build_predictor(self.config, self.fingerprint, self.sampled, self.runs, self.error, worker)

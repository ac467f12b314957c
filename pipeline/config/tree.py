"""The config of a run as one tree of its sections."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.config.base import Section
from pipeline.config.scoring import (
    DataConfig,
    EngineConfig,
    ProxyConfig,
    ReferenceConfig,
    ScoreConfig,
    TargetConfig,
)
from pipeline.config.using import (
    EmitConfig,
    EvaluateConfig,
    ReportConfig,
    SelectConfig,
    TrackConfig,
    ValidateConfig,
)


class Config(Section):
    """The whole config of a run."""

    out: str = "runs/default"
    """The run's folder: a path or an fsspec URL."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides every random choice of the run; below 2^63."""
    data: DataConfig
    target: TargetConfig = TargetConfig()
    reference: ReferenceConfig = ReferenceConfig()
    proxy: ProxyConfig = ProxyConfig()
    score: ScoreConfig = ScoreConfig()
    engine: EngineConfig = EngineConfig()
    select: SelectConfig = SelectConfig()
    emit: EmitConfig = EmitConfig()
    evaluate: EvaluateConfig | None = None
    validation: ValidateConfig = ValidateConfig()
    track: TrackConfig = TrackConfig()
    report: ReportConfig = ReportConfig()

"""The config tree of a run: every setting, its type, its default and what it means, and how it is read."""

from pipeline.config.base import Section, Shards
from pipeline.config.loading import dump_config, load_config, parse_config
from pipeline.config.scoring import (
    MAX_PIXELS,
    DataConfig,
    EngineConfig,
    ProxyConfig,
    ReferenceConfig,
    ScoreConfig,
    TargetConfig,
)
from pipeline.config.tree import Config
from pipeline.config.using import (
    BalanceConfig,
    Band,
    DedupConfig,
    EmitConfig,
    EvaluateConfig,
    ReportConfig,
    SelectConfig,
    Threshold,
    TrackConfig,
    ValidateConfig,
)

__all__ = [
    "MAX_PIXELS",
    "BalanceConfig",
    "Band",
    "Config",
    "DataConfig",
    "DedupConfig",
    "EmitConfig",
    "EngineConfig",
    "EvaluateConfig",
    "ProxyConfig",
    "ReferenceConfig",
    "ReportConfig",
    "ScoreConfig",
    "Section",
    "SelectConfig",
    "Shards",
    "TargetConfig",
    "Threshold",
    "TrackConfig",
    "ValidateConfig",
    "dump_config",
    "load_config",
    "parse_config",
]

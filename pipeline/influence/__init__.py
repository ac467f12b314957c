"""The influence engine: from checkpoints and batches to a score per pair. Pure torch, no files, no Ray."""

from pipeline.influence.optimizer import StepRule
from pipeline.influence.plan import Probe, ProbePlan
from pipeline.influence.prepare import prepare, prepare_run
from pipeline.influence.regressor import Observed, Regressor, fit, scaled_up
from pipeline.influence.scorer import Scorer, with_reference
from pipeline.influence.settings import UTILITY, Batches, ScoreBatch, Settings, utility_of
from pipeline.influence.unrolled import Replay

__all__ = [
    "UTILITY",
    "Batches",
    "Observed",
    "Probe",
    "ProbePlan",
    "Regressor",
    "Replay",
    "ScoreBatch",
    "Scorer",
    "Settings",
    "StepRule",
    "fit",
    "prepare",
    "prepare_run",
    "scaled_up",
    "utility_of",
    "with_reference",
]

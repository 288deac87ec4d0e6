"""Gradient attribution of large language models with the GIM rules, on fused kernels."""

from gim import circuits, rules, targets
from gim.applied import AppliedReport, UnsupportedModelError
from gim.attribution import Attribution
from gim.context import GIM
from gim.evaluation.result import Evaluation
from gim.evaluation.run import EvaluationInterrupted, evaluate
from gim.explain import attribute, explain
from gim.intercept.interface import set_attention_rules
from gim.memory import EstimateError, MemoryEstimate, MemoryPlan, OutOfMemoryError, estimate_memory

__all__ = [
    "GIM",
    "AppliedReport",
    "Attribution",
    "EstimateError",
    "Evaluation",
    "EvaluationInterrupted",
    "MemoryEstimate",
    "MemoryPlan",
    "OutOfMemoryError",
    "UnsupportedModelError",
    "attribute",
    "circuits",
    "estimate_memory",
    "evaluate",
    "explain",
    "rules",
    "set_attention_rules",
    "targets",
]

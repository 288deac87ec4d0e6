"""Gradient attribution of large language models with the GIM rules, on fused kernels.

A public name is loaded when it is asked for: torch and transformers take seconds, and ``gim --help`` needs neither.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gim import circuits, rules, targets
    from gim.answering import AnswerInterrupted
    from gim.answers import AnswerAttribution
    from gim.applied import AppliedReport, UnsupportedModelError
    from gim.attribution import Attribution
    from gim.context import GIM
    from gim.evaluation.result import Evaluation
    from gim.evaluation.run import EvaluationInterrupted, evaluate
    from gim.intercept.interface import set_attention_rules
    from gim.layerwise import LayerwiseAttribution
    from gim.loading import load
    from gim.many import PromptError, PromptsInterrupted
    from gim.memory import EstimateError, MemoryEstimate, MemoryPlan, OutOfMemoryError, estimate_memory
    from gim.request import attribute, explain

#: Where each public name is defined; a module's own name stands for the module.
_HOMES = {
    "GIM": "gim.context",
    "AnswerAttribution": "gim.answers",
    "AnswerInterrupted": "gim.answering",
    "AppliedReport": "gim.applied",
    "Attribution": "gim.attribution",
    "EstimateError": "gim.memory",
    "Evaluation": "gim.evaluation.result",
    "EvaluationInterrupted": "gim.evaluation.run",
    "LayerwiseAttribution": "gim.layerwise",
    "MemoryEstimate": "gim.memory",
    "MemoryPlan": "gim.memory",
    "OutOfMemoryError": "gim.memory",
    "PromptError": "gim.many",
    "PromptsInterrupted": "gim.many",
    "UnsupportedModelError": "gim.applied",
    "attribute": "gim.request",
    "circuits": "gim.circuits",
    "estimate_memory": "gim.memory",
    "evaluate": "gim.evaluation.run",
    "explain": "gim.request",
    "load": "gim.loading",
    "rules": "gim.rules",
    "set_attention_rules": "gim.intercept.interface",
    "targets": "gim.targets",
}

__all__ = [
    "GIM",
    "AnswerAttribution",
    "AnswerInterrupted",
    "AppliedReport",
    "Attribution",
    "EstimateError",
    "Evaluation",
    "EvaluationInterrupted",
    "LayerwiseAttribution",
    "MemoryEstimate",
    "MemoryPlan",
    "OutOfMemoryError",
    "PromptError",
    "PromptsInterrupted",
    "UnsupportedModelError",
    "attribute",
    "circuits",
    "estimate_memory",
    "evaluate",
    "explain",
    "load",
    "rules",
    "set_attention_rules",
    "targets",
]


if not TYPE_CHECKING:  # to which a module with this function has every name

    def __getattr__(name: str) -> Any:
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(home)
        found = module if home == f"{__name__}.{name}" else getattr(module, name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

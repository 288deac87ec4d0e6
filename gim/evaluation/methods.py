"""What is evaluated: a method gives every token of a prompt a score."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gim.evaluation import captum_methods, fingerprint
from gim.evaluation.case import Case
from gim.evaluation.extras import need
from gim.request import explain
from gim.rules import PRESETS, Rules

#: Token ids ``[T]`` to scores ``[T]``.
Function = Callable[[torch.Tensor], Any]
MethodLike = str | Rules | Function


@dataclass(frozen=True)
class Method:
    """A method by the name that results call it.

    Args:
        name: as it was given.
        key: what tells it from another of the same name, for resuming.
        run: from a case to scores ``[T]``.
    """

    name: str
    key: str
    run: Callable[[Case], torch.Tensor]

    def scores(self, case: Case) -> torch.Tensor:
        """Scores ``[T]``, float64, on the CPU.

        Raises:
            TypeError: what are no numbers.
            ValueError: another shape, or numbers that are not finite.
        """
        given = self.run(case)
        try:
            found = torch.as_tensor(given, device="cpu").detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"method {self.name}: scores must be numbers, got {given!r:.80}") from error
        if found.is_complex():
            raise TypeError(f"method {self.name}: scores must be real numbers, got {found.dtype}")
        found = found.to(torch.float64)
        if found.shape != case.ids.shape:
            raise ValueError(
                f"method {self.name}: scores must have the shape of the ids {tuple(case.ids.shape)}, "
                f"got {tuple(found.shape)}"
            )
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"method {self.name}: scores must be finite, and those of {case.what} are not")
        return found


def _explained(rules: Rules) -> Callable[[Case], torch.Tensor]:
    """Attribution of the logit under backward rules, by :func:`gim.explain`."""

    def run(case: Case) -> torch.Tensor:
        return explain(
            case.model, case.ids, target_token_id=case.target, baseline_token_id=case.baseline_id, rules=rules
        )

    return run


def _random(case: Case) -> torch.Tensor:
    """Uniform numbers, drawn for this example whatever else is evaluated."""
    return torch.rand(len(case.ids), generator=torch.Generator().manual_seed(case.draw("random")), device="cpu")


def _attention(case: Case) -> torch.Tensor:
    """Attention weights of the last token, averaged over heads and layers."""
    with eager_attention(case.model) as model, torch.no_grad():
        weights = model(input_ids=case.ids[None], output_attentions=True, use_cache=False).attentions
    if not weights or any(one is None for one in weights):
        raise ValueError(f"method attention: {type(case.model).__name__} gives no attention weights")
    return torch.stack([layer[0, :, -1].double().mean(0).to(case.ids.device) for layer in weights]).mean(0)


class eager_attention:  # noqa: N801 - used as a function is
    """Inside, a transformers model computes attention in a way that has weights to give."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model

    def __enter__(self) -> Any:
        config: Any = getattr(self._model, "config", None)
        self._before = getattr(config, "_attn_implementation", None)
        if self._before is None or not hasattr(self._model, "set_attn_implementation"):
            raise ValueError(
                f"method attention: {type(self._model).__name__} is no transformers model that gives attention weights"
            )
        self._model.set_attn_implementation("eager")
        if config._attn_implementation != "eager":  # transformers only logs where a model cannot switch
            raise ValueError(f"method attention: {type(self._model).__name__} cannot switch to eager attention")
        return self._model

    def __exit__(self, *_: object) -> None:
        self._model.set_attn_implementation(self._before)


@dataclass(frozen=True)
class Kind:
    """A method that is named with an optional number behind a colon.

    Args:
        run: from a case and that number to scores.
        number: what the number is; empty where there is none.
        default: the number where none is given; None where it depends on the prompt.
        needs: modules of the extra.
    """

    run: Callable[[Case, int | None], torch.Tensor]
    number: str = ""
    default: int | None = None
    needs: tuple[str, ...] = ()


#: By lower-case name. Presets of :mod:`gim.rules` come before these.
KINDS: dict[str, Kind] = {
    "ig": Kind(captum_methods.integrated_gradients, "steps", 50, ("captum.attr",)),
    "gradient_x_input": Kind(captum_methods.gradient_x_input, needs=("captum.attr",)),
    "gradient_x_difference": Kind(lambda case, _: _explained(PRESETS["GRADIENT"])(case)),
    "occlusion": Kind(captum_methods.occlusion, needs=("captum.attr",)),
    "kernelshap": Kind(captum_methods.kernel_shap, "samples", None, ("captum.attr", "sklearn.linear_model")),
    "lime": Kind(captum_methods.lime, "samples", 100, ("captum.attr", "sklearn.linear_model")),
    "deeplift": Kind(captum_methods.deep_lift, needs=("captum.attr",)),
    "attention": Kind(lambda case, _: _attention(case)),
    "random": Kind(lambda case, _: _random(case)),
}
NAMES = (*PRESETS, "gradient_x_input", "gradient_x_difference", "IG", "occlusion", "KernelSHAP", "LIME", "DeepLIFT",
         "attention", "random")  # fmt: skip


def parse(methods: Iterable[MethodLike] | MethodLike) -> list[Method]:
    """Methods by name, as rules, or as functions.

    Raises:
        ValueError: a name that is none, two methods of one name, one method by two names, no method.
        TypeError: something else.
        ImportError: a method whose package is not there.
    """
    if isinstance(methods, str | Rules) or callable(methods):
        methods = [methods]
    if not isinstance(methods, Iterable):
        raise TypeError(f"methods must be names, rules or functions, got {methods!r:.80}")
    given = list(methods)
    found = [_parse(one) for one in given]
    if not found:
        raise ValueError("methods must hold at least one method")
    names = [method.name for method in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"methods must have different names, got {name!r} {names.count(name)} times")
    known: dict[str, str] = {}
    for one, method in zip(given, found, strict=True):
        # A function's key is not all that it depends on.
        other = known.setdefault(method.key, method.name) if isinstance(one, str | Rules) else method.name
        if other != method.name:
            raise ValueError(f"methods must be different ones, and {other!r} and {method.name!r} are the same")
    return found


def _parse(one: MethodLike) -> Method:
    if isinstance(one, Rules):
        return Method(one.name, repr(one), _explained(one))
    if isinstance(one, str):
        return _named(one)
    if not callable(one):
        raise TypeError(f"methods must be names or functions from ids to scores, got {one!r:.80}")
    name = getattr(one, "__name__", type(one).__name__)
    return Method(name, fingerprint.of_function(one), lambda case: one(case.ids.clone()))


def _named(name: str) -> Method:
    rules = PRESETS.get(name.upper().replace("-", "_"))
    if rules is not None:
        return Method(name, repr(rules), _explained(rules))
    word, colon, number = name.partition(":")
    known = word.lower().replace("-", "_")
    kind = KINDS.get(known)
    if kind is None:
        raise ValueError(f"methods: {name!r} is none of {', '.join(NAMES)}")
    if not colon:
        argument = kind.default
    elif not kind.number or not re.fullmatch(r"[1-9]\d{0,6}", number):
        wanted = f"a whole number of {kind.number}, such as {word}:50" if kind.number else f"{word} alone"
        raise ValueError(f"methods: {name!r} must be {wanted}")
    else:
        argument = int(number)
    for module in kind.needs:
        need(module)
    return Method(name, f"{known}:{argument}", lambda case: kind.run(case, argument))

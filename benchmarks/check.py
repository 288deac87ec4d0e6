"""Holds every system against float64 before it is timed: what is wrong is never timed."""

from __future__ import annotations

import copy
from typing import Any

import torch

from benchmarks import decoder
from benchmarks.cases import AttentionCase, Case, ExplainCase, PointwiseCase
from benchmarks.systems import BASELINE, TARGET, System, inputs_of, rule_of
from gim_kernels import reference
from tests.oracle import assert_within_budget


def _attention(case: AttentionCase, rule: str, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    leaves = tuple(x.detach().requires_grad_(True) for x in inputs[:3])
    out = reference.attention(*leaves, causal=case.causal, softmax_backward=rule)
    if case.part == "forward":
        return (out,)
    grads = torch.autograd.grad(out, leaves, inputs[3], allow_unused=True)
    return (out, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)))


def _pointwise(case: PointwiseCase, rule: str, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    first, second, grad = inputs
    weight = second[0].abs() + 0.5
    x, up = first.detach().requires_grad_(True), second.detach().requires_grad_(True)
    frozen = case.frozen and rule != "exact"
    if case.op == "gated":
        out = reference.gated(x, up, "silu", grad_scale=(1.0, 1.0) if rule == "exact" else (0.5, 0.5))
        return (out, *torch.autograd.grad(out, (x, up), grad))
    if case.op == "rms_norm":
        out = reference.rms_norm(x, weight, 1e-6, frozen=frozen)
    else:
        out = reference.layer_norm(x, weight, None, 1e-6, frozen=frozen)
    return (out, *torch.autograd.grad(out, x, grad))


def expected(case: Case, rule: str, inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """What a system that computes ``rule`` must return, in eager PyTorch in ``dtype``."""
    if isinstance(case, ExplainCase):
        model, ids = inputs
        model = copy.deepcopy(model).to(dtype)
        return (decoder.attribution(model, ids, rule, target=TARGET, baseline=BASELINE),)
    cast = tuple(x.to(dtype) for x in inputs)
    if isinstance(case, AttentionCase):
        return _attention(case, rule, cast)
    return _pointwise(case, rule, cast)


#: One prompt's error in a whole model is nearly a single random number: several are judged together.
PROMPTS = 6


def _variations(case: Case, inputs: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The inputs, of a model with several prompts."""
    if not isinstance(case, ExplainCase):
        return [inputs]
    model, ids = inputs
    return [(model, (ids + shift) % case.sizes.vocabulary) for shift in range(PROMPTS)]


def wrong(case: Case, system: System, inputs: tuple[Any, ...], device: torch.device) -> str | None:
    """What is wrong with a system at a small case, in a line; None where it agrees with float64.

    Raises:
        Exception: whatever the system raises where it cannot run.
    """
    rule = rule_of(system, case)
    variations = _variations(case, inputs)

    def together(results: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
        return [torch.stack(parts) for parts in zip(*results, strict=True)]

    found = together([system.prepare(case, one, device)() for one in variations])
    truth = together([expected(case, rule, one, torch.float64) for one in variations])
    yardstick = together([expected(case, rule, one, _dtype(one)) for one in variations])
    try:
        for index, (one, exact, plain) in enumerate(zip(found, truth, yardstick, strict=True)):
            assert_within_budget(one, exact, plain.to(one.dtype), f"result {index}")
    except AssertionError as error:
        return str(error).splitlines()[0]
    return None


def _dtype(inputs: tuple[Any, ...]) -> torch.dtype:
    first = inputs[0]
    return first.dtype if isinstance(first, torch.Tensor) else next(first.parameters()).dtype


class Checks:
    """What was found wrong, so that cases that differ in their length only are checked once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._found: dict[tuple[Case, str], str | None] = {}

    def __call__(self, case: Case, systems: tuple[System, ...]) -> dict[str, str]:
        """For each of the systems that must not be timed, the reason.

        A system that cannot run at all is left to the caller, who finds out in the same way at the timed length.
        """
        small = case.small()
        todo = [one for one in systems if (small, one.name) not in self._found]
        if todo:
            inputs = inputs_of(small, self.device)
            for system in todo:
                try:
                    reason = wrong(small, system, inputs, self.device)
                except Exception:  # whatever a rival raises, it will raise again where it becomes a row
                    reason = None
                self._found[small, system.name] = reason
        found = {one.name: self._found.get((small, one.name)) for one in systems}
        return {name: f"wrong, not timed: {reason}" for name, reason in found.items() if reason is not None}

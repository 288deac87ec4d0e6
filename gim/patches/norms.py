"""Norms, recognised by what they compute and not by their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import gim_kernels
from gim.applied import ABSENT, Application, UnsupportedModelError
from gim.patches.session import Session, original_forward
from gim_kernels import engines, reference

#: Attributes under which norms keep their epsilon, the usual ones first.
EPSILONS = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps")
#: Epsilons that norms write into their forward without keeping them.
USUAL_EPSILONS = (1e-5, 1e-6, 1e-12)
#: Rows of a probe, and its width for a norm without a weight (which takes any).
PROBE_ROWS = 4
PROBE_WIDTH = 64
#: Roundings by which a norm and its equation may differ, in units in the last place of the norm's dtype.
PROBE_ULPS = 8


@dataclass(frozen=True)
class Norm:
    """What a norm was recognised as.

    Args:
        kind: ``"rms_norm"`` or ``"layer_norm"``.
        eps: its epsilon.
        weight_offset: what is added to its weight.
    """

    kind: str
    eps: float
    weight_offset: float = 0.0

    def describe(self) -> str:
        """In words, for the report."""
        weight = " with weight 1 + w" if self.weight_offset else ""
        return f"probed: {self.kind}{weight}"


def looks_like_norm(module: nn.Module) -> bool:
    """Whether a module is a norm by type or name, or could be one by its parameters: a single vector ``weight``."""
    if any(True for _ in module.children()):
        return False
    if "norm" in type(module).__name__.lower():
        return True
    parameters = dict(module.named_parameters(recurse=False))
    return set(parameters) in ({"weight"}, {"weight", "bias"}) and all(p.dim() == 1 for p in parameters.values())


def is_norm_by_name(module: nn.Module) -> bool:
    """Whether a module calls itself a norm."""
    return "norm" in type(module).__name__.lower()


def _epsilons(module: nn.Module, dtype: torch.dtype) -> list[float]:
    """Candidates for a norm's epsilon: the usual attributes, every other small number it holds, the usual literals.

    ``torch.nn.RMSNorm`` takes None for the machine epsilon of the type it computes in.
    """
    found = [getattr(module, name) for name in EPSILONS if hasattr(module, name)]
    found += [value for value in vars(module).values() if isinstance(value, float) and 0 <= value < 1e-1]
    machine = [torch.finfo(torch.promote_types(dtype, torch.float32)).eps, torch.finfo(dtype).eps]
    if None in found:
        found += machine
    numbers = [float(value) for value in found if isinstance(value, int | float)]
    return list(dict.fromkeys([*numbers, *USUAL_EPSILONS]))


def _apply(norm: Norm, module: nn.Module, x: torch.Tensor, *, frozen: bool) -> torch.Tensor:
    """The norm by its equation, through the kernels."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    # A weight of several rows is a vector for each head, which is applied outside the kernel.
    rows, inner = (None, weight) if weight is None or weight.dim() == 1 else (weight + norm.weight_offset, None)
    if norm.kind == "rms_norm":
        y = gim_kernels.rms_norm(x, inner, norm.eps, weight_offset=norm.weight_offset, frozen=frozen)
    else:
        shifted = None if inner is None or not norm.weight_offset else inner + norm.weight_offset
        y = gim_kernels.layer_norm(x, inner if shifted is None else shifted, bias, norm.eps, frozen=frozen)
    return y if rows is None else y * rows


def _candidate(norm: Norm, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The norm by its equation, in float32 or better, by the specification: what a probe is compared with."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    bias = None if bias is None else bias.to(wide.dtype)
    weight = None if weight is None else weight.to(wide.dtype) + norm.weight_offset
    rows, inner = (None, weight) if weight is None or weight.dim() == 1 else (weight, None)
    if norm.kind == "rms_norm":
        y = reference.rms_norm(wide, inner, norm.eps)
    else:
        y = reference.layer_norm(wide, inner, bias, norm.eps)
    return y if rows is None else y * rows


@torch.no_grad()
def recognise(module: nn.Module) -> Norm | None:
    """What a module computes, found by feeding it numbers: the norm it equals, or None.

    Two probes are used: rows of unit size with a mean, which tell the kinds and the weight's offset apart, and rows
    as small as the square root of epsilon, whose outputs depend on it. The module's own ``forward`` runs, hooks do not.
    """
    weight = getattr(module, "weight", None)
    if weight is not None and (not isinstance(weight, torch.Tensor) or weight.dim() not in (1, 2)):
        return None
    anchor = weight if weight is not None else next(module.buffers(), None)
    device = torch.device("cpu") if anchor is None else anchor.device
    dtype = torch.float32 if anchor is None or not anchor.dtype.is_floating_point else anchor.dtype
    shape = getattr(module, "normalized_shape", None)
    width = weight.shape[-1] if weight is not None else shape[-1] if shape else PROBE_WIDTH
    generator = torch.Generator().manual_seed(0)
    count = PROBE_ROWS if weight is None or weight.dim() == 1 else weight.shape[0]
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64) + 1.0

    for eps in _epsilons(module, dtype):
        probes = [rows.to(device, dtype), (rows * eps**0.5).to(device, dtype)]
        try:
            outputs = [original_forward(module)(probe) for probe in probes]
        except Exception:  # whatever it is, it does not take one tensor of rows as a norm does
            return None
        if not all(isinstance(y, torch.Tensor) and y.shape == rows.shape for y in outputs):
            return None
        candidates = [Norm("rms_norm", eps), Norm("rms_norm", eps, 1.0), Norm("layer_norm", eps)]
        candidates.append(Norm("layer_norm", eps, 1.0))
        if getattr(module, "bias", None) is not None:
            candidates = candidates[2:]
        elif weight is None:
            candidates = [Norm("rms_norm", eps), Norm("layer_norm", eps)]
        for norm in candidates:
            if all(_equal(y, _candidate(norm, module, x)) for x, y in zip(probes, outputs, strict=True)):
                return norm
    return None


def _equal(output: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether a module's output is the equation's within a few roundings of its dtype, float32 at best."""
    eps = max(torch.finfo(output.dtype).eps, torch.finfo(torch.float32).eps)
    difference = (output.double() - want.double()).abs().amax()
    return bool(difference <= PROBE_ULPS * eps * want.double().abs().amax())


def patch(model: nn.Module, session: Session) -> None:
    """Run every norm of a model through the kernels, its statistic frozen where the session's rules say so.

    Norms are patched under every rule, so that the forward inside a context is the same whatever the rules are. One
    that is not recognised is an error only where its statistic should have been frozen.
    """
    frozen = session.rules.freeze_norm
    found = False
    for name, module in model.named_modules():
        if not looks_like_norm(module):
            continue
        norm = recognise(module)
        if norm is None:
            if is_norm_by_name(module) and frozen:
                session.unsupported(
                    name,
                    f"({type(module).__name__}) is neither an RMS norm nor a layer norm with weight w or 1 + w, so "
                    "its statistic cannot be frozen",
                )
            continue
        found = True
        session.add(
            Application(
                part="norm",
                module=name,
                module_class=type(module).__name__,
                rule="statistic constant" if frozen else "ordinary gradient",
                recognised=norm.describe(),
            )
        )
        session.replace_forward(module, _patched_forward(module, name, norm, session))
    if frozen and not found:
        session.report.notes.append(ABSENT["norm"])


def _patched_forward(module: nn.Module, name: str, norm: Norm, session: Session) -> Any:
    frozen = session.rules.freeze_norm

    def forward(hidden_states: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        if others or named:
            raise UnsupportedModelError(
                f"{name}: the norm was called with more than its input ({len(others)} positional, "
                f"{sorted(named)} named arguments), which gim does not know how to apply"
            )
        y = _apply(norm, module, hidden_states, frozen=frozen)
        session.count(name, engines.choose("auto", hidden_states))
        return y

    return forward

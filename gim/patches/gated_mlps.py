"""Gated MLPs, recognised by structure and proved by behaviour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import gim_kernels
from gim.applied import Application
from gim.patches.session import Session, original_forward
from gim.rules import Rules
from gim_kernels import engines
from gim_kernels.gated import ACTIVATIONS, Activation
from gim_kernels.reference import activation_function

#: Roundings by which a module and the composition of its parts may differ, in units in the last place.
PROBE_ULPS = 16
#: Names under which modules keep their activation, the usual ones first.
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation", "hidden_act", "intermediate_act_fn")


@dataclass(frozen=True)
class Layout:
    """Names of the three projections of a gated MLP. A new layout is a new row of :data:`LAYOUTS`."""

    gate: str
    up: str
    down: str


LAYOUTS = (Layout("gate_proj", "up_proj", "down_proj"),)


@dataclass(frozen=True)
class GatedMLP:
    """What a gated MLP was recognised as: ``down(activation(gate(x)) * up(x))``."""

    layout: Layout
    activation: Activation


def _activation_of(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The activation a module holds, under any of the usual names."""
    for name in ACTIVATION_NAMES:
        held = getattr(module, name, None)
        if callable(held):
            return held
    return None


@torch.no_grad()
def recognise_activation(activation: Callable[[torch.Tensor], torch.Tensor]) -> Activation | None:
    """Which activation a callable computes, found by evaluating it; None for one that the kernels do not know.

    The grid holds the region where silu and the two gelus differ most; the two gelus differ by up to 5e-4 there.
    """
    grid = torch.linspace(-8.0, 8.0, 257)
    try:
        values = activation(grid)
    except Exception:  # not a function of one tensor, so not an activation
        return None
    if not isinstance(values, torch.Tensor) or values.shape != grid.shape:
        return None
    for name in ACTIVATIONS:
        if torch.allclose(values, activation_function(grid, name), rtol=5e-6, atol=5e-6):
            return name
    return None


def _linear_children(module: nn.Module) -> list[nn.Module]:
    """Children that map a vector to a vector: linear layers of any kind, quantised ones included."""
    return [
        child
        for child in module.children()
        if (hasattr(child, "in_features") and hasattr(child, "out_features"))
        or (hasattr(child, "nf") and hasattr(child, "nx"))  # transformers' Conv1D
    ]


def _is_plain(module: nn.Module) -> bool:
    """Whether a module with an activation is ``second(act(first(x)))``: two layers whose widths meet."""
    layers = _linear_children(module)
    if len(layers) != 2:
        return False
    out_features = getattr(layers[0], "out_features", getattr(layers[0], "nf", None))
    in_features = getattr(layers[1], "in_features", getattr(layers[1], "nx", None))
    return out_features == in_features


@torch.no_grad()
def recognise(module: nn.Module) -> GatedMLP | str | None:
    """The gated MLP that a module is; a reason, in words, where it is one that cannot be patched; else None."""
    activation = _activation_of(module)
    if activation is None or not any(True for _ in module.children()):
        return None
    layout = next(
        (
            layout
            for layout in LAYOUTS
            if all(isinstance(getattr(module, name, None), nn.Module) for name in (layout.gate, layout.up, layout.down))
        ),
        None,
    )
    if layout is None:
        layers = _linear_children(module)
        if not layers or _is_plain(module) or len(layers) == 1:
            return None
        return "has an activation and projections in a layout that gim does not know"
    name = recognise_activation(activation)
    if name is None:
        return f"is a gated MLP whose activation {type(activation).__name__} is not one of {', '.join(ACTIVATIONS)}"
    found = GatedMLP(layout, name)
    anchor = next((p for p in module.parameters() if p.dtype.is_floating_point), None)
    gate = getattr(module, layout.gate)
    if anchor is None or not hasattr(gate, "in_features"):
        return "is a gated MLP without a width to probe it with"
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, 3, gate.in_features, generator=generator).to(anchor.device, anchor.dtype)
    # The composition is checked with the module's own activation, so that only the structure is in question here.
    want = getattr(module, layout.down)(activation(gate(probe)) * getattr(module, layout.up)(probe))
    got = original_forward(module)(probe)
    tolerance = PROBE_ULPS * torch.finfo(anchor.dtype).eps * want.double().abs().amax()
    if (
        not isinstance(got, torch.Tensor)
        or got.shape != want.shape
        or bool((got.double() - want.double()).abs().amax() > tolerance)
    ):
        return "has gate, up and down projections but does not compute down(activation(gate(x)) * up(x))"
    return found


def describe(rules: Rules) -> str:
    """The rule of a gated MLP's backward, in words."""
    if not rules.modifies_gated_mlps:
        return "ordinary gradient"
    words = "gate, up times " + ", ".join(f"{factor:g}" for factor in rules.gate_up_scale)
    return words + ("; act(x) / x for act'(x)" if rules.activation == "ratio" else "")


def patch(model: nn.Module, session: Session) -> None:
    """Run every gated MLP of a model through the kernels, with the factors of the session's rules.

    They are patched under every rule, so that the forward inside a context is the same whatever the rules are. One
    that is not recognised is an error only where a rule should have acted on it.
    """
    rules = session.rules
    found = False
    for name, module in model.named_modules():
        mlp = recognise(module)
        if mlp is None:
            continue
        found = True
        if isinstance(mlp, str):
            if rules.modifies_gated_mlps:
                session.unsupported(name, f"({type(module).__name__}) {mlp}")
            continue
        session.add(
            Application(
                part="gated_mlp",
                module=name,
                module_class=type(module).__name__,
                rule=describe(rules),
                recognised=f"probed: {mlp.activation} gate",
            )
        )
        session.replace_forward(module, _patched_forward(module, name, mlp, session))
    if rules.modifies_gated_mlps and not found:
        session.report.notes.append("gate_scale and up_scale: the model has no gated MLP")


def _patched_forward(module: nn.Module, name: str, mlp: GatedMLP, session: Session) -> Any:
    rules = session.rules

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        gate = getattr(module, mlp.layout.gate)(hidden_states)
        product = gim_kernels.gated(
            gate,
            getattr(module, mlp.layout.up)(hidden_states),
            mlp.activation,
            grad_scale=rules.gate_up_scale,
            activation_backward=rules.activation,
        )
        session.count(name, engines.choose("auto", gate))
        return getattr(module, mlp.layout.down)(product)

    return forward

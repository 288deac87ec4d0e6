"""Gated MLPs, recognised by the product ``activation(gate) * up`` that they compute.

A module that holds its activation keeps its forward, whatever the layout of its projections (separate, fused,
interleaved, experts): :mod:`gim.patches.products` finds the product. What computes its gate in another way is a row
of :data:`GATES`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gim.applied import ABSENT, Application, UnsupportedModelError
from gim.parts import anatomy
from gim.parts.hidden_states import device_of, dtypes_taken, weights_of
from gim.patches.products import FunctionalActivations, Site, product
from gim.patches.session import Session, original_forward, probing
from gim.rules import GRADIENT, Rules
from gim_kernels import engines
from gim_kernels.gated import ACTIVATIONS, Activation
from gim_kernels.reference import activation_function

#: How a method ``_apply_gate(gate_up)`` of an experts module that holds no activation computes its product:
#: from the module and its argument, gate, up and the activation. Checked against the method itself before use.
Gate = Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]


def _clamped_interleaved(module: Any, gate_up: torch.Tensor) -> Any:
    """gpt-oss: even columns gate, odd ones up; both clamped; ``gate * sigmoid(alpha * gate) * (up + 1)``."""
    gate = gate_up[..., ::2].clamp(max=module.limit)
    up = gate_up[..., 1::2].clamp(min=-module.limit, max=module.limit)
    return gate, up + 1, lambda x: x * torch.sigmoid(module.alpha * x)


def _clamped_halves(module: Any, gate_up: torch.Tensor) -> Any:
    """The same with the gate in the first half and up in the second."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (
        gate.clamp(max=module.limit),
        up.clamp(min=-module.limit, max=module.limit) + 1,
        lambda x: x * torch.sigmoid(module.alpha * x),
    )


GATES: tuple[Gate, ...] = (_clamped_interleaved, _clamped_halves)


@dataclass(frozen=True)
class GatedMLP:
    """What a module was recognised as.

    Args:
        how: in words, for the report.
        activations: names of the attributes that hold its activations.
        functional: it calls its activation as a function of ``torch.nn.functional``.
        gate: the row of :data:`GATES` that its ``_apply_gate`` equals.
        expected: it is known to compute a product; else it is watched for one.
    """

    how: str
    activations: tuple[str, ...] = ()
    functional: bool = False
    gate: Gate | None = None
    expected: bool = True


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


@torch.no_grad()
def _is_activation(held: Any) -> bool:
    """Whether something held by a module maps numbers to numbers one by one and is not linear."""
    if isinstance(held, type) or not callable(held):
        return False
    if isinstance(held, nn.Module) and any(p.dim() > 1 for p in held.parameters()):
        return False
    parameter = next(held.parameters(), None) if isinstance(held, nn.Module) else None
    grid = torch.linspace(-3.0, 3.0, 13)
    if parameter is not None:
        grid = grid.to(parameter.device, parameter.dtype)
    try:
        values = held(grid)
        each = torch.cat([held(one) for one in grid.split(1)])
    except Exception:  # it wants other arguments
        return False
    if (
        not isinstance(values, torch.Tensor)
        or values.shape != grid.shape
        or not torch.allclose(values, each, atol=1e-4)
    ):
        return False
    return not torch.allclose(values, grid)


def activations_of(module: nn.Module) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The activations a module holds, by the names of its attributes: those with ``act`` in their name."""
    held = {**module.__dict__, **dict(module.named_children())}
    return {
        name: getattr(value, _WRAPPED, value)
        for name, value in held.items()
        if "act" in name and not name.startswith("_") and _is_activation(getattr(value, _WRAPPED, value))
    }


#: Attribute of a wrapped activation that holds the activation itself.
_WRAPPED = "_gim_activation"


def _widths(layer: Any) -> tuple[int, int] | None:
    """Widths in and out of a layer that maps a vector to a vector: linear layers of any kind, quantised ones too."""
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return int(layer.in_features), int(layer.out_features)
    if hasattr(layer, "nx") and hasattr(layer, "nf"):  # transformers' Conv1D
        return int(layer.nx), int(layer.nf)
    return None


def _layers(module: nn.Module) -> list[tuple[int, int]]:
    return [widths for child in module.children() if (widths := _widths(child)) is not None]


def _is_plain(module: nn.Module) -> bool:
    """Whether a module that holds an activation has no second branch: its layers follow one another."""
    layers = _layers(module)
    wide = [p for p in module.parameters(recurse=False) if p.dim() > 1]
    inner = [child for child in module.children() if _widths(child) is None]
    if wide or any(weight.dim() > 1 for child in inner for weight in weights_of(child)):
        return False
    return len(layers) <= 1 or (len(layers) == 2 and layers[0][1] == layers[1][0])


def _could_be_functional(module: nn.Module) -> bool:
    """Whether a module has three layers shaped as gate, up and down."""
    layers = _layers(module)
    return len(layers) == 3 and any(
        layers[i] == layers[j] == layers[k][::-1] for i, j, k in ((0, 1, 2), (0, 2, 1), (1, 2, 0))
    )


class _Recorder:
    """What a probe saw."""

    def __init__(self) -> None:
        self.products = 0
        self.unknown: list[str] = []
        self.site = Site(GRADIENT, lambda _: self._count(), self.unknown.append)

    def _count(self) -> None:
        self.products += 1


@torch.no_grad()
def _probe(module: nn.Module, names: tuple[str, ...], dtype: torch.dtype) -> _Recorder | None:
    """Run a module on a few numbers and record where its activations go; None if it does not take one tensor."""
    layers = _layers(module)
    device = device_of(module)
    if device is None or not layers or device.type == "meta":
        return None
    probe = torch.randn(1, 3, layers[0][0], generator=torch.Generator().manual_seed(0)).to(device)
    for taken in dtypes_taken(module, dtype):
        recorder = _record(module, names, probe.to(taken))
        if recorder is not None:
            return recorder
    return None


def _record(module: nn.Module, names: tuple[str, ...], probe: torch.Tensor) -> _Recorder | None:
    """Run a module on numbers and record where its activations go; None if it does not take them."""
    recorder = _Recorder()
    before = {name: module.__dict__.get(name, _MISSING) for name in names}
    try:
        for name, activation in activations_of(module).items():
            module.__dict__[name] = _wrap(activation, recorder.site)
        with probing(), nullcontext() if names else FunctionalActivations(recorder.site):
            original_forward(module)(probe)
    except Exception:  # it wants other arguments: experts, mixers, whole layers
        return None
    finally:
        for name, value in before.items():
            if value is _MISSING:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value
    return recorder


_MISSING = object()


def _wrap(activation: Callable[[torch.Tensor], torch.Tensor], site: Site) -> Callable[..., torch.Tensor]:
    known = recognise_activation(activation)

    def wrapped(gate: torch.Tensor) -> torch.Tensor:
        hooked = isinstance(activation, nn.Module) and (activation._forward_hooks or activation._forward_pre_hooks)
        return site.activate(gate, activation, known, activation(gate) if hooked else None)

    setattr(wrapped, _WRAPPED, activation)
    return wrapped


@torch.no_grad()
def recognise(module: nn.Module, dtype: torch.dtype = torch.float32) -> GatedMLP | str | None:
    """The gated MLP that a module is; a reason, in words, where it is one that cannot be patched; else None.

    ``dtype`` is that of the model's hidden states, for modules whose weights do not tell it.
    """
    if not weights_of(module):
        return None
    if isinstance(getattr(module, "A_log", None), torch.Tensor):
        return "is a state space mixer, for whose gates GIM has no rule"
    activations = activations_of(module)
    names = tuple(activations)
    if names:
        shown = "/".join(dict.fromkeys(_describe(activation) for activation in activations.values()))
        recorder = _probe(module, names, dtype)
        if recorder is not None:
            if recorder.products:
                return GatedMLP(f"probed: {shown} gate", names)
            if recorder.unknown:
                return f"holds an activation whose output goes through {', '.join(sorted(set(recorder.unknown)))}"
            return None
        if _is_plain(module):
            return None
        if hasattr(module, "_apply_gate") and getattr(module, "has_gate", True):
            return GatedMLP(f"experts: {shown} gate", names)
        return GatedMLP(f"product found: {shown} gate", names, expected=False)
    if not names and _could_be_functional(module):
        recorder = _probe(module, (), dtype)
        return GatedMLP("probed: gate", functional=True) if recorder is not None and recorder.products else None
    if not names and hasattr(module, "_apply_gate") and getattr(module, "has_gate", True):
        return next(
            (GatedMLP("experts: clamped gate", gate=gate) for gate in GATES if _gate_equals(module, gate)),
            "computes its gate in a way that gim does not know",
        )
    return None


def _describe(activation: Callable[[torch.Tensor], torch.Tensor]) -> str:
    return recognise_activation(activation) or str(getattr(activation, "__name__", type(activation).__name__))


def _gate_equals(module: Any, gate: Gate) -> bool:
    """Whether a module's ``_apply_gate`` computes the same as a row of :data:`GATES`, clamps included."""
    numbers = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 8
    method = getattr(module._apply_gate, _WRAPPED, module._apply_gate)
    try:
        want = method(numbers)
        branch, up, activation = gate(module, numbers)
        got = activation(branch) * up
    except Exception:  # the row is of another layout
        return False
    return want.shape == got.shape and torch.allclose(want, got, rtol=1e-12)


def describe(rules: Rules) -> str:
    """The rule of a gated MLP's backward, in words."""
    if not rules.modifies_gated_mlps:
        return "ordinary gradient"
    words = "gate, up times " + ", ".join(f"{factor:g}" for factor in rules.gate_up_scale)
    return words + ("; act(x) / x for act'(x)" if rules.activation == "ratio" else "")


def patch(model: nn.Module, session: Session) -> None:
    """Give every product of a gated MLP the factors of the session's rules.

    They are patched under every rule, so that the forward inside a context is the same whatever the rules are. One
    that is not recognised is an error only where a rule should have acted on it.
    """
    rules, dtype = session.rules, anatomy.of(model).dtype
    found = False
    # Modules of one class with layers of the same sizes run the same code: one of them is probed. That each of
    # them computes its product is seen in every forward pass.
    seen: dict[Any, GatedMLP | str | None] = {}
    for name, module in model.named_modules():
        key = (
            type(module),
            getattr(original_forward(module), "__qualname__", ""),
            str(_layers(module)),
            _switches(module),
        )
        if key not in seen:
            seen[key] = recognise(module, dtype)
        mlp = seen[key]
        if mlp is None:
            continue
        if isinstance(mlp, str):
            found = True
            if rules.modifies_gated_mlps:
                session.unsupported(name, f"({type(module).__name__}) {mlp}")
            continue
        application = Application(
            part="gated_mlp",
            module=name,
            module_class=type(module).__name__,
            rule=describe(rules),
            recognised=mlp.how,
        )
        if mlp.expected:
            found = True
            session.add(application)
        _patch_one(module, mlp, application, session)
    if rules.modifies_gated_mlps and not found:
        session.report.notes.append(ABSENT["gated_mlp"])


def _switches(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """A module's own settings but its place in the model."""
    kinds = (bool, float, str)
    return tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, kinds) and not k.startswith("_")))


def _patch_one(module: nn.Module, mlp: GatedMLP, application: Application, session: Session) -> None:
    name, rules = application.module, session.rules

    counted = threading.local()  # of the present call: experts are products of one module

    def begin(*_: Any) -> None:
        counted.yes = False

    session.undo.callback(module.register_forward_pre_hook(begin).remove)

    def on_product(gate: torch.Tensor) -> None:
        if not session.knows(name):
            session.add(application)
        if not getattr(counted, "yes", False):
            session.count(name, engines.choose("auto", gate))
        counted.yes = True

    def on_unknown(function: str) -> None:
        if not rules.modifies_gated_mlps:
            return
        reason = f"({type(module).__name__}) holds an activation whose output goes through {function}"
        if session.strict:
            raise UnsupportedModelError(
                f"{name}: {reason}, where a gate cannot be told from what is none. Switch off gate_scale and "
                "up_scale, or pass strict=False to have this reported instead."
            )
        if (name, reason) not in session.report.unsupported:
            session.unsupported(name, reason)

    site = Site(rules, on_product, on_unknown)
    for attribute, activation in activations_of(module).items():
        if attribute in mlp.activations:
            session.set_attribute(module, attribute, _wrap(activation, site))
    if mlp.functional:
        original = original_forward(module)

        def forward(*inputs: Any, **named: Any) -> Any:
            with FunctionalActivations(site):
                return original(*inputs, **named)

        session.replace_forward(module, forward)
    if mlp.gate is not None:
        method = getattr(module._apply_gate, _WRAPPED, module._apply_gate)

        def apply_gate(gate_up: torch.Tensor) -> torch.Tensor:
            gate, up, activation = mlp.gate(module, gate_up)  # type: ignore[misc]
            y = product(gate, up, activation, None, rules)
            on_product(gate)
            return y

        setattr(apply_gate, _WRAPPED, method)
        session.set_attribute(module, "_apply_gate", apply_gate)

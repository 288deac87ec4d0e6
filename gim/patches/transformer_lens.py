"""Models of TransformerLens: ``HookedTransformer`` (3.x) and ``TransformerBridge`` (3.0 and later).

Their attention computes whole T x S scores so that hooks can read and change them, and that stays: every hook point
works, with the values and the places it has outside the context, and memory is O(T^2) as always in TransformerLens. The
rules enter where the model's own code computes: the softmax, the two products around it, the scale of each norm, the
gated product. A softmax or a product that a user's hook computes is left alone.

What a hook sees of the rules: gradients at ``hook_q``, ``hook_k``, ``hook_v``, ``hook_rot_q`` and ``hook_rot_k``
include the factor of their branch; ``hook_scale`` gives a tensor without a gradient where norms are frozen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gim.applied import ABSENT, Application
from gim.intercept.sites import SITES
from gim.patches import attention, functional, norms
from gim.patches.functional import HANDLERS, Calls, Expected, Frame, State
from gim.patches.session import Session, original_forward
from gim_kernels.reference import scale_gradient

PACKAGE = "transformer_lens"
#: Whose code computes a model's attention; a user's hook is in neither.
MODEL_CODE = (f"{PACKAGE}.", "transformers.")
#: Code between the caller of a torch function and its handler.
PASSED_THROUGH = ("torch", "gim")


def is_one(model: object) -> bool:
    """Whether a model is TransformerLens's, told without importing it."""
    return any(cls.__module__.split(".")[0] == PACKAGE for cls in type(model).__mro__)


class _TemperatureSoftmax(torch.autograd.Function):
    """softmax(S), whose backward is ``P_T * (dP - rowsum(P_T * dP))`` with ``P_T = softmax(S / T)``."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, weights: torch.Tensor, temperature: float) -> torch.Tensor:
        ctx.temperature = temperature
        ctx.save_for_backward(scores)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (scores,) = ctx.saved_tensors
        wide = torch.promote_types(scores.dtype, torch.float32)
        # A row that sees no key has no softmax, and passes no gradient on.
        softened = torch.softmax(scores.to(wide) / ctx.temperature, -1).nan_to_num(0.0)
        grad = grads[0].to(wide)
        return (softened * (grad - (softened * grad).sum(-1, keepdim=True))).to(scores.dtype), None, None


def _called_by_the_model() -> bool:
    """Whether the function that is handled was called by the model's code, and not by a user's hook."""
    running: FrameType | None = sys._getframe(1)
    while running is not None:
        name = str(running.f_globals.get("__name__", ""))
        if name.split(".")[0] not in PASSED_THROUGH:
            return name.startswith(MODEL_CODE)
        running = running.f_back
    return False


class _Progress:
    """How far each attention has come in this forward pass: the shapes of its scores and of its weights."""

    def __init__(self) -> None:
        self.scores: dict[str, torch.Size] = {}
        self.weights: dict[str, torch.Size] = {}

    def clear(self) -> None:
        self.scores.clear()
        self.weights.clear()


def _handlers(progress: _Progress, attentions: dict[str, str]) -> dict[Any, Callable[..., Any]]:
    """The handlers of a plain model, and those of attention that is written out.

    ``attentions`` gives the name of the attention module whose code a module runs: itself, or the one that wraps it.
    """

    def softmax(
        calls: Calls, frame: Frame, func: Callable[..., Any], scores: torch.Tensor, *args: Any, **named: Any
    ) -> Any:
        name = attentions.get(frame.name)
        if name is None or not _called_by_the_model():
            return func(scores, *args, **named)
        dim = named.get("dim", args[0] if args else None)
        expected = progress.scores.pop(name, None)
        if dim not in (-1, scores.dim() - 1) or expected is None or scores.shape[:-1] != expected[:-1]:
            calls.refuse(frame, "computes a softmax that is not over the product of its queries and keys")
            return func(scores, *args, **named)
        with SITES.acting("attention"):
            weights = func(scores, *args, **named)
        progress.weights[name] = expected  # a column for a sink is dropped again
        rules = calls.session.rules
        if rules.softmax == "constant":
            return weights.detach()
        if rules.softmax == "temperature" and rules.temperature != 1.0:
            return _TemperatureSoftmax.apply(scores, weights.detach(), rules.temperature)
        return weights

    def matmul(calls: Calls, frame: Frame, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
        name = attentions.get(frame.name)
        if (
            name is None
            or len(args) != 2
            or not all(isinstance(x, torch.Tensor) and x.dim() == 4 for x in args)
            or not _called_by_the_model()
        ):
            return func(*args, **named)
        left, right = args
        rules = calls.session.rules
        shape = progress.weights.pop(name, None)
        if shape is None:
            out = func(scale_gradient(left, rules.q_scale), scale_gradient(right, rules.k_scale), **named)
            progress.scores[name] = out.shape
            return out
        if left.shape != shape:
            calls.refuse(frame, "multiplies something else than its attention weights with its values")
            return func(left, right, **named)
        out = func(left, scale_gradient(right, rules.v_scale), **named)
        calls.fire(
            frame,
            "attention",
            "softmax between two products",
            attention.describe(rules),
            "transformer_lens",
            module=name,
        )
        return out

    return {
        **HANDLERS,
        F.softmax: softmax,
        torch.softmax: softmax,
        torch.Tensor.softmax: softmax,
        torch.matmul: matmul,
        torch.Tensor.matmul: matmul,
        torch.Tensor.__matmul__: matmul,
    }


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is one of TransformerLens's norms, folded ones included: each has a hook on its scale."""
    return all(isinstance(getattr(module, hook, None), nn.Module) for hook in ("hook_scale", "hook_normalized"))


def _is_attention(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, hook, None), nn.Module) for hook in ("hook_attn_scores", "hook_pattern"))


def _is_gated_mlp(module: nn.Module) -> bool:
    name = type(module).__name__
    return "GatedMLP" in name or "JointGateUpMLP" in name


def patch(model: nn.Module, session: Session) -> None:
    """Apply a session's rules to a model of TransformerLens, keeping every hook point.

    It is an error (``strict``; a line of the report else) when an attention, a norm or a gated MLP ran and its rule did
    not fire.
    """
    state, progress = State(), _Progress()
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    frozen = session.rules.freeze_norm
    attentions: dict[str, str] = {}
    for name, module in modules.items():
        if _is_attention(module):
            attentions[name] = name
            component = getattr(module, "original_component", None)
            if id(component) in names:
                attentions[names[id(component)]] = name
    patched: set[str] = set()
    for name, module in modules.items():
        if _is_norm(module):
            rule = "statistic constant" if frozen else "ordinary gradient"
            row = Application("norm", name, type(module).__name__, rule, "hook_scale")
            _freeze(name, module, row, session, state)
            patched.add(name)
            patched.add(names[id(module.hook_scale)])
            component = getattr(module, "original_component", None)
            if isinstance(component, nn.Module) and not isinstance(component, nn.Identity):
                _patch_component(names[id(component)], component, session, state, patched)
        elif _is_gated_mlp(module):
            reason = f"({type(module).__name__}) is a gated MLP whose activation or product gim does not know"
            state.expected[name] = Expected("gated_mlp", reason)
    for name in dict.fromkeys(attentions.values()):
        reason = (
            f"({type(modules[name]).__name__}) did not compute its attention as a product, a softmax and a product, "
            "nor by F.scaled_dot_product_attention"
        )
        state.expected[name] = Expected("attention", reason)
    if not any(expected.part == "gated_mlp" for expected in state.expected.values()):
        session.report.notes.append(ABSENT["gated_mlp"])
    session.start_of_forward.append(progress.clear)
    functional.watch(
        model,
        session,
        state,
        _handlers(progress, attentions),
        modules=modules,
        patched=patched,
        passive=set(),
    )


def _freeze(name: str, module: nn.Module, row: Application, session: Session, state: State) -> None:
    """Detach a norm's scale where its own code computes it, before any user's hook sees it; count the norm's calls."""
    forward = original_forward(module)
    session.report.applications.append(row)

    def counted(*inputs: Any, **named: Any) -> Any:
        y = forward(*inputs, **named)
        functional.count(row, session, state, "transformer_lens")
        return y

    def computed(scale: torch.Tensor) -> torch.Tensor:
        # Without gradients nothing must change, not even the tensor's identity, from which a bridge tells an edit; with
        # them it changes under every rule, so that the forward is the same whatever the rules are.
        if not scale.requires_grad:
            return SITES.mark(scale, "norm")
        return SITES.mark(scale.detach() if session.rules.freeze_norm else scale.view_as(scale), "norm")

    session.replace_forward(module, counted)
    hook: nn.Module = module.hook_scale  # type: ignore[assignment]
    session.replace_forward(hook, computed)


def _patch_component(name: str, component: nn.Module, session: Session, state: State, patched: set[str]) -> None:
    """Freeze the Hugging Face norm that a bridge wraps and, without hooks, runs in its place."""
    norm = norms.recognise(component)
    if norm is None:
        if session.rules.freeze_norm:
            reason = f"({type(component).__name__}) is neither an RMS norm nor a layer norm with weight w or 1 + w"
            session.unsupported(name, reason)
        return

    def forward(x: torch.Tensor) -> torch.Tensor:
        return norms._apply(norm, component, x, frozen=session.rules.freeze_norm)

    session.replace_forward(component, forward)
    patched.add(name)

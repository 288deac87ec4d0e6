"""The context in which a model's backward follows GIM."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch._dynamo.eval_frame
from torch import nn
from transformers import PreTrainedModel

from gim.applied import AppliedReport, UnsupportedModelError
from gim.parts.placement import refuse_context_parallelism, refuse_unsupported_placement
from gim.patches import attention, functional, gated_mlps, norms, transformer_lens
from gim.patches.session import SESSION, Session, session_of
from gim.rules import GIM as PAPER_RULES
from gim.rules import PAPER_GATE_UP, PAPER_QKV, PAPER_TEMPERATURE, Rules
from gim.rules import get as get_rules

_enter_lock = threading.Lock()


def resolve_rules(
    rules: Rules | str | None,
    *,
    freeze_norm: bool,
    softmax_temperature: float | None,
    q_scale: float | None,
    k_scale: float | None,
    v_scale: float | None,
    gate_scale: float | None,
    up_scale: float | None,
) -> Rules:
    """The rules that an argument ``rules`` or gim-explain's single arguments mean.

    Raises:
        ValueError: both were given; a value that no rule allows.
    """
    single = Rules.from_arguments(
        freeze_norm=freeze_norm,
        softmax_temperature=softmax_temperature,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        gate_scale=gate_scale,
        up_scale=up_scale,
    )
    if rules is None:
        return single
    chosen = get_rules(rules)
    if single != PAPER_RULES and single != chosen:
        raise ValueError(f"rules={chosen.name} and single rule arguments contradict each other: give one of the two")
    return chosen


class GIM:
    """Inside this context, gradients through a model follow the GIM rules.

    Every norm, attention and gated MLP that a rule should act on is found, patched on the instance, counted, and put
    back on leaving, bit for bit, after an exception too. What is differentiated inside may be anything: a loss with
    its own ``backward()``, ``torch.autograd.grad``, hooks. The backward may run after the context has closed; a
    checkpoint's recompute may not, and raises.

    Models outside transformers follow the rules at torch's own functions, and models of TransformerLens at their own
    code: see :mod:`gim.patches.functional` and :mod:`gim.patches.transformer_lens` for what is seen and what is not.
    Only what runs inside the ``forward`` of the model or of one of its modules is touched.

    Args:
        model: a Hugging Face model, a model of TransformerLens, or any module that calls torch's attention.
        freeze_norm: treat the statistic of every norm as a constant.
        softmax_temperature: temperature of the softmax backward; None for the ordinary softmax gradient.
        q_scale, k_scale, v_scale: factors of the gradients of queries, keys and values; None for 1.
        gate_scale, up_scale: factors of the gradients of the branches of gated MLPs; None for 1.
        rules: in place of the single arguments: :class:`gim.rules.Rules` or the name of a preset.
        strict: whether a part that a rule should act on and cannot is an error. With False it is reported in
            :attr:`AppliedReport.unsupported`. Outside transformers a gated MLP or a norm written in elementary
            operations looks like any arithmetic: that none was recognised is a note of the report, not an error.

    Raises:
        UnsupportedModelError: on entering, or at a forward pass: a part is not covered, is compiled, or does not lie
            whole in this process (a sharded sequence, sharded or offloaded weights, a stage of a pipeline); names it.
        ValueError: a value that no rule allows; dropout is on.
        RuntimeError: the model is inside a context of another thread.

    Example:
        >>> import torch, gim
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> model = LlamaForCausalLM(config).eval()
        >>> with gim.GIM(model) as report:
        ...     loss = model(torch.tensor([[1, 2, 3]])).logits[0, -1, 7]
        >>> loss.backward()
        >>> report.counts()
        {'attention': (2, 2), 'norm': (5, 5), 'gated_mlp': (2, 2)}
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        freeze_norm: bool = True,
        softmax_temperature: float | None = PAPER_TEMPERATURE,
        q_scale: float | None = PAPER_QKV[0],
        k_scale: float | None = PAPER_QKV[1],
        v_scale: float | None = PAPER_QKV[2],
        gate_scale: float | None = PAPER_GATE_UP[0],
        up_scale: float | None = PAPER_GATE_UP[1],
        rules: Rules | str | None = None,
        strict: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.strict = strict
        self.rules = resolve_rules(
            rules,
            freeze_norm=freeze_norm,
            softmax_temperature=softmax_temperature,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            gate_scale=gate_scale,
            up_scale=up_scale,
        )
        self._session: Session | None = None

    def __enter__(self) -> AppliedReport:
        if self._session is not None:
            raise RuntimeError("this GIM context is already open: make another for a nested one")
        _refuse_what_cannot_be_patched(self.model)
        refuse_unsupported_placement(self.model)
        _refuse_dropout(self.model)
        session = Session(self.rules, self.strict)
        with _enter_lock:
            outer = session_of(self.model)
            if outer is not None and outer.thread != session.thread:
                raise RuntimeError(
                    "model is inside a GIM context of another thread: use one model object for each thread"
                )
            try:
                apply_patches(self.model, session)
            except BaseException:
                session.close()
                raise
        self._session = session
        return session.report

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        session, self._session = self._session, None
        if session is not None:
            with _enter_lock:
                session.close()


def apply_patches(model: nn.Module, session: Session) -> None:
    """Patch every part of a model for a session, and make sure that each forward pass uses all of the patches.

    Raises:
        UnsupportedModelError: the session is strict and a part is not covered.
    """
    for module in model.modules():
        session.set_attribute(module, SESSION, session)
    if transformer_lens.is_one(model):
        transformer_lens.patch(model, session)
    else:
        norms.patch(model, session)
        gated_mlps.patch(model, session)
        if isinstance(model, PreTrainedModel):
            attention.patch(model, session)
        else:
            functional.patch(model, session)
    if session.strict:
        _raise_unsupported(model, session.report.unsupported)
    _guard_checkpoints(model, session)

    def begin(*_: Any) -> None:
        refuse_context_parallelism(model)
        session.start_forward()

    def finish(*_: Any) -> None:
        if session_of(model) is not session:
            return  # an inner context's rules are in force, and it looks after its own forward passes
        session.report.forwards += 1
        missing = [(name, "did not run in this forward pass, or ran without its patch") for name in session.not_run()]
        for end in session.end_of_forward:
            missing += end()
        if session.strict:
            _raise_unsupported(model, missing)
        known = set(session.report.unsupported)
        session.report.unsupported.extend(pair for pair in missing if pair not in known)

    if isinstance(model, PreTrainedModel):
        for handle in (model.register_forward_pre_hook(begin), model.register_forward_hook(finish)):
            session.undo.callback(handle.remove)
        return
    # Front ends call forward itself (TransformerLens's run_with_hooks does), past the hooks of the model.
    inner = model.forward

    @functools.wraps(inner)
    def forward(*inputs: Any, **named: Any) -> Any:
        begin()
        out = inner(*inputs, **named)
        finish()
        return out

    session.replace_forward(model, forward)


def inspect(model: nn.Module, rules: Rules | str = PAPER_RULES) -> AppliedReport:
    """What each rule would be applied to, found without a forward pass of the model; nothing stays changed.

    Args:
        model: a Hugging Face model with its weights (norms are probed with them).
        rules: the rules in question.

    Returns:
        A report whose calls are 0; parts that cannot be covered are in its ``unsupported``.
    """
    with GIM(model, rules=rules, strict=False) as report:
        return report


def _refuse_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"model must not use dropout, but {name} is in training mode with p={module.p:g}: call model.eval()"
            )


def _refuse_what_cannot_be_patched(model: nn.Module) -> None:
    """Errors for models whose modules could be patched to no effect."""
    for name, module in model.named_modules():
        if isinstance(module, torch._dynamo.eval_frame.OptimizedModule) or module._compiled_call_impl is not None:
            raise UnsupportedModelError(
                f"{name or type(model).__name__} is compiled, and compiled code would run without the rules: give the "
                "module that torch.compile was given (model._orig_mod), or compile after the context has closed"
            )


def _raise_unsupported(model: nn.Module, unsupported: list[tuple[str, str]]) -> None:
    if not unsupported:
        return
    shown = "\n".join(f"  {name}: {reason}" for name, reason in unsupported[:8])
    more = f"\n  and {len(unsupported) - 8} more" if len(unsupported) > 8 else ""
    raise UnsupportedModelError(
        f"{type(model).__name__} is not fully covered by the rules that were asked for:\n{shown}{more}\n"
        "Switch off the rule, or pass strict=False to have this reported instead."
    )


def _guard_checkpoints(model: nn.Module, session: Session) -> None:
    """Make a Hugging Face checkpoint raise where it would run a layer again after its patches are gone."""
    for name, module in model.named_modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is None:
            continue
        session.set_attribute(module, "_gradient_checkpointing_func", _guarded(checkpoint, name, session))


def _guarded(checkpoint: Callable[..., Any], name: str, session: Session) -> Callable[..., Any]:
    def guarded(function: Callable[..., Any], *inputs: Any) -> Any:
        return checkpoint(refuse_when_closed(function, name, session), *inputs)

    return guarded


def refuse_when_closed(function: Callable[..., Any], name: str, session: Session) -> Callable[..., Any]:
    """``function``, but an error once the session has closed: its modules are no longer patched."""

    def checked(*inputs: Any, **named: Any) -> Any:
        if session.closed:
            raise RuntimeError(
                f"{name}: a checkpoint runs this layer again after its GIM context has closed: call backward() "
                "inside the context"
            )
        return function(*inputs, **named)

    return checked

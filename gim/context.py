"""The context in which a model's backward follows GIM."""

from __future__ import annotations

import functools
import weakref
from types import TracebackType
from typing import Any

import torch
import torch._dynamo.eval_frame
from torch import nn

from gim.applied import AppliedReport, UnsupportedModelError
from gim.intercept import checkpoints, interface
from gim.intercept.session import Gate, Session, running, stack_of
from gim.patches import attention
from gim.rules import GIM as PAPER_RULES
from gim.rules import GRADIENT, PAPER_GATE_UP, PAPER_QKV, PAPER_TEMPERATURE, Rules
from gim.rules import get as get_rules

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
        UnsupportedModelError: on entering, or at the end of a forward pass: a part is not covered, is compiled or has
            no weights; names it.
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
        _refuse_dropout(self.model)
        stack = stack_of(self.model)
        session = Session(self.rules, self.strict, stack)
        session.check_no_graph = functools.partial(checkpoints.refuse_reentrant, session)
        # A context that is dropped without being closed, or that an interrupt keeps from closing, leaves nothing behind.
        weakref.finalize(self, session.close)
        interface.prepare(self.model, stack)
        stack.run = forward_pass
        stack.install()
        self._session = session
        session.open()
        return session.report

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


def forward_pass(session: Session, gate: Gate, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """A forward pass of a session's model, or of one of its modules, from outside."""
    fired = session.fired
    with session.entered(gate.name, gate.module) as frame:
        if gate.prepare is None:
            out = gate.inner(*inputs, **named)
        else:
            running.frames.pop()
            try:
                out = gate.prepare(frame, gate.inner, inputs, named)
            finally:
                running.frames.append(frame)
        if gate.name == "" and torch._C._current_graph_task_id() == -1:
            session.report.forwards += 1
            if session.fired == fired and torch.is_grad_enabled() and session.rules != GRADIENT:
                session.refuse("called no attention, norm or gated MLP that can be seen, so no rule acts on anything")
    return out


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
    """Errors for models whose modules could be patched to no effect, or cannot be probed."""
    for name, module in model.named_modules():
        if isinstance(module, torch._dynamo.eval_frame.OptimizedModule) or module._compiled_call_impl is not None:
            raise UnsupportedModelError(
                f"{name or type(model).__name__} is compiled, and compiled code would run without the rules: give the "
                "module that torch.compile was given (model._orig_mod), or compile after the context has closed"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"{name} is on the meta device: load the weights first; for memory alone, gim.estimate_memory takes "
                "a model without them"
            )


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated layers of a model: the longest ``ModuleList`` whose every entry contains attention."""
    best: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) <= len(best):
            continue
        if all(attention.attention_modules(layer) for layer in module):
            best = [(f"{name}.{index}", layer) for index, layer in enumerate(module)]
    return best

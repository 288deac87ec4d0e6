"""The context in which a model's backward follows GIM."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from types import TracebackType
from typing import Any

import torch
import torch._dynamo.eval_frame
from torch import nn
from torch.autograd import forward_ad

from gim.applied import AppliedReport, UnsupportedModelError
from gim.intercept import checkpoints, compiled, fused, interface
from gim.intercept.flow import take_as_inputs, take_as_weights
from gim.intercept.frames import Frame, in_backward, running
from gim.intercept.gates import Gate, interrupted
from gim.intercept.proof import Proof, Run
from gim.intercept.session import Session, Stack, stack_of
from gim.intercept.values import ARGUMENTS_DEEP, collect
from gim.parts import anatomy
from gim.parts.placement import refuse_context_parallelism, refuse_unsupported_placement
from gim.rules import GIM as PAPER_RULES
from gim.rules import PAPER_GATE_UP, PAPER_QKV, PAPER_TEMPERATURE, Rules, resolve
from gim_kernels import engines
from gim_kernels.types import DTYPES, Engine


def check_engine(engine: str, model: nn.Module) -> None:
    """Refuse an engine that cannot run a model in its dtype where it lies; raises as :func:`engines.check`."""
    engines.check_name(engine)
    held = next((x for x in model.parameters() if x.dtype in DTYPES), None)
    if held is not None:
        engines.check(engine, held.device, held.dtype)


class GIM:
    """Inside this context, gradients through a model follow the GIM rules.

    Every norm, attention and gated MLP that a rule should act on is found as the model's own forward runs, by what is
    computed, and counted; the first forward of each kind is watched operator by operator, and what no rule has reached
    is an error. What is differentiated inside may be anything: a loss with its own ``backward()``,
    ``torch.autograd.grad``, hooks. The backward may run after the context has closed; a checkpoint's recompute may not,
    and raises.

    A forward pass follows the innermost context that its own thread or task has opened, in whatever order they close.
    A forward pass that an error ends is looked at as far as it ran: what no rule had reached is in the report at once,
    and an error on closing, unless one leaves the context anyway.
    Only what runs inside the ``forward`` of the model or of one of its modules is touched, and nothing of a hook of
    yours.
    A copy or a pickle made inside is independent of the context, and after it the model is as it was, bit for bit.

    Args:
        model: a Hugging Face model, a model of TransformerLens, or any other module.
        freeze_norm: treat the statistic of every norm as a constant.
        softmax_temperature: temperature of the softmax backward; None for the ordinary softmax gradient.
        q_scale, k_scale, v_scale: factors of the gradients of queries, keys and values; None for 1.
        gate_scale, up_scale: factors of the gradients of the branches of gated MLPs; None for 1.
        rules: in place of the single arguments: :class:`gim.rules.Rules` or the name of a preset.
        strict: whether a part that a rule should act on and cannot is an error. With False it is reported in
            :attr:`AppliedReport.unsupported`.
        engine: which code runs the operators. ``"auto"``: Triton on a GPU, blockwise elsewhere; or by name
            ``"triton"``, ``"blockwise"``, ``"composed"`` (attention from calls of torch's own exact attention; norms
            and gated products as under ``"auto"``) or ``"reference"`` (the specification, slow, which holds the T x S
            scores of a layer at a time). What ran is in :attr:`AppliedReport.engines`, as the operators said it.

    Raises:
        UnsupportedModelError: on entering, or at a forward pass: a part is not covered, or does not lie
            whole in this process (a sharded sequence, sharded or offloaded weights, a stage of a pipeline); names it.
        ValueError: a value that no rule allows; no such engine; dropout is on.
        TypeError: ``strict`` is no bool.
        TypeError, RuntimeError: on entering: the engine cannot run the model's dtype, or on its device.
        NotImplementedError: at a forward pass: the engine has not what an attention needs, such as a softcap.
        RuntimeError: at a forward pass: forward-mode derivatives are asked for.
        RuntimeError: this context is open already, or is opened in code that ``torch.compile`` runs.

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
        engine: Engine = "auto",
    ) -> None:
        anatomy.check_module(model)
        self.model = model
        if not isinstance(strict, bool):
            raise TypeError(f"strict must be True or False, got {strict!r:.80}")
        self.strict = strict
        engines.check_name(engine)
        self.engine = engine
        self.rules = resolve(
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
        compiled.refuse_inside()
        if self._session is not None:
            raise RuntimeError("this GIM context is already open: make another for a nested one")
        modules = anatomy.of(self.model).modules
        check_engine(self.engine, self.model)
        stack = stack_of(self.model)
        session = Session(self.rules, self.strict, stack, self.engine)
        session.check_no_graph = functools.partial(checkpoints.refuse_reentrant, session)
        # A context that is dropped, or that an interrupt keeps from closing, leaves nothing behind.
        weakref.finalize(self, session.close)
        session.proof = Proof(self.model, session)
        stack.run, stack.leaf = forward_pass, fused.run_of
        _install(modules, stack)
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
            report, name = session.report, type(self.model).__name__
            if session.passes and not report.forwards:
                report.notes.append(
                    f"no forward of {name} itself ran, only of modules in it: what its other code computes follows no "
                    "rule"
                )
            elif not report.forwards and exception is None and not session.stopped:
                report.notes.append(f"no forward of {name} ran inside: nothing was looked at")
            if exception is None:
                session.add_unsupported(session.early)


def _install(modules: Mapping[str, nn.Module], stack: Stack) -> None:
    """Put gates before the modules that a stack's model consists of."""
    refuse_unsupported_placement(modules)
    _refuse_dropout(modules)
    interface.prepare(modules, stack)
    stack.install(modules)


def forward_pass(session: Session, gate: Gate, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """A forward pass of a session's model, or of one of its modules, from outside."""
    model = gate.stack.model()
    assert model is not None, "it is being called"
    modules = anatomy.of(model).modules
    if not gate.stack.consists_of(modules):  # some were exchanged since the context was opened
        _install(modules, gate.stack)
    refuse_context_parallelism(modules)
    _refuse_forward_mode()
    compiled.refuse_recording()
    compiled.hold()
    again = in_backward()  # a checkpoint's second run has been seen in its first
    # Where no gradient is asked for, none can be wrong.
    proof = session.proof if session.proves and torch.is_grad_enabled() and not again else None

    seen = Run(whole=gate.name == "")

    def run(_: Frame) -> Any:
        running.frames.pop()
        return gate.within(session, inputs, named)

    held = []  # while it runs
    try:
        if torch.is_grad_enabled():
            own = [kept for one in modules.values() for kept in (one._parameters, one._buffers) if kept]
            held += take_as_weights([x for kept in own for x in kept.values() if x is not None])
            held += take_as_inputs(_arguments(gate, inputs, named))
        with nullcontext() if proof is None else proof.watching(seen, gate.name, gate.module, inputs, named):
            out = session.inside(gate.name, gate.module, run)
    except UnsupportedModelError:
        session.without_values()
        session.stopped = True
        raise
    except BaseException as error:
        if not again:
            missing = session.without_values(interrupted(error, gate.stack))
            session.ended(error, missing if proof is None else missing + proof.unreached(seen))
        raise
    if not again:
        session.passes += 1
        session.report.forwards += gate.name == ""
        session.add_unsupported(session.without_values())
    if proof is not None:
        session.add_unsupported(proof.unreached(seen))
    return out


def _arguments(gate: Gate, inputs: tuple[Any, ...], named: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that a forward is called with and that a gradient is asked for, but the model's own weights."""
    found: list[torch.Tensor] = []
    collect([inputs, named], found, set(), ARGUMENTS_DEEP)
    live = [one for one in found if one.requires_grad]
    if any(isinstance(one, nn.Parameter) for one in live):
        own = {id(one) for module in gate.stack.modules.values() for one in module._parameters.values()}
        live = [one for one in live if id(one) not in own]
    return live


def _refuse_forward_mode() -> None:
    """An error where derivatives are computed along with the forward: rules are of backward passes.

    Raises:
        RuntimeError: they are.
    """
    level = torch._C._functorch.peek_interpreter_stack()
    jvp = level is not None and level.key() == torch._C._functorch.TransformType.Jvp
    if jvp or forward_ad._current_level >= 0:
        raise RuntimeError(
            "forward-mode derivatives (torch.func.jvp, jacfwd, torch.autograd.forward_ad) follow no rule of GIM, which "
            "changes backward passes: call torch.autograd.grad"
        )


def inspect(
    model: nn.Module,
    rules: Rules | str = PAPER_RULES,
    input_ids: torch.Tensor | None = None,
    *,
    engine: Engine = "auto",
) -> AppliedReport:
    """What each rule is applied to in one forward pass, every operator of which is watched; nothing stays changed.

    Args:
        model: a model with its weights.
        rules: the rules in question.
        input_ids: ``[B, T]`` token ids to run it on; with None the ids 0 and 1, in one row.
        engine: as in :class:`GIM`.

    Returns:
        A report of that forward; parts that cannot be covered are in its ``unsupported``.
    """
    parts = anatomy.of(model)
    if input_ids is None:
        input_ids = torch.arange(2, device=parts.device)[None]
    asking = parts.embedding.register_forward_hook(lambda _, __, out: out.detach().requires_grad_().clone())
    with asking, GIM(model, rules=rules, strict=False, engine=engine) as report, torch.enable_grad():
        inputs, named = parts.call.arguments(parts.call.taken, model, input_ids, None, None)
        model(*inputs, **named)
    return report


def _refuse_dropout(modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"model must not use dropout, but {name} is in training mode with p={module.p:g}: call model.eval()"
            )

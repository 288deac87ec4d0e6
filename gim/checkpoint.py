"""A memory plan at work: layers and MLPs that run again, what is kept and where, the last layer's few queries."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from gim.applied import UnsupportedModelError
from gim.intercept.attention import SPANS, Spans
from gim.intercept.checkpoints import Again
from gim.intercept.frames import in_backward
from gim.intercept.gates import Changes
from gim.intercept.session import Session, session_of
from gim.offload import Offload, Watch, pool_of
from gim.parts import anatomy
from gim.parts.adapters.hugging_face import as_before
from gim.parts.adapters.torch_modules import parameters, written
from gim.parts.calling import Kept
from gim.parts.hidden_states import weights_of
from gim.parts.layers import attentions, inside, stream
from gim.plan import MemoryPlan
from gim.state import State
from gim.tokenwise import (
    MLP,
    Forward,
    NormBefore,
    find_mlps,
    has_global_hooks,
    has_hooks,
    in_tiles,
    is_users,
    mixes_tokens,
    norms_of,
    outside_transforms,
    run_again,
    sets_forward,
)

#: The MLPs of each layer by the layer's name, or the reason why it has none that can run in parts.
MLPs = Mapping[str, list[MLP] | str]


def mlps_of(model: nn.Module, plan: MemoryPlan) -> MLPs:
    """What :func:`gim.tokenwise.find_mlps` says of each decoder layer whose MLPs the plan runs in parts.

    It runs those MLPs on a few tokens, so the weights must be there.
    """
    parts = anatomy.of(model)
    layers = parts.layers
    if not acts_on_mlps(plan):
        layers = layers[-1:] if plan.head == "explained" else ()
    return {name: find_mlps(layer, parts.hidden_size, parts.dtype) for name, layer in layers}


def suited(plan: MemoryPlan, model: nn.Module) -> MemoryPlan:
    """A plan, with ``head="all"`` where more than the model may read what its last layer gives at every position.

    Nothing would tell: what reads it without a gradient, or only looks at it, gets the zeros of what did not run.
    """
    if plan.head == "all" or not _is_read_elsewhere(model):
        return plan
    return dataclasses.replace(plan, head="all")


def _is_read_elsewhere(model: nn.Module) -> bool:
    """Whether what the last layer or the head gives at other positions than the explained may be read."""
    parts = anatomy.of(model)
    # A class is read off a token of the model's choice.
    if parts.head == "class" or has_global_hooks():
        return True
    keeps = any("logits_to_keep" in parameters(core) for core in parts.cores)
    if not keeps and is_users(type(model).forward):
        return True  # all logits go to code that nobody knows
    early, last = parts.early, {layer for _, layer in parts.layers[-1:]}
    width, dtype = parts.hidden_size, parts.dtype
    names = parts.layers[-1][0].split(".") if parts.layers else [""]
    around = {parts.modules.get(".".join(names[:depth])) for depth in range(len(names))}

    def is_changed(module: nn.Module, behind: bool) -> bool:
        """Whether a user acts on a module, or on one in it; on what runs before the last layer they may."""
        if module in early or written(module) in early:
            return False
        behind = behind and module not in last and written(module) not in last
        inside = [child for child in module._modules.values() if child is not None]
        if has_hooks(module) or sets_forward(module) or any(is_changed(child, behind) for child in inside):
            return True
        if not behind or width is None or not is_users(type(module).forward):
            return False
        # A final norm or a head of somebody's own.
        return module not in around and mixes_tokens(module, width, dtype)

    return is_changed(model, behind=True)


def obstacle(plan: MemoryPlan, model: nn.Module, mlps: MLPs) -> str | None:
    """Why a plan cannot be applied to a model, in words that name the layer; None where it can.

    Args:
        plan: the plan.
        model: the model.
        mlps: from :func:`mlps_of`.
    """
    if plan.checkpoint == "none":
        return None
    layers = anatomy.of(model).layers
    if not layers:
        return (
            f"memory={plan.name!r} needs a list of layers, and {type(model).__name__} has no ModuleList whose entries "
            "all contain attention"
        )
    if acts_on_mlps(plan):
        if torch._C._is_any_autocast_enabled():
            return (
                f"memory={plan.name!r} runs MLPs in parts, which is not done under torch.autocast: load the model in "
                'the dtype that it is to run in, or use memory="none" or "layer"'
            )
        for name, layer in layers:
            found = mlps[name]
            if isinstance(found, str):
                return (
                    f"memory={plan.name!r} runs MLPs in parts, which does not apply to {name} "
                    f"({type(layer).__name__}): {found}"
                )
    return None


def acts_on_mlps(plan: MemoryPlan) -> bool:
    """Whether a plan runs MLPs apart from their layers."""
    return plan.checkpoint == "mlp" or plan.mlp_tile is not None


@contextmanager
def applied(
    plan: MemoryPlan,
    model: nn.Module,
    kept: Kept,
    device: torch.device,
    *,
    mlps: MLPs | None = None,
    watch: Watch | None = None,
    ahead: bool | None = None,
    every_tile: bool = True,
    several: bool = False,
) -> Iterator[None]:
    """Inside, the model's layers spend memory by the plan. Must be inside a GIM context, parameters frozen.

    Layers are wrapped on their instances, and no training flag is touched, so that dropout stays off. Gradient
    checkpointing that the user has enabled gives way to the plan inside, and is back afterwards.

    Args:
        plan: the plan.
        model: a Hugging Face model.
        kept: positions whose logits are wanted.
        device: where the hidden states are.
        mlps: from :func:`mlps_of`; None to find them here where the plan acts on them.
        watch: told ``("checkpoints" | "attention" | "host", tensor)`` of what is kept.
        ahead: as in :class:`gim.offload.Offload`.
        every_tile: as in :func:`gim.tokenwise.run_again`.
        several: whether more than one backward follows a forward.

    Raises:
        ValueError: the plan acts on layers or MLPs that the model does not have; names them.
        UnsupportedModelError: a layer does not do the same when it runs again; names it.
    """
    session = session_of(model)
    if session is None:
        raise RuntimeError("a memory plan is applied inside a GIM context only")
    if mlps is None:
        mlps = mlps_of(model, plan)
    reason = obstacle(plan, model, mlps)
    if reason is not None:
        raise ValueError(reason)
    offload = None
    if plan.offload == "cpu":
        offload = Offload(pool_of(model, pinned=device.type == "cuda"), device, watch, ahead, several)
    inner = Changes(session)
    parts = anatomy.of(model)
    layers = _Layers(plan, session, inner, offload, watch, every_tile)
    try:
        for module in parts.modules.values():
            if getattr(module, "gradient_checkpointing", False) is True:
                # A checkpoint in a checkpoint would run a layer twice again.
                inner.set_attribute(module, "gradient_checkpointing", False)
        for index, (name, layer) in enumerate(parts.layers):
            of_layer = mlps.get(name, "")
            of_mlps = [] if isinstance(of_layer, str) else of_layer
            # A layer that stands elsewhere too runs for all positions there.
            again = any(other is layer for _, other in parts.layers[:-1])
            is_last = index == len(parts.layers) - 1 and not again and plan.head == "explained"
            if is_last and layers.narrow(layer, name, kept, of_mlps):
                continue  # its few queries leave less to keep than a checkpoint would
            if acts_on_mlps(plan):
                layers.run_mlps_again(layer, name, index, of_mlps)
            if plan.checkpoint == "layer":
                layers.run_again(layer, name, index)
        try:
            yield
        except torch_checkpoint.CheckpointError as error:
            raise UnsupportedModelError(
                f"{layers.running}: the layer does not do the same when a checkpoint runs it again, so "
                f'memory={plan.name!r} cannot be applied; memory="none" can. {error}'
            ) from error
    finally:
        inner.close()
        if offload is not None:
            offload.close()


class _Layers:
    """The layers of one model under one plan."""

    def __init__(
        self,
        plan: MemoryPlan,
        session: Session,
        inner: Changes,
        offload: Offload | None,
        watch: Watch | None,
        every_tile: bool,
    ) -> None:
        self._plan = plan
        self._session = session
        # What is changed is put back once nobody holds the changes, and these are reached from what they have changed.
        self._inner: Changes = weakref.proxy(inner)
        self._offload = offload
        self._watch = watch
        self._every_tile = every_tile
        #: Name of the layer that ran again last.
        self.running = ""
        #: Whether the last layer runs, and only the explained positions of what it runs are wanted.
        self._narrow = False

    def run_again(self, layer: nn.Module, name: str, index: int) -> None:
        """Keep a layer's input, and attention's output where the plan says so; run it again in the backward."""
        forward = Again(self._session, layer.forward, name, layer)
        modules = inside(layer, name)

        def run(*inputs: Any, **named: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*inputs, **named)
            state = State(modules)
            # Tensors with a gradient are the checkpoint's arguments, however the model passes them: those are kept.
            flat, spec = tree_flatten((inputs, named))
            at = [place for place, x in enumerate(flat) if isinstance(x, torch.Tensor) and x.requires_grad]
            moving = [flat[place] for place in at]
            for place in at:
                flat[place] = None

            def again(*tensors: torch.Tensor) -> Any:
                self.running = name
                # What a layer adds to a cache must not be there when it runs again, nor be kept until then.
                filled = [as_before(x) for x in flat]
                for place, x in zip(at, tensors, strict=True):
                    filled[place] = x
                inputs, named = tree_unflatten(filled, spec)
                with outside_transforms(), state.restored() if in_backward() else nullcontext():
                    return forward(*inputs, **named)

            attention: list[tuple[Any, ...]] = []

            def contexts() -> tuple[Any, Any]:
                if not self._plan.keep_attention:
                    return nullcontext(), nullcontext()
                return _AtAttention(self, index, attention, False), _AtAttention(self, index, attention, True)

            with self.keeping(index):
                # The random state is not kept: dropout is refused, so nothing in a layer is random.
                return torch_checkpoint.checkpoint(
                    again,
                    *moving,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    determinism_check=_SAME,
                    context_fn=contexts,
                )

        self._inner.replace_forward(layer, run)

    def run_mlps_again(self, layer: nn.Module, name: str, index: int, mlps: list[MLP]) -> None:
        """Keep the input of a layer's MLPs and run them again in the backward, in tiles."""
        norm = NormBefore()
        for child in (written(layer.get_submodule(one)) for one in mlps[0].norms) if mlps else ():
            norm.watch(child, Again(self._session, child.forward, name, child), self._inner)
        for mlp in mlps:
            self._run_mlp_again(mlp, f"{name}.{mlp.name}", index, norm)
        handle = layer.register_forward_hook(lambda *_: norm.forget())
        self._inner.callback(handle.remove)

    def _run_mlp_again(self, mlp: MLP, name: str, index: int, norm: NormBefore) -> None:
        forward = Again(self._session, mlp.module.forward, name, mlp.module)
        modules = inside(mlp.module, name)
        tile = self._plan.mlp_tile
        if mlp.whole and tile is not None:
            tile = None
            self._session.report.notes.append(f"{name} runs whole: {mlp.whole}")
        outside = self._plan.checkpoint == "mlp"

        def run(hidden: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
            _refuse_more(name, others, named)
            before = norm.take(hidden)
            if not torch.is_grad_enabled() or not hidden.requires_grad:
                return forward(hidden)
            source, normalise = (hidden, None) if before is None else before
            state = State(modules)

            def again(x: torch.Tensor) -> torch.Tensor:
                with state.restored():
                    return cast(torch.Tensor, forward(x if normalise is None else normalise(x)))

            def compute() -> torch.Tensor:
                return self._compute(name, forward, hidden, tile)

            with self.keeping(index) if outside else nullcontext():
                return run_again(source, again, compute, tile, self._every_tile)

        self._inner.replace_forward(mlp.module, run)

    def _compute(self, name: str, forward: Forward, hidden: torch.Tensor, tile: int | None) -> torch.Tensor:
        """An MLP's output; in a forward pass with a graph, which tells the rules what they act on."""
        if in_backward():
            with torch.no_grad():
                return in_tiles(forward, hidden.detach(), tile)

        # Nothing of the graph is kept.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            y = forward(_Inside.apply(hidden, name))
        if not y.requires_grad:
            raise UnsupportedModelError(
                f"{name}: the MLP runs without gradients, so that what flows through it would be left out"
            )
        return y.detach()

    def narrow(self, layer: nn.Module, name: str, kept: Kept, mlps: list[MLP]) -> bool:
        """Run the last layer's attention and MLPs for the explained positions only; whether that can be done.

        It is done where every other part of the layer maps each token by itself. What the layer puts out elsewhere is
        then not what the model would, and reaches nothing: the gradients there are checked to be 0.
        """
        attending = attentions(layer)
        proved = {id(mlp.module) for mlp in mlps if not mlp.whole} | {id(norm) for norm in norms_of(layer)}
        others = [child for child in layer.children() if id(child) not in proved and not attentions(child)]
        if len(attending) != 1 or any(weight.numel() for child in others for weight in weights_of(child)):
            return False

        def refuse(grad: torch.Tensor | None) -> None:
            _refuse_elsewhere(grad, kept, name)

        def place(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = stream(inputs, named)
            if hidden is None or not self._session.is_followed_here():
                return
            # A wrapper may have put tokens before those of the prompt.
            attending[0].__dict__[SPANS] = Spans(spans(kept.among(hidden.shape[1])), refuse, self._session)
            self._narrow = True

        self._inner.set_attribute(attending[0], SPANS, None)
        self._inner.callback(layer.register_forward_pre_hook(place, with_kwargs=True).remove)
        for mlp in mlps:
            self._narrow_mlp(mlp.module, f"{name}.{mlp.name}", kept)

        def check(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not self._narrow or not self._session.is_followed_here():
                return
            # Other layers may hold the same attention or MLP.
            self._narrow, attending[0].__dict__[SPANS] = False, None
            if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                hidden.register_hook(refuse)

        handle = layer.register_forward_hook(check, always_call=True)
        self._inner.callback(handle.remove)
        return True

    def _narrow_mlp(self, mlp: nn.Module, name: str, kept: Kept) -> None:
        forward = Again(self._session, mlp.forward, name, mlp)

        def run(hidden: torch.Tensor, *others: Any, **named: Any) -> Any:
            if others or named or not self._narrow:
                return forward(hidden, *others, **named)
            at = kept.among(hidden.shape[1]).to(hidden.device)
            some = forward(hidden.index_select(1, at))
            return some.new_zeros(hidden.shape).index_copy_(1, at, some)

        self._inner.replace_forward(mlp, run)

    def keeping(self, index: int) -> AbstractContextManager[Any]:
        """Inside, what is saved for the backward is a checkpoint: watched, and offloaded where the plan says so."""
        if self._offload is None and self._watch is None:
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(lambda x: self.keep(x, index, "checkpoints"), self.give)

    def keep(self, x: torch.Tensor, index: int, part: str) -> Any:
        """Keep a tensor for the backward."""
        # Older releases of torch save an empty tensor with every checkpoint.
        if self._offload is not None and x.numel() > 0:
            return self._offload.pack(x, index)
        if self._watch is not None:
            self._watch(part, x)
        return x

    def give(self, kept: Any) -> torch.Tensor:
        """What :meth:`keep` kept."""
        if self._offload is None or isinstance(kept, torch.Tensor):
            return kept
        return self._offload.unpack(kept)


class _Inside(torch.autograd.Function):
    """The input of an MLP that runs again, from where no gradient comes back but through its result."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, name: str) -> torch.Tensor:
        ctx.name = name
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise UnsupportedModelError(
            f"{ctx.name}: what is explained depends on a tensor that its code hands out beside its result, so it "
            'cannot run in parts: use memory="none" or "layer"'
        )


class _Sample:
    """A few numbers of a tensor, equal to those of another where only the order of sums differs.

    What a layer reads beside its arguments, from an object that other layers write, say, may be another when it runs
    again; its shapes would not tell.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self._kind = x.shape, x.dtype, x.device
        self._numbers: torch.Tensor | None = None
        if not x.is_meta and x.is_floating_point() and type(x) in (torch.Tensor, nn.Parameter):
            steps = [-(-size // _SAMPLED) for size in x.shape]
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                self._numbers = x.detach()[tuple(slice(step // 2, None, max(step, 1)) for step in steps)].clone()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Sample) or self._kind != other._kind:
            return False
        if self._numbers is None or other._numbers is None or self._numbers.numel() == 0:
            return True
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            one, two = self._numbers.double(), other._numbers.double()
            allowed = max(_SAMPLE_ULPS * torch.finfo(self._numbers.dtype).eps, 1e-5)
            largest = one.abs().nan_to_num(0.0, 0.0, 0.0).max()
            return torch.allclose(one, two, rtol=0.0, atol=allowed * float(largest), equal_nan=True)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{tuple(self._kind[0])} {self._kind[1]} {self._kind[2]}, {self._numbers}"


#: How many places along each axis are looked at, and roundings of the largest number by which any may differ.
_SAMPLED, _SAMPLE_ULPS = 3, 64
#: What torch's checkpoints are to compare of a run and the next, by name.
_SAME = "gim: a few numbers of each"
torch_checkpoint._allowed_determinism_checks_to_fns[_SAME] = _Sample


class _AtAttention(TorchDispatchMode):
    """Inside, below autograd, attention's outputs of one layer's forward are kept. Where that runs again, attention
    does not: its outputs are those kept, in the order they were, each time anew.

    Args:
        layers: what keeps them.
        index: of the layer.
        kept: of both runs.
        again: whether it is the second.
    """

    def __init__(self, layers: _Layers, index: int, kept: list[tuple[Any, ...]], again: bool) -> None:
        super().__init__()
        self._layers, self._index, self._kept, self._again = layers, index, kept, again
        self._used = 0

    def __enter__(self) -> Any:
        self._used = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = func is torch.ops.gim_kernels.attention.default
        if ours and self._again:
            if self._used == len(self._kept):
                times = f"Attention ran {self._used} times at first, and more often again."
                raise torch_checkpoint.CheckpointError(times)
            self._used += 1
            return tuple(self._layers.give(x).detach() for x in self._kept[self._used - 1])
        out = func(*args, **(kwargs or {}))
        if ours:  # detached, or autograd would put the graph on what is kept, and with it everything that it holds
            self._kept.append(tuple(self._layers.keep(x.detach(), self._index, "attention") for x in out))
        return out


def spans(kept: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """Ascending positions as runs ``start:stop`` of neighbours."""
    runs: list[tuple[int, int]] = []
    for position in kept.tolist():
        if runs and runs[-1][1] == position:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return tuple(runs)


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def _refuse_more(name: str, others: tuple[Any, ...], named: dict[str, Any]) -> None:
    if others or named:
        raise UnsupportedModelError(
            f"{name}: the MLP was called with more than its input ({len(others)} positional, {sorted(named)} named "
            'arguments), so it cannot run in parts: use memory="none" or "layer"'
        )


def _all_of(grad: torch.Tensor) -> torch.Tensor:
    """A gradient ``[B, ...]``; under ``torch.vmap``, which hides several of them in one, as ``[N * B, ...]``."""
    functorch = torch._C._functorch
    if not functorch.is_batchedtensor(grad):
        return grad
    return functorch.get_unwrapped(grad).movedim(functorch.maybe_get_bdim(grad), 0).flatten(0, 1)


def _refuse_elsewhere(grad: torch.Tensor | None, kept: Kept, name: str) -> None:
    """An error unless a gradient ``[B, T, ...]``, None for all zeros, is 0 at every position that is not explained."""
    if grad is None or grad.is_meta:
        return
    grad = _all_of(grad)
    at = kept.among(grad.shape[1]).to(grad.device)
    elsewhere = torch.count_nonzero(grad) - torch.count_nonzero(grad.index_select(1, at))
    if bool(elsewhere):
        raise UnsupportedModelError(
            f"{name}: what is explained depends on the last layer at other positions than the explained, so it must "
            "run for all: add head=all to the memory plan"
        )

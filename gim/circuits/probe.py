"""Who reads and writes the residual stream in each layer, found from one forward pass of the model's own code.

Nothing is told by its name. A layer's attention is the part from which the attention interface is called; the linear
maps of q, k and v are those whose outputs the queries, keys and values are computed from, by autograd's own graph, and
each head is the columns that its gradient reaches. A norm is what stands between the stream and a part. What was found
is then proved on numbers: the stream after a layer is what it was, plus what attention and MLP wrote.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gim.applied import UnsupportedModelError
from gim.circuits.graph import BRANCHES
from gim.circuits.wiring import Branch, Layer, Linear, Wiring, first_tensor, statistic, with_stream
from gim.context import GIM
from gim.evaluation.perturbation import Forwards
from gim.intercept.session import session_of
from gim.nonfinite import refuse_nonfinite
from gim.parts import anatomy
from gim.parts.parameters import frozen_parameters
from gim_kernels import engines

#: Tokens of the forward pass in which a model's parts are found.
PROBE_TOKENS = 8
#: How far two ways to one number may differ by rounding, in units in the last place of all its terms: of float32, in
#: which the terms of a product are summed up, and of a shorter type, to which few numbers on the way are rounded.
ULPS, ULPS_HALF = 64, 8


def find(model: nn.Module, ids: torch.Tensor) -> Wiring:
    """The wiring of a causal language model.

    Args:
        model: of transformers, in evaluation mode.
        ids: ``[T]``, some prompt; its first tokens are run.

    Raises:
        UnsupportedModelError: a part is not found, or the layers do not add up; names the layer and what is missing.
        FloatingPointError: the logits hold NaN or infinity; names the first module with one.
        ValueError: the model reads two texts.
    """
    parts = anatomy.of(model)
    parts.call.refuse()
    if not parts.layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no ModuleList of layers with attention, so its circuits cannot be told"
        )
    probes = [_Probe(name, layer) for name, layer in parts.layers]
    with frozen_parameters(model), torch.enable_grad(), GIM(model, rules="GRADIENT"):
        session = session_of(model)
        assert session is not None, "a GIM context is open around this"
        handles = [handle for probe in probes for handle in probe.hooks(first=probe is probes[0])]
        session.see_attention = lambda module, *tensors: _attended(probes, module, tensors)
        try:
            logits = Forwards(model).logits(ids[None, :PROBE_TOKENS])
        finally:
            session.see_attention = None
            for handle in handles:
                handle.remove()
        refuse_nonfinite(logits, parts, lambda: Forwards(model).logits(ids[None, :PROBE_TOKENS]))
        wiring = _proved(model, probes, [probe.layer() for probe in probes])
        _refuse_hooks(wiring)
        _prove_ungrouped(model, wiring, ids[None, :PROBE_TOKENS], logits)
    return wiring


def _attended(probes: Sequence[_Probe], module: nn.Module, tensors: tuple[torch.Tensor, ...]) -> None:
    running = next((probe for probe in probes if probe.runs), None)
    if running is not None:
        running.attentions.append((module, *tensors))


def _proved(model: nn.Module, probes: Sequence[_Probe], found: Sequence[tuple[Layer, bool]]) -> Wiring:
    """The layers, once it is known that they are one stack of the same kind."""
    layers = tuple(layer for layer, _ in found)
    for before, after in itertools.pairwise(probes):
        if not same(before.end, after.start):
            raise UnsupportedModelError(
                f"{after.name}: does not read what {before.name} puts out, so {type(model).__name__} has more writers "
                "than its layers"
            )
    for layer, parallel in found:
        if parallel != found[0][1] or (layer.q.heads, layer.k.heads) != (layers[0].q.heads, layers[0].k.heads):
            raise UnsupportedModelError(
                f"{layer.name}: its heads, or the order of its attention and MLP, are not those of {layers[0].name}"
            )
    return Wiring(layers, found[0][1], probes[0].start.shape[-1])


def _refuse_hooks(wiring: Wiring) -> None:
    """A norm in front of attention runs again, for readers and tiles of tokens, where no hook of a user's belongs."""
    for layer in wiring.layers:
        norm = layer.before_attention
        if norm is not None and (norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks):
            raise UnsupportedModelError(
                f"{layer.name}: the norm in front of its attention has hooks, and runs for every reader here: remove "
                "them first"
            )


@torch.no_grad()
def _prove_ungrouped(model: nn.Module, wiring: Wiring, ids: torch.Tensor, logits: torch.Tensor) -> None:
    """Make sure that the model's code goes on with a key and a value for each query head, and says the same."""
    if wiring.layers[0].group == 1:
        return
    with ExitStack() as hooks:
        for layer in wiring.layers:
            for branch in (layer.k, layer.v):
                ungroup = lambda _, __, out, layer=layer: layer.ungroup(out)  # noqa: E731
                hooks.enter_context(branch.linear.module.register_forward_hook(ungroup))
        try:
            found = Forwards(model).logits(ids)
        except RuntimeError as error:  # of a view into heads that are counted
            raise UnsupportedModelError(
                f"{type(model).__name__} does not run with a key and a value for each query head: {error}"
            ) from error
    if not close(found, logits, logits.abs().max()):
        raise UnsupportedModelError(f"{type(model).__name__} says something else with a key for each query head")


def _is_plain(branch: Branch) -> bool:
    """Whether heads are all that a linear map puts out, one after another."""
    columns = branch.columns.flatten()
    return (
        torch.equal(columns, torch.arange(len(columns), device="cpu")) and len(columns) == branch.linear.weight.shape[0]
    )


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are one."""
    return one is other or (
        one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
    )


@torch.no_grad()
def close(one: torch.Tensor, other: torch.Tensor, *terms: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether two tensors differ by rounding at most, number by number, where each is a sum of terms of these sizes.

    Args:
        dtype: that of what was rounded last; None for that of ``one``.
    """
    if one.shape != other.shape:
        return False
    # Norms of transformers compute in float32 whatever the model's dtype is.
    rounding = max(ULPS_HALF * torch.finfo(dtype or one.dtype).eps, ULPS * torch.finfo(torch.float32).eps)
    wide = torch.promote_types(one.dtype, torch.float32)
    size = sum((x.abs().to(wide) for x in terms), torch.zeros((), dtype=wide, device=one.device))
    return bool(((one.to(wide) - other.to(wide)).abs() <= rounding * size).all())


@dataclass
class _Call:
    """One call of a module: what it was given first, and what it put out first."""

    name: str
    module: nn.Module
    given: torch.Tensor
    out: torch.Tensor
    #: Whether attention had been called by then.
    late: bool


class _Probe:
    """What happened in one layer of one forward pass."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name = name
        self.module = layer
        self.runs = False
        self.start: torch.Tensor
        self.end: torch.Tensor
        self.calls: list[_Call] = []
        self.attentions: list[tuple[Any, ...]] = []

    def hooks(self, *, first: bool) -> list[Any]:
        """What notes the calls; in the first layer the stream becomes a leaf that asks for a gradient."""

        def before(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            self.runs = True
            inputs, named, self.start = with_stream(inputs, named, _leaf if first else lambda _: None)
            return inputs, named

        def after(_: nn.Module, __: Any, out: Any) -> None:
            self.runs = False
            self.end = first_tensor(out)

        handles = [
            self.module.register_forward_pre_hook(before, with_kwargs=True),
            self.module.register_forward_hook(after),
        ]
        for name, module in anatomy.of(self.module).modules.items():
            if name:
                handles.append(module.register_forward_hook(self._noting(name), with_kwargs=True))
        return handles

    def _noting(self, name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
            given = next((one for one in (*inputs, *named.values()) if isinstance(one, torch.Tensor)), None)
            made = first_tensor(out)
            if isinstance(given, torch.Tensor) and isinstance(made, torch.Tensor):
                self.calls.append(_Call(name, module, given, made, bool(self.attentions)))

        return note

    def refuse(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.name} ({type(self.module).__name__}): {reason}")

    def layer(self) -> tuple[Layer, bool]:
        """The layer's parts, and whether its MLP reads what its attention reads."""
        if len(self.attentions) != 1:
            raise self.refuse(
                f"calls the attention interface of transformers {len(self.attentions)} times in one forward pass, so "
                "its heads cannot be told"
            )
        caller, query, key, value, attended = self.attentions[0]
        attention = self._child_with(caller)
        branches = [self._branch(name, x, attention) for name, x in zip(BRANCHES, (query, key, value), strict=True)]
        if branches[0].heads % branches[1].heads or branches[1].heads != branches[2].heads:
            raise self.refuse("its key heads do not divide its query heads")
        if branches[0].heads != branches[1].heads and not all(map(_is_plain, branches[1:])):
            raise self.refuse(
                "its keys or values, which are fewer than its queries, are not all that a linear map puts out, head by "
                "head, so no query head can see one of its own"
            )
        read = [self._given(one.linear) for one in branches]
        if not all(same(one, read[0]) for one in read):
            raise self.refuse("its queries, keys and values are maps of different inputs")
        before_attention, stream = self._norm_before(read[0], attention)
        if not same(stream, self.start):
            raise self.refuse(f"what {attention.name} reads is not the layer's input, or one norm of it")
        out = self._out(attention, attended, branches[0])
        mlp = self._mlp(attention)
        before_mlp, stream = self._norm_before(mlp.given, mlp)
        after_attention, wrote = self._norm_after(attention)
        after_mlp, mlp_wrote = self._norm_after(mlp)
        weights = torch.ones_like(stream)
        (reached,) = torch.autograd.grad(stream, wrote, weights, retain_graph=True, allow_unused=True)
        parallel = reached is None
        if not close(stream, self.start if parallel else self.start + wrote, self.start, wrote):
            raise self.refuse(f"what {mlp.name} reads is neither the layer's input nor that and what attention wrote")
        if not close(self.end, self.start + wrote + mlp_wrote, self.start, wrote, mlp_wrote):
            raise self.refuse(
                "what it puts out is not its input and what its attention and its MLP wrote: the stream is scaled, or "
                "something else writes into it"
            )
        found = Layer(
            name=self.name,
            module=self.module,
            attention=attention.module,
            mlp=mlp.module,
            before_attention=before_attention,
            before_mlp=before_mlp,
            after_attention=after_attention,
            after_mlp=after_mlp,
            scale=None if after_attention is None else self._scale(attention.out, wrote, out),
            q=branches[0],
            k=branches[1],
            v=branches[2],
            out=out,
        )
        return found, parallel

    # -- parts

    def _child(self, name: str) -> str:
        return name.partition(".")[0]

    def _child_with(self, module: nn.Module) -> _Call:
        """The call of the direct child that holds a module."""
        holding = {self._child(name) for name, one in anatomy.of(self.module).modules.items() if one is module}
        found = [call for call in self.calls if call.name in holding]
        if len(found) != 1:
            raise self.refuse("its attention is no module of the layer that is called once")
        return found[0]

    def _within(self, part: _Call) -> list[_Call]:
        return [call for call in self.calls if call.name.startswith(f"{part.name}.")]

    def _linear(self, call: _Call) -> Linear | None:
        """The call's module as a linear map, if its output is the one of its weight."""
        weight, bias = (call.module._parameters.get(name) for name in ("weight", "bias"))
        if weight is None or weight.dim() != 2 or not weight.is_floating_point():
            return None
        if weight.dtype != call.given.dtype and not engines.autocasts(weight.device.type):
            raise self.refuse(
                f"{call.name} is {weight.dtype} and is given {call.given.dtype}, under an autocast of the model's own, "
                "and circuits run it by itself: load the model in the dtype that it is to run in"
            )
        for transposed in (False, True):
            matrix = weight.T if transposed else weight
            if (matrix.shape[1], matrix.shape[0]) != (call.given.shape[-1], call.out.shape[-1]):
                continue
            given, matrix = call.given.detach(), matrix.detach().T
            added = torch.zeros_like(matrix[0]) if bias is None else bias.detach()
            if close(call.out, given @ matrix + added, given.abs() @ matrix.abs(), added):
                return Linear(f"{self.name}.{call.name}", call.module, transposed)
        return None

    def _branch(self, name: str, x: torch.Tensor, attention: _Call) -> Branch:
        """The linear map that queries, keys or values ``[B, H, T, D]`` come from, and the columns of each head."""
        calls = [
            call
            for call in self._within(attention)
            if not call.late and call.module._parameters.get("weight") is not None
        ]
        calls = [call for call in calls if call.module._parameters["weight"].dim() == 2]  # type: ignore[union-attr]
        weights = torch.linspace(1.0, 2.0, x[:, 0].numel(), dtype=x.dtype, device=x.device).view_as(x[:, 0])
        found: list[tuple[_Call, torch.Tensor]] = []
        for head in range(x.shape[1]):
            grads = torch.autograd.grad(
                x[:, head], [call.out for call in calls], weights, retain_graph=True, allow_unused=True
            )
            reached = [(call, grad) for call, grad in zip(calls, grads, strict=True) if grad is not None]
            reached = [(call, (grad != 0).flatten(0, -2).any(0)) for call, grad in reached if bool((grad != 0).any())]
            if len(reached) != 1 or int(reached[0][1].sum()) != x.shape[-1]:
                raise self.refuse(
                    f"{name} of head {head} is computed from {len(reached)} linear maps, or not from {x.shape[-1]} "
                    "outputs of one, so it is no reader of its own"
                )
            found.append((reached[0][0], reached[0][1].nonzero().flatten().cpu()))
        first = found[0][0]
        linear = self._linear(first)
        if linear is None or any(call is not first for call, _ in found):
            raise self.refuse(f"{name} does not come from one plain linear map ({first.name})")
        return Branch(linear, torch.stack([columns for _, columns in found]))

    def _given(self, linear: Linear) -> torch.Tensor:
        return next(call.given for call in self.calls if call.module is linear.module)

    def _norm_before(self, given: torch.Tensor, part: _Call) -> tuple[nn.Module | None, torch.Tensor]:
        """The module between the stream and what a part reads, and the stream."""
        if same(given, self.start):
            return None, given
        makers = [
            call for call in self.calls
            if "." not in call.name and same(call.out, given) and not same(call.given, given)
        ]  # fmt: skip
        if not makers:
            return None, given
        if len(makers) > 1 or not self._is_norm(makers[0].module):
            raise self.refuse(f"between the stream and {part.name} stands {makers[0].name}, which is no norm")
        return makers[0].module, makers[0].given

    def _norm_after(self, part: _Call) -> tuple[nn.Module | None, torch.Tensor]:
        """The module between a part and the stream, and what is written."""
        takers = [
            call for call in self.calls
            if "." not in call.name and same(call.given, part.out) and call.module is not part.module
            and not same(call.out, part.out)
        ]  # fmt: skip
        if not takers:
            return None, part.out
        if len(takers) > 1 or not self._is_norm(takers[0].module):
            raise self.refuse(f"between {part.name} and the stream stands {takers[0].name}, which is no norm")
        return takers[0].module, takers[0].out

    @staticmethod
    def _is_norm(module: nn.Module) -> bool:
        return all(one.dim() <= 1 for one in module.parameters())

    def _out(self, attention: _Call, attended: torch.Tensor, q: Branch) -> Linear:
        """The linear map from the heads to what attention writes."""
        heads = attended.flatten(-2)
        for call in self._within(attention):
            linear = self._linear(call) if call.late and call.given.shape == heads.shape else None
            if linear is not None and torch.equal(call.given, heads):
                if not same(call.out, attention.out) and not torch.equal(call.out, attention.out):
                    raise self.refuse(f"what {call.name} puts out is not what attention puts out")
                if attended.shape[-2] != q.heads:
                    raise self.refuse("attention puts out another number of heads than it has queries")
                return linear
        raise self.refuse("no linear map takes what its heads put out, as it is, to the stream")

    def _mlp(self, attention: _Call) -> _Call:
        """The layer's other part with weights."""
        found = [
            call for call in self.calls
            if "." not in call.name and call.module is not attention.module
            and any(one.dim() > 1 for one in call.module.parameters())
        ]  # fmt: skip
        if len(found) != 1:
            raise self.refuse(f"has {len(found)} parts with weights besides its attention, and one MLP is expected")
        return found[0]

    def _scale(self, given: torch.Tensor, out: torch.Tensor, linear: Linear) -> torch.Tensor:
        """What a norm behind attention multiplies channels by ``[C]``, but for one number a token.

        Only for such a norm does what it makes of a sum of heads go to each of them.
        """
        rows, made = given.detach().flatten(0, -2), out.detach().flatten(0, -2)
        wide = torch.promote_types(rows.dtype, torch.float32)
        rows, made = rows.to(wide), made.to(wide)
        ratio = made / rows  # one number a token times one a channel
        sizes = (ratio / ratio[:1]).nanmedian(1).values
        best, columns = rows.abs().argmax(0), torch.arange(rows.shape[1], device=rows.device)
        scale = ratio[best, columns] / sizes[best]
        expected = rows * statistic(rows, made, scale)[:, None] * scale
        if linear.bias is not None or not close(made, expected, made, dtype=given.dtype):
            raise self.refuse(
                "what stands between attention and the stream is no RMS norm without a bias, so what each head writes "
                "cannot be told"
            )
        return scale.to(given.dtype)


def _leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_(True)

"""What writers wrote and what readers were told, each in its own width, and the products of the two by tiles of tokens.

A head's output has ``D`` numbers a token, and the gradient of its q, k or v as many; only in a tile of a few tokens are
they made as wide as the stream. So no tensor of tokens x nodes x width ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from gim.circuits.graph import Graph
from gim.circuits.wiring import Wiring, first_tensor, picked, statistic, with_stream
from gim.intercept.frames import in_backward

#: Bytes of the writers of one tile of tokens, in the stream's width. One token is a tile at least.
TILE_BYTES = 2**25
#: Layers whose readers' products are made at once: fewer keep no machine busy.
TOGETHER = 4

#: Called with the number of a writing part and what it wrote, ``[B, T, C]``, or ``[B, T, HQ * D]`` for heads. Parts are
#: the input, then each layer's heads and its MLP.
See = Callable[[int, torch.Tensor], None]
Norm = Callable[[torch.Tensor], torch.Tensor]


def heads_part(layer: int) -> int:
    """The number of a layer's heads among the parts that write."""
    return 1 + 2 * layer


def mlp_part(layer: int) -> int:
    """The number of a layer's MLP among the parts that write."""
    return 2 + 2 * layer


class Hooks:
    """Handles of hooks, each removed on leaving. What a hook sees while a checkpoint runs again it has seen before."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def given(self, module: nn.Module, call: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        """Show what a module is given first, or hand it what ``call`` gives in its place."""

        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            inputs, named, _given = with_stream(inputs, named, call)
            return inputs, named

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def made(self, module: nn.Module, call: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        """Show what a module puts out first, or put out what ``call`` gives in its place."""

        def hook(_: nn.Module, __: Any, out: Any) -> Any:
            changed = call(first_tensor(out))
            if changed is None:
                return None
            return (changed, *out[1:]) if isinstance(out, tuple) else changed

        self._handles.append(module.register_forward_hook(hook))

    def through(self, module: nn.Module, call: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        """Show what a module is given and what it puts out."""
        self._handles.append(module.register_forward_hook(lambda _, given, out: call(given[0], out)))


@contextmanager
def written(wiring: Wiring, see: See) -> Iterator[None]:
    """Inside, ``see`` is shown what every part writes, in order, in the model's next forward pass.

    Where a norm stands between attention and the stream, heads are shown times that token's own statistic of it.
    """
    waiting: dict[int, torch.Tensor] = {}

    def once(part: int) -> Callable[[torch.Tensor], None]:
        return lambda x: None if in_backward() else see(part, x.detach())

    def heads(index: int, x: torch.Tensor) -> None:
        if not in_backward():
            waiting[index] = x.detach()

    def normed(index: int, scale: torch.Tensor, given: torch.Tensor, out: torch.Tensor) -> None:
        if not in_backward():
            size = statistic(given.detach(), out.detach(), scale)
            see(heads_part(index), waiting.pop(index) * size[..., None])

    with Hooks() as hooks:
        hooks.given(wiring.layers[0].module, once(0))
        for index, layer in enumerate(wiring.layers):
            if layer.after_attention is None or layer.scale is None:
                hooks.given(layer.out.module, once(heads_part(index)))
            else:
                hooks.given(layer.out.module, partial(heads, index))
                hooks.through(
                    layer.after_attention,
                    partial(normed, index, layer.scale),
                )
            hooks.made(layer.after_mlp or layer.mlp, once(mlp_part(index)))
        yield


class Heard:
    """What the readers of some layers were told in one backward, and the stream in front of their norms.

    Args:
        wiring: of the model.
    """

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        #: The norms in front of attention as they are now, without the hooks and plans of a forward pass to come.
        self._norms = [layer.before_attention and layer.before_attention.forward for layer in wiring.layers]
        #: By layer, the stream ``[N, C]`` that the norm in front of attention reads.
        self.streams: dict[int, torch.Tensor] = {}
        #: By layer and branch, ``[N, heads * D]``: the gradient of its map's output; and by layer and ``"mlp"``,
        #: ``[N, C]``: that of the stream as the MLP alone reads it, or of what a norm made that it shares.
        self.gradients: dict[tuple[int, str], torch.Tensor] = {}
        #: The gradient ``[N, C]`` of what the last layer puts out.
        self.end: torch.Tensor | None = None
        #: By layer, ``[N, C]``: what the norm in front of attention multiplies gradients by, channel by channel; None
        #: for one that does more.
        self._factors: dict[int, torch.Tensor | None] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, a forward pass and its backward fill this. Keys and values run once for each query head."""
        with Hooks() as hooks:
            for index, layer in enumerate(self.wiring.layers):
                if layer.before_attention is not None:
                    hooks.given(layer.before_attention, partial(self._stream, index))
                maps = {id(branch.linear.module): branch.linear.module for branch in layer.branches.values()}
                for number, module in maps.items():
                    names = [name for name, one in layer.branches.items() if id(one.linear.module) == number]
                    hooks.made(module, partial(self._branch, index, names))
                own = layer.mlp if layer.shares_norm else layer.before_mlp or layer.mlp
                hooks.given(own, partial(self._mlp, index))
            hooks.made(self.wiring.layers[-1].module, self._end)
            yield

    def _stream(self, index: int, x: torch.Tensor) -> None:
        if not in_backward():
            self.streams[index] = x.detach().flatten(0, -2)

    def _branch(self, index: int, names: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        layer = self.wiring.layers[index]
        if layer.group > 1 and names != ["q"]:
            x = layer.ungroup(x)
        if x.requires_grad:
            x.register_hook(lambda grad: self._keep(index, names, grad))
        return x

    def _keep(self, index: int, names: Sequence[str], grad: torch.Tensor) -> None:
        for name in names:
            self.gradients[index, name] = grad.detach().flatten(0, -2)

    def _mlp(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if not x.requires_grad:
            return x
        mine = x.view_as(x)  # which the MLP alone reads
        mine.register_hook(lambda grad: self._keep(index, ["mlp"], grad))
        return mine

    def _end(self, x: torch.Tensor) -> None:
        def keep(grad: torch.Tensor) -> None:
            self.end = grad.detach().flatten(0, -2)

        if x.requires_grad:
            x.register_hook(keep)

    def forget(self) -> None:
        """Let go of all that was told so far."""
        self.streams = {index: x for index, x in self.streams.items() if (index, "mlp") not in self.gradients}
        self.gradients, self.end, self._factors = {}, None, {}

    # -- by tiles of tokens

    def readers(self, index: int, tokens: slice, out: torch.Tensor) -> None:
        """Write the gradients of a layer's readers by the stream: q, k and v of every query head, the MLP.

        The GIM context that is open says what the backward of norms does.

        Args:
            index: of the layer.
            tokens: of them.
            out: ``[3 * HQ + 1, n, C]``.
        """
        layer = self.wiring.layers[index]
        for (name, branch), rows in zip(layer.branches.items(), out[:-1].split(layer.q.heads), strict=True):
            grad = self.gradients.get((index, name))
            if grad is None:  # a constant softmax tells q and k nothing
                rows.zero_()
                continue
            if layer.group == 1 or name == "q":
                mine = picked(grad[tokens].T, branch.columns).mT  # [HQ, n, D]
            else:
                mine = grad[tokens].unflatten(-1, (layer.q.heads, -1)).transpose(0, 1)
            rows.copy_(_by_heads(mine, branch.weight, layer.q.heads // branch.heads))
        out[-1] = self.gradients[index, "mlp"][tokens]
        norm = self._norms[index]
        if norm is not None:
            self._through(index, norm, tokens, out if layer.shares_norm else out[:-1])

    def _through(self, index: int, norm: Norm, tokens: slice, grad: torch.Tensor) -> None:
        """Make gradients ``[R, n, C]`` behind the norm in front of attention those in front of it.

        Where its backward goes channel by channel, as under a constant statistic without a mean, every reader's is one
        number a channel times what it was told, and the norm runs for none of them. Then what only some channels are
        told reaches no other, to the last bit in every dtype.
        """
        if index not in self._factors:
            x = self.streams[index]
            some = (torch.rand(x.shape[-1], generator=torch.Generator().manual_seed(0), device="cpu") < 0.5).to(x)
            factor, found = _backward(norm, x, torch.stack([torch.ones_like(x), some.expand_as(x)]))
            self._factors[index] = None
            if torch.equal(found, factor * some):
                self._factors[index] = factor.clone()  # a view would keep both
                del self.streams[index]  # of which nothing more is asked
        factors = self._factors[index]
        if factors is not None:
            grad *= factors[tokens]
        else:
            x = self.streams[index][tokens]
            grad.copy_(_backward(norm, x, grad.to(x.dtype)))


def _backward(norm: Norm, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Gradients ``[R, n, C]`` behind a norm of ``x`` ``[n, C]`` as those in front of it."""
    x = x.expand_as(grad).contiguous().requires_grad_(True)
    with torch.enable_grad():
        (found,) = torch.autograd.grad(norm(x), x, grad)
    return found


def _by_heads(grad: torch.Tensor, weight: torch.Tensor, group: int) -> torch.Tensor:
    """``[HQ, n, C]`` from gradients ``[HQ, n, D]`` and weights ``[HK, D, C]``, each of which serves ``group`` heads."""
    heads, tokens, size = grad.shape
    if group > 1:
        grad = grad.reshape(heads // group, group * tokens, size)
    return torch.bmm(grad, weight).view(heads, tokens, -1)


class Tiles:
    """Writers as wide as the stream, a tile of tokens at a time.

    Args:
        wiring: of the model.
        graph: with k and v for each query head.
        parts: what each part wrote, ``[N, C]`` or ``[N, HQ * D]``, as far as it is known.
    """

    def __init__(self, wiring: Wiring, graph: Graph, parts: Sequence[torch.Tensor], tokens: int) -> None:
        self.parts = parts
        self._wiring = wiring
        self._graph = graph
        first = parts[0]
        self.dtype = torch.promote_types(first.dtype, torch.float32)
        each = graph.writers * wiring.width * self.dtype.itemsize
        self.size = min(tokens, max(1, TILE_BYTES // each))
        self.slices = [slice(start, min(start + self.size, tokens)) for start in range(0, tokens, self.size)]
        self._buffer = first.new_empty(graph.writers, self.size, wiring.width, dtype=self.dtype)
        self._done = 0
        self._tokens: slice | None = None

    def writers(self, tokens: slice, count: int) -> torch.Tensor:
        """The first ``count`` writers ``[count, n, C]`` of a tile; those that a tile was asked for last are kept."""
        if tokens != self._tokens:
            self._tokens, self._done = tokens, 0
        buffer = self._buffer[:, : tokens.stop - tokens.start]
        while self._done < count:
            layer, place = divmod(self._done - 1, self._graph.heads + 1)
            if self._done == 0:
                buffer[0] = self.parts[0][tokens]
                self._done = 1
            elif place == 0:
                self._heads(layer, tokens, buffer[self._done : self._done + self._graph.heads])
                self._done += self._graph.heads
            else:
                buffer[self._done] = self.parts[mlp_part(layer)][tokens]
                self._done += 1
        return buffer[:count]

    def _heads(self, index: int, tokens: slice, out: torch.Tensor) -> None:
        layer = self._wiring.layers[index]
        heads = self.parts[heads_part(index)][tokens].unflatten(-1, (self._graph.heads, -1)).transpose(0, 1)
        weight = layer.out.weight.T.unflatten(0, (self._graph.heads, -1))
        torch.bmm(heads.to(self.dtype), weight.to(self.dtype), out=out)  # [HQ, n, C]
        if layer.scale is not None:
            out *= layer.scale


def products(tiles: Tiles, heard: Heard, graph: Graph, layers: range, found: torch.Tensor) -> None:
    """The sums over tokens and channels of writer times reader, for the readers of some layers.

    Args:
        tiles: the writers.
        heard: what the readers were told; the end's are made where it was told anything.
        graph: of both.
        layers: of the readers.
        found: ``[writers, readers]``, float64, where they are added.
    """
    end = heard.end
    told = heard.gradients[layers[-1], "mlp"]
    together = [layers[start : start + TOGETHER] for start in range(0, len(layers), TOGETHER)]
    buffer = told.new_empty(len(together[0]) * graph.of_layer, tiles.size, graph.width, dtype=tiles.dtype)
    for tokens in tiles.slices:

        def add(count: int, columns: slice, gradients: torch.Tensor, tokens: slice = tokens) -> None:
            found[:count, columns] += (tiles.writers(tokens, count).flatten(1) @ gradients.flatten(1).T).double().cpu()

        for some in together:
            readers = buffer[: len(some) * graph.of_layer, : tokens.stop - tokens.start]
            for layer, out in zip(some, readers.split(graph.of_layer), strict=True):
                heard.readers(layer, tokens, out)
            add(graph.mlp(some[-1]), slice(some[0] * graph.of_layer, (some[-1] + 1) * graph.of_layer), readers)
        if end is not None and bool(end[tokens].any()):
            add(graph.writers, slice(graph.readers - 1, graph.readers), end[tokens][None].to(tiles.dtype))

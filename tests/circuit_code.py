"""Circuits of a model's own code: scores and patching that are independent of the package, for named families.

Weights are found by their names, key heads are repeated in a copy, every reader's input is a tensor of its own, and
every writer is as wide as the stream: [nodes, tokens, width] in plain sight. The rules are those of
:mod:`tests.model_code`. Meant for float64 and a few tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests import model_code
from tests.eager import EagerRules
from tests.families import FAMILIES

#: From logits ``[B, V]`` to one number.
Loss = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Names:
    """How a family calls its parts, inside a layer.

    Args:
        projections: of q, k and v, or the one of all three.
        out: from the heads to the stream.
        after: the norms behind attention and MLP; empty for none.
        interleaved: whether the one projection has q, k and v head by head.
    """

    before_attention: str = "input_layernorm"
    before_mlp: str = "post_attention_layernorm"
    projections: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    mlp: str = "mlp"
    after: tuple[str, ...] = ()
    parallel: bool = False
    interleaved: bool = False


_POST: dict[str, Any] = {
    "before_mlp": "pre_feedforward_layernorm",
    "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
NAMES: dict[str, Names] = {
    **{family: Names() for family in ("llama", "qwen2", "qwen3", "mistral")},
    "gemma2": Names(**_POST),
    "gemma3": Names(**_POST),
    "gpt2": Names("ln_1", "ln_2", ("attn.c_attn",), "attn.c_proj"),
    "gpt-neox": Names(
        projections=("attention.query_key_value",), out="attention.dense", parallel=True, interleaved=True
    ),
}


def ungrouped(model: Any, names: Names) -> Any:
    """A copy with a key and a value head for each query head."""
    copied = copy.deepcopy(model)
    heads, groups = model.config.num_attention_heads, getattr(model.config, "num_key_value_heads", None)
    if groups in (None, heads):
        return copied
    for layer in layers_of(copied, names):
        for name in names.projections[1:]:
            old = layer.get_submodule(name)
            new = nn.Linear(old.in_features, old.out_features * heads // groups, old.bias is not None)
            with torch.no_grad():
                for mine, theirs in ((new.weight, old.weight), (new.bias, old.bias)):
                    if theirs is not None:
                        by_head = theirs.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, 0)
                        mine.data = by_head.flatten(0, 1).clone()
            parent, _, own = name.rpartition(".")
            setattr(layer.get_submodule(parent), own, new)
    return copied.requires_grad_(False)


def layers_of(model: Any, names: Names) -> Sequence[Any]:
    family = next(one for one, known in NAMES.items() if known is names)
    return model.get_submodule(FAMILIES[family].layers)


@dataclass
class Run:
    """One forward pass in which readers see what ``mix`` adds for them.

    Args:
        mix: from the number of writers so far, a slice of readers and the stream ``[B, T, C]`` to ``[R, B, T, C]``.
    """

    model: Any
    names: Names
    mix: Callable[[int, slice, torch.Tensor], torch.Tensor]
    writers: list[torch.Tensor] = field(default_factory=list)

    def logits(self, ids: torch.Tensor, begin: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[B, V]`` at the last position; ``begin`` stands for what the first layer reads."""
        layers = layers_of(self.model, self.names)
        heads = self.model.config.num_attention_heads
        with ExitStack() as stack:

            def on(handle: Any) -> None:
                stack.callback(handle.remove)

            def first(_: Any, inputs: Any) -> Any:
                x = inputs[0] if begin is None else begin
                self.writers.append(x[None])
                return (x, *inputs[1:])

            on(layers[0].register_forward_pre_hook(first))
            for index, layer in enumerate(layers):
                self._layer(on, layer, index * (3 * heads + 1), heads)

            def last(_: Any, __: Any, out: Any) -> Any:
                x = out[0] if isinstance(out, tuple) else out
                end = len(layers) * (3 * heads + 1)
                mixed = x + self.mix(len(self.written()), slice(end, end + 1), x)[0]
                return (mixed, *out[1:]) if isinstance(out, tuple) else mixed

            on(layers[-1].register_forward_hook(last))
            return self.model(ids, use_cache=False).logits[:, -1]

    def written(self) -> torch.Tensor:
        """``[writers, B, T, C]`` so far."""
        return torch.cat(self.writers)

    def _layer(self, on: Callable[[Any], None], layer: Any, start: int, heads: int) -> None:
        names = self.names
        norm = layer.get_submodule(names.before_attention)
        seen: dict[str, Any] = {}

        def read(_: Any, inputs: Any) -> None:
            if "stream" in seen:
                return  # called from below
            x = seen["stream"] = inputs[0]
            count = seen["count"] = len(self.written())
            wide = x + self.mix(count, slice(start, start + 3 * heads), x)  # [3 H, B, T, C]
            seen["read"] = norm(wide).unflatten(0, (3, heads))

        def project(place: int) -> Any:
            def hook(module: Any, _: Any, out: Any) -> Any:
                weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
                if len(names.projections) == 3:
                    weights, places = weight.unflatten(0, (1, heads, -1)), [place]
                elif names.interleaved:
                    weights, places = weight.unflatten(0, (heads, 3, -1)).transpose(0, 1), [0, 1, 2]
                else:
                    weights, places = weight.unflatten(0, (3, heads, -1)), [0, 1, 2]
                made = torch.einsum("phbtc,phdc->btphd", seen["read"][places], weights)
                if names.interleaved:
                    made = made.transpose(2, 3)
                made = made.flatten(2)
                return made if module.bias is None else made + module.bias

            return hook

        def out(module: Any, inputs: Any) -> None:
            weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
            wide = torch.einsum(
                "bthd,chd->hbtc", inputs[0].unflatten(-1, (heads, -1)), weight.unflatten(1, (heads, -1))
            )
            if names.after:
                after = layer.get_submodule(names.after[0])
                size = (inputs[0] @ weight.T).pow(2).mean(-1, keepdim=True) + after.eps
                wide = wide * (1 + after.weight) / size.sqrt()
            self.writers.append(wide)

        def mlp_read(_: Any, inputs: Any) -> Any:
            x = inputs[0]
            count = seen["count"] if names.parallel else len(self.written())
            return (x + self.mix(count, slice(start + 3 * heads, start + 3 * heads + 1), x)[0],)

        on(norm.register_forward_pre_hook(read))
        for place, name in enumerate(names.projections):
            on(layer.get_submodule(name).register_forward_hook(project(place)))
        on(layer.get_submodule(names.out).register_forward_pre_hook(out))
        on(layer.get_submodule(names.before_mlp).register_forward_pre_hook(mlp_read))
        writes = layer.get_submodule(names.after[1] if names.after else names.mlp)
        on(writes.register_forward_hook(lambda _, __, x: self.writers.append(x[None])))


class Reference:
    """Scores and patched runs of one model on pairs, float64.

    Args:
        family: a row of :data:`NAMES`.
        model: of that family.
        rules: of the backward.
        clean, corrupted: ids ``[B, T]``.
        loss: of logits ``[B, V]``, a sum over rows.
    """

    def __init__(
        self, family: str, model: Any, rules: EagerRules, clean: torch.Tensor, corrupted: torch.Tensor, loss: Loss
    ) -> None:
        self.names = NAMES[family]
        self.model = ungrouped(model, self.names)
        self.clean, self.loss = clean, loss
        self._applied = lambda: model_code.applied(self.model, rules, FAMILIES[family].products)
        self.corrupted_logits, self.corrupted = self._plain(corrupted)
        self.clean_logits, self.before = self._plain(clean)

    def _plain(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        run = Run(self.model, self.names, lambda count, columns, x: x.new_zeros(()).expand(_rows(columns), *x.shape))
        with torch.no_grad(), self._applied():
            logits = run.logits(ids)
        return logits, run.written()

    def scores(self, steps: int | None = None) -> torch.Tensor:
        """``[writers, readers]``: the change of every writer times minus the gradient of the loss at every reader."""
        found = []
        for step in range(steps or 1):
            leaves: list[torch.Tensor] = []
            begin = None
            if steps is not None:
                begin = self.corrupted[0] + step / steps * (self.before[0] - self.corrupted[0])

            def mix(_: int, columns: slice, x: torch.Tensor, leaves: list[torch.Tensor] = leaves) -> torch.Tensor:
                leaves.append(torch.zeros(_rows(columns), *x.shape, dtype=x.dtype, requires_grad=True))
                return leaves[-1]

            with torch.enable_grad(), self._applied():
                loss = -self.loss(Run(self.model, self.names, mix).logits(self.clean, begin))
                grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            whole = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
            found.append(torch.einsum("wbtc,rbtc->wr", self.corrupted - self.before, torch.cat(whole)))
        return torch.stack(found).mean(0)

    def patched(self, cut: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, V]`` where the edges of ``cut`` ``[writers, readers]`` carry what was written when corrupted."""
        run: Run

        def mix(count: int, columns: slice, _: torch.Tensor) -> torch.Tensor:
            changes = self.corrupted[:count] - run.written()[:count]
            return torch.einsum("wr,wbtc->rbtc", cut[:count, columns], changes)

        run = Run(self.model, self.names, mix)
        with torch.no_grad(), self._applied():
            return run.logits(self.clean)


def _rows(columns: slice) -> int:
    return int(columns.stop - columns.start)

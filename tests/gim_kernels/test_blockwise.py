"""What is the blockwise engine's own: its blocks, what it keeps, and what it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gim_kernels
from gim_kernels import blockwise, reference
from gim_kernels.blockwise import tiles
from gim_kernels.budget import relative_error
from gim_kernels.types import Options
from tests.gim_kernels.test_attention import RULE_IDS, RULES, differentiate, make
from tests.oracle import assert_within_budget


def test_a_gradient_of_the_gradient_is_refused() -> None:
    query, key, value, _ = make(1, 1, 1, 4, 4, 4)
    query.requires_grad_(True)
    out = gim_kernels.attention(query, key, value, softmax_backward="temperature")
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.sum(), query)


def test_only_the_gradients_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, ...]] = []
    original = blockwise.attention_backward

    def spy(*args: Any, needs: tuple[bool, ...], **named: Any) -> Any:
        asked.append(needs)
        grads = original(*args, needs=needs, **named)
        assert [grad is not None for grad in grads] == list(needs)
        return grads

    monkeypatch.setattr(blockwise, "attention_backward", spy)
    query, key, value, grad_out = make(1, 2, 1, 5, 5, 4)
    value.requires_grad_(True)
    gim_kernels.attention(query, key, value).backward(grad_out)
    assert asked == [(False, False, True, False)]


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the largest tensor that any operation makes, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize(("rule", "temperature"), RULES, ids=RULE_IDS)
@pytest.mark.parametrize("options", [{}, {"window": 100}, {"softcap": 5.0}], ids=["plain", "window", "softcap"])
def test_live_and_saved_bytes_are_linear_in_length(rule: str, temperature: float, options: dict[str, Any]) -> None:
    largest, saved = {}, {}
    for length in (1024, 2048):
        tensors = make(1, 2, 1, length, length, 16, dtype=torch.float32)
        leaves = [x.requires_grad_(True) for x in tensors[:3]]
        kept = 0

        def pack(x: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += x.untyped_storage().nbytes()
            return x

        with Largest() as mode:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                out = gim_kernels.attention(
                    *leaves, causal=True, softmax_backward=rule, temperature=temperature, **options
                )
            torch.autograd.grad(out, leaves, tensors[3])
        largest[length], saved[length] = mode.elements, kept
    assert largest[2048] <= 2 * largest[1024]
    assert saved[2048] <= 2 * saved[1024] + 64
    assert largest[2048] < 2048 * 2048 / 4


@pytest.mark.parametrize(("rule", "temperature"), RULES, ids=RULE_IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["fp64", "fp16"])
def test_key_heads_in_one_block_or_several(
    dtype: torch.dtype, rule: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = make(2, 6, 3, 70, 90, 8, dtype=dtype)
    options: dict[str, Any] = {"causal": True, "window": 40, "softcap": 3.0, "sinks": torch.linspace(-1, 1, 6)}
    options |= {"key_range": torch.tensor([[0, 90], [7, 80]], dtype=torch.int32)}
    options |= {"softmax_backward": rule, "temperature": temperature, "grad_scale": (0.5, 0.25, 2.0)}

    def run(function: Any, convert: Any) -> dict[str, torch.Tensor]:
        given = {**options, "sinks": convert(options["sinks"].to(dtype))}
        return differentiate(function, *(convert(x) for x in tensors), **given)

    truth, yardstick = (run(reference.attention, convert) for convert in (torch.Tensor.double, lambda x: x))
    for scores, heads in ((1 << 21, 3), (1, 2)):  # two of three heads, and then the third
        monkeypatch.setattr(tiles, "SCORES", scores)
        assert tiles.tile_of(70, 90, 3, 2, Options(1.0, True, 40)).heads == heads
        for name, got in run(gim_kernels.attention, lambda x: x).items():
            assert_within_budget(got, truth[name], yardstick[name], f"{name}, {heads} heads")
    assert tiles.tile_of(1 << 17, 1 << 17, 8, 1, Options(1.0, True)).heads == 1


def test_empty_tiles_are_not_visited() -> None:
    options = Options(scale=1.0, causal=True, window=64)
    blocks = list(tiles.blocks(1024, 1024, options, 0, 1024, 32))
    assert max(block.keys for block in blocks) <= 32 + 64
    assert sum(block.keys for block in blocks) < 1024 * 3.1
    padded = list(tiles.blocks(64, 64, Options(1.0, causal=True), 48, 64, 16))
    assert [block.keys for block in padded] == [0, 0, 0, 16]


def test_the_operator_passes_torch_checks() -> None:
    query, key, value, _ = make(1, 2, 1, 5, 5, 8)
    for x in (query, key, value):
        x.requires_grad_(True)
    arguments = (
        query,
        key,
        value,
        None,
        None,
        0.3,
        True,
        None,
        None,
        "temperature",
        2.0,
        [0.25, 0.25, 0.5],
        "blockwise",
    )
    torch.library.opcheck(torch.ops.gim_kernels.attention.default, arguments)


def test_a_checkpoint_gives_the_same_gradient() -> None:
    query, key, value, grad_out = make(1, 2, 2, 40, 40, 8)
    grads = []
    for wrap in (lambda f, *x: f(*x), torch.utils.checkpoint.checkpoint):
        leaves = [x.detach().requires_grad_(True) for x in (query, key, value)]

        def attend(*x: torch.Tensor) -> torch.Tensor:
            return gim_kernels.attention(*x, causal=True, softmax_backward="temperature")

        named = {} if wrap is not torch.utils.checkpoint.checkpoint else {"use_reentrant": False}
        grads.append(torch.autograd.grad(wrap(attend, *leaves, **named), leaves, grad_out))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_extreme_scores_stay_finite() -> None:
    query, key, value, grad_out = make(1, 2, 2, 33, 33, 8, dtype=torch.float32)
    tensors = (query * 300, key * 300, value, grad_out)
    for rule, temperature in RULES:
        options: dict[str, Any] = {"causal": True, "softmax_backward": rule, "temperature": temperature}
        got = differentiate(gim_kernels.attention, *tensors, **options)
        truth = differentiate(reference.attention, *(x.double() for x in tensors), **options)
        for name, x in got.items():
            assert bool(torch.isfinite(x).all()), f"{rule} {name}"
        # Scores of 1e5 carry an absolute rounding error near 1e-2: only the order of magnitude can agree.
        assert relative_error(got["out"], truth["out"]) < 0.1

"""The norms and the gated product as Triton kernels: in triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gim_kernels import pointwise, reference
from tests.first import first
from tests.gim_kernels.test_attention import LATER
from tests.oracle import assert_within_budget

pytest.importorskip("triton")

from gim_kernels import triton as kernels
from gim_kernels.triton import device, norm_weight, pointwise_tiles, rows, tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: What is drawn at random has every dtype at once.
by_dtype = pytest.mark.parametrize("dtype", [*DTYPES[:2], pytest.param(torch.bfloat16, id="bf16", marks=LATER)])
EPS = 1e-5

pytestmark = [
    pytest.mark.usefixtures("fresh_memory_is_nan"),
    # The interpreter is NumPy: where sigmoid's exponential overflows, as it may, NumPy says so.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]
#: Widths of several rows in a tile, of one, of tiles cut short; 4 and not 1, for a live norm of one number has no
#: gradient to speak of.
WIDTHS = [4, 63, 64, 111, 128, 1000, 2560]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype).to(DEVICE)


def same(first: Any, second: Any) -> bool:
    """Equal bit for bit, None included."""
    return all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(first, second, strict=True)
    )


def reference_norm(
    kind: str, x: torch.Tensor, weight: Any, bias: Any, grad_y: torch.Tensor, frozen: bool, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Output and gradients of the specification in ``dtype``."""
    inputs = [None if t is None else t.to(dtype).detach().requires_grad_() for t in (x, weight, bias)]
    if kind == "layer":
        y = reference.layer_norm(inputs[0], inputs[1], inputs[2], EPS, frozen=frozen)
    else:
        offset = 1.0 if kind == "rms1" else 0.0
        y = reference.rms_norm(inputs[0], inputs[1], EPS, weight_offset=offset, frozen=frozen)
    grads = torch.autograd.grad(y, [t for t in inputs if t is not None], grad_y.to(dtype))
    return [y.detach(), *grads]


def kernel_norm(
    kind: str, x: torch.Tensor, weight: Any, bias: Any, grad_y: torch.Tensor, frozen: bool
) -> list[torch.Tensor]:
    """The same from the kernels; the weight's gradient rounded as the operator does."""
    offset, mean = (1.0 if kind == "rms1" else 0.0), None
    if kind == "layer":
        y, mean, inverse = kernels.layer_norm_forward(x, weight, bias, EPS)
    else:
        y, inverse = kernels.rms_norm_forward(x, weight, EPS, offset)
    assert inverse.dtype == torch.float32 and inverse.shape == (*x.shape[:-1], 1)
    needs = (True, weight is not None, bias is not None)
    grads = kernels.norm_backward(grad_y, x, weight, mean, inverse, offset, frozen=frozen, needs=needs)
    inputs = (x, weight, bias)
    return [y] + [g.to(t.dtype) for g, t in zip(grads, inputs, strict=True) if g is not None and t is not None]


def check_norm(kind: str, shape: tuple[int, ...], dtype: torch.dtype, frozen: bool, affine: bool = True) -> None:
    x = normal(*shape, seed=0, mean=0.5).to(dtype)
    weight = normal(shape[-1], seed=1).to(dtype) if affine else None
    bias = normal(shape[-1], seed=2).to(dtype) if affine and kind == "layer" else None
    grad_y = normal(*shape, seed=3).to(dtype)
    actual = kernel_norm(kind, x, weight, bias, grad_y, frozen)
    truth = reference_norm(kind, x, weight, bias, grad_y, frozen, torch.float64)
    yardstick = reference_norm(kind, x, weight, bias, grad_y, frozen, dtype)
    names = ("y", "grad_x", "grad_weight", "grad_bias")[: len(truth)]
    for name, *results in zip(names, actual, truth, yardstick, strict=True):
        assert_within_budget(*results, what=name)


def norms(widths: Iterable[int], every: int) -> pytest.MarkDecorator:
    """Every norm at every width; the fast suite has them at one width alone, and the one with most gradients at all."""
    values = itertools.product(widths, ("rms", "rms1", "layer"), (False, True))
    now = lambda width, kind, frozen: width == every or (kind == "layer" and not frozen)  # noqa: E731
    return pytest.mark.parametrize(("width", "kind", "frozen"), first(values, now))


@by_dtype
@norms(WIDTHS, 111)
def test_norm_is_the_reference(kind: str, width: int, frozen: bool, dtype: torch.dtype) -> None:
    check_norm(kind, (3, width), dtype, frozen)


@norms((257, 512, 1000), 257)
def test_norm_in_blocks_of_columns(kind: str, width: int, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise_tiles, "WIDEST", 256)
    monkeypatch.setattr(pointwise_tiles, "LOOP", 256)
    assert not pointwise_tiles.norm_tile(width).one_pass
    check_norm(kind, (3, width), torch.float32, frozen)


@given(
    kind=st.sampled_from(["rms", "rms1", "layer"]),
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    width=st.integers(4, 300),
    frozen=st.booleans(),
    affine=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=25, deadline=None)
def test_norm_of_any_shape(
    kind: str, shape: list[int], width: int, frozen: bool, affine: bool, dtype: torch.dtype
) -> None:
    check_norm(kind, (*shape, width), dtype, frozen, affine)


#: The widest row in one block, and the narrowest in several.
WIDE_ROWS = [("rms", 16384), ("layer", 16385), ("rms", 32768)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "width"), WIDE_ROWS)
def test_norm_over_wide_rows(kind: str, width: int) -> None:
    check_norm(kind, (2, width), torch.float16, frozen=False)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_live_norm_is_torchs_own(kind: str) -> None:
    x, weight, bias = (normal(*shape, seed=4, dtype=torch.float32) for shape in ((7, 96), (96,), (96,)))
    grad_y = normal(7, 96, seed=5, dtype=torch.float32)

    def torchs(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [t.to(dtype).detach().requires_grad_() for t in (x, weight, bias)[: 3 if bias is not None else 2]]
        if kind == "rms":
            y = F.rms_norm(inputs[0], (96,), inputs[1], EPS)
            inputs = inputs[:2]
        else:
            y = F.layer_norm(inputs[0], (96,), inputs[1], inputs[2], EPS)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad_y.to(dtype))]

    actual = kernel_norm(kind, x, weight, None if kind == "rms" else bias, grad_y, frozen=False)
    names = ("y", "x", "weight", "bias")[: len(actual)]
    for name, *results in zip(names, actual, torchs(torch.float64), torchs(x.dtype), strict=True):
        assert_within_budget(*results, what=name)


def test_frozen_norm_is_a_matrix_written_out() -> None:
    """The frozen backward as one matrix per row: a diagonal for rms, the same times the centring matrix for layer."""
    width = 10
    x, weight = normal(4, width, seed=6, mean=2.0), normal(width, seed=7)
    grad_y = normal(4, width, seed=8)
    centring = torch.eye(width, dtype=torch.float64, device=DEVICE) - 1.0 / width
    for kind in ("rms", "layer"):
        values = x if kind == "rms" else x @ centring
        inverse = (values.square().mean(-1, keepdim=True) + EPS).rsqrt()
        want = (grad_y * weight) * inverse if kind == "rms" else ((grad_y * weight) @ centring.T) * inverse
        got = kernel_norm(kind, x.float(), weight.float(), None, grad_y.float(), frozen=True)
        assert_within_budget(got[1], want, want.float(), kind)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_rows_far_from_zero_do_not_cancel(kind: str) -> None:
    """A mean of 1000 standard deviations, over blocks of columns that are merged."""
    x = normal(2, 20000, seed=9, mean=1000.0).float()
    actual = kernel_norm(kind, x, None, None, torch.ones_like(x), frozen=True)[0]
    truth = reference_norm(kind, x, None, None, torch.ones_like(x), True, torch.float64)[0]
    yardstick = reference_norm(kind, x, None, None, torch.ones_like(x), True, torch.float32)[0]
    assert_within_budget(actual, truth, yardstick, kind)


@pytest.mark.parametrize(
    ("kind", "count", "at_once"),
    first(
        [("rms", 1050, pointwise_tiles.FOLD.rows), ("layer", 1050, pointwise_tiles.FOLD.rows), ("layer", 150, 4)],
        {("layer", 150, 4)},
    ),
)
def test_weight_gradient_folds_many_chunks(
    kind: str, count: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More chunks of rows than the fold reads at once, a last chunk cut short, and columns in two blocks."""
    width = 130
    chunk = pointwise_tiles.rows_per_chunk(count, width)
    assert -(-count // chunk) > at_once and count % chunk
    monkeypatch.setattr(norm_weight, "FOLD", dataclasses.replace(pointwise_tiles.FOLD, rows=at_once))
    norm_weight.fold_variant.cache_clear()
    try:
        check_norm(kind, (count, width), torch.float32, frozen=False)
    finally:
        norm_weight.fold_variant.cache_clear()


def views(dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Views of the shape [2, 3, 4, 24] as models make them; the last two need a copy."""
    return {
        "contiguous": normal(2, 3, 4, 24, seed=seed, dtype=dtype),
        "heads first": normal(2, 4, 3, 24, seed=seed, dtype=dtype).transpose(1, 2),
        "columns of a fused projection": normal(2, 3, 4, 72, seed=seed, dtype=dtype)[..., 24:48],
        "some of the tokens": normal(2, 6, 8, 24, seed=seed, dtype=dtype)[:, ::2, 1::2],
        "one row for all": normal(24, seed=seed, dtype=dtype).expand(2, 3, 4, 24),
        "last dimension apart": normal(2, 3, 24, 4, seed=seed, dtype=dtype).transpose(2, 3),
        "one number for all": normal(1, seed=seed, dtype=dtype).expand(2, 3, 4, 24),
    }


@pytest.mark.parametrize(
    ("kind", "frozen"), first(itertools.product(("rms", "layer"), (False, True)), {("layer", False)})
)
@pytest.mark.parametrize("name", views(torch.float32, 0))
def test_views_equal_their_copies_in_norms(name: str, kind: str, frozen: bool) -> None:
    x, grad_y = views(torch.float16, 10)[name], views(torch.float16, 11)[name]
    weight = normal(24, seed=12, dtype=torch.float16)
    before = x.clone()
    for mixed in (grad_y, normal(2, 3, 4, 24, seed=13, dtype=torch.float16)):
        viewed = kernel_norm(kind, x, weight, None, mixed, frozen)
        copied = kernel_norm(kind, x.contiguous(), weight, None, mixed.contiguous(), frozen)
        assert same(viewed, copied)
        assert viewed[0].is_contiguous()
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", views(torch.float32, 0))
def test_views_equal_their_copies_in_gated_products(name: str) -> None:
    x, grad_y = views(torch.float16, 10)[name], views(torch.float16, 11)[name]
    before = x.clone()
    for up in (grad_y, normal(2, 3, 4, 24, seed=14, dtype=torch.float16)):
        settings_ = {"grad_scale": (0.5, 0.5), "activation_backward": "exact", "needs": (True, True)}
        y = kernels.gated_forward(x, up, "silu")
        grads = kernels.gated_backward(grad_y, x, up, "silu", **settings_)
        plain = [t.contiguous() for t in (grad_y, x, up)]
        assert torch.equal(y, kernels.gated_forward(plain[1], plain[2], "silu"))
        assert same(grads, kernels.gated_backward(*plain, "silu", **settings_))
        # What the operator's fake implementation promises.
        assert y.stride() == torch.empty_like(x).stride()
        assert [g.stride() for g in grads if g is not None] == [torch.empty_like(t).stride() for t in (x, up)]
    assert torch.equal(x, before)


def test_views_of_models_are_not_copied() -> None:
    copied = {"last dimension apart", "one number for all"}
    for name, x in views(torch.float32, 15).items():
        found, (walked,) = rows.as_rows(x)
        assert walked is not None and (walked.data_ptr() != x.data_ptr()) == (name in copied), name
        assert found.count == 24 and found.columns == 24
    several = rows.rows_of(views(torch.float32, 0)["heads first"])
    assert several is not None and not several.merged
    fused = rows.rows_of(views(torch.float32, 0)["columns of a fused projection"])
    assert fused is not None and fused.merged  # one stride of 72 elements


def test_five_dimensions_that_do_not_merge() -> None:
    x = normal(2, 3, 2, 3, 8, seed=16, dtype=torch.float32).permute(3, 0, 2, 1, 4)[::2]
    grad_y = normal(2, 2, 2, 3, 8, seed=17, dtype=torch.float32)
    assert rows.rows_of(x) is None
    assert same(
        kernel_norm("rms", x, None, None, grad_y, False),
        kernel_norm("rms", x.contiguous(), None, None, grad_y, False),
    )
    up = normal(2, 2, 2, 3, 8, seed=18, dtype=torch.float32)
    assert torch.equal(kernels.gated_forward(x, up, "gelu"), kernels.gated_forward(x.contiguous(), up, "gelu"))


def test_offsets_past_two_to_the_31() -> None:
    torch.use_deterministic_algorithms(False)  # 4 GiB that must stay untouched but for three rows
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    x = memory.as_strided((3, 64), (2**30, 1))
    x.copy_(normal(3, 64, seed=19, dtype=torch.float16))
    near = x.clone()
    assert same(kernels.rms_norm_forward(x, None, EPS, 0.0), kernels.rms_norm_forward(near, None, EPS, 0.0))
    assert torch.equal(kernels.gated_forward(x, near, "silu"), kernels.gated_forward(near, near, "silu"))


def test_mixed_precision_weight() -> None:
    x, weight = normal(5, 40, seed=20, dtype=torch.float16), normal(40, seed=21, dtype=torch.float32)
    y, _ = kernels.rms_norm_forward(x, weight, EPS, 0.0)
    truth = reference.rms_norm(x.double(), weight.double(), EPS)
    assert_within_budget(y, truth, reference.rms_norm(x, weight, EPS), "y")


@pytest.mark.parametrize("frozen", first((False, True), (False,)))
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_only_the_norm_gradients_asked_for(needs: tuple[bool, bool, bool], frozen: bool) -> None:
    x, weight, grad_y = (normal(*shape, seed=22, dtype=torch.float32) for shape in ((4, 33), (33,), (4, 33)))
    _, mean, inverse = kernels.layer_norm_forward(x, weight, None, EPS)
    kept = x if needs[1] or not frozen else None
    grads = kernels.norm_backward(
        grad_y, kept, weight, mean if kept is not None else mean.new_empty(0), inverse, 0.0,
        frozen=frozen, needs=needs,
    )  # fmt: skip
    everything = kernels.norm_backward(grad_y, x, weight, mean, inverse, 0.0, frozen=frozen, needs=(True, True, True))
    assert tuple(g is not None for g in grads) == needs
    assert same(grads, [g if need else None for g, need in zip(everything, needs, strict=True)])


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_gradients_nobody_asked_for_are_not_launched(
    needs: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuple[str, set[str]]] = []
    original = tiles.Variant.launch

    def spy(self: tiles.Variant, programs: int, **arguments: Any) -> None:
        launched.append((self.kernel.__name__, {name for name, value in arguments.items() if value is not None}))
        original(self, programs, **arguments)

    x, weight, grad_y = (normal(*shape, seed=22, dtype=torch.float32) for shape in ((4, 33), (33,), (4, 33)))
    _, mean, inverse = kernels.layer_norm_forward(x, weight, None, EPS)
    monkeypatch.setattr(tiles.Variant, "launch", spy)
    kernels.norm_backward(grad_y, x, weight, mean, inverse, 0.0, frozen=False, needs=needs)
    of_x, of_weight, of_bias = needs
    sums = of_weight + of_bias
    names = ["norm_backward_weight_kernel"] * (sums > 0) + ["fold_kernel"] * sums + ["norm_backward_kernel"] * of_x
    assert [name for name, _ in launched] == names
    if sums:
        assert ("partial_weight_ptr" in launched[0][1], "partial_bias_ptr" in launched[0][1]) == needs[1:]

    launched.clear()
    choice: dict[str, Any] = {"grad_scale": (1.0, 1.0), "activation_backward": "exact"}
    kernels.gated_backward(grad_y, x, x, "silu", **choice, needs=needs[:2])
    assert len(launched) == any(needs[:2])
    if launched:
        assert ("grad_gate_ptr" in launched[0][1], "grad_up_ptr" in launched[0][1]) == needs[:2]


def reference_gated(
    gate: torch.Tensor, up: torch.Tensor, grad_y: torch.Tensor, activation: str, backward: str,
    dtype: torch.dtype, factors: tuple[float, float] = (0.5, 0.25),
) -> list[torch.Tensor]:  # fmt: skip
    inputs = [t.to(dtype).detach().requires_grad_() for t in (gate, up)]
    y = reference.gated(*inputs, activation, grad_scale=factors, activation_backward=backward)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad_y.to(dtype))]


def check_gated(shape: tuple[int, ...], dtype: torch.dtype, activation: str, backward: str) -> None:
    gate = (normal(*shape, seed=23) * 4).to(dtype)
    if gate.numel():
        gate.view(-1)[0] = 0.0  # where the ratio has its limit
    up, grad_y = normal(*shape, seed=24, dtype=dtype), normal(*shape, seed=25, dtype=dtype)
    y = kernels.gated_forward(gate, up, activation)
    grads = kernels.gated_backward(
        grad_y, gate, up, activation, grad_scale=(0.5, 0.25), activation_backward=backward, needs=(True, True)
    )
    truth = reference_gated(gate, up, grad_y, activation, backward, torch.float64)
    yardstick = reference_gated(gate, up, grad_y, activation, backward, dtype)
    for name, *results in zip(("y", "grad_gate", "grad_up"), (y, *grads), truth, yardstick, strict=True):
        assert_within_budget(*results, what=name)


@by_dtype
@pytest.mark.parametrize(
    ("shape", "activation", "backward"),
    first(
        itertools.product(((1,), (3, 63), (2, 3, 111), (2, 2500)), ("silu", "gelu", "gelu_tanh"), ("exact", "ratio")),
        lambda shape, activation, backward: shape == (2, 3, 111) or (activation, backward) == ("silu", "ratio"),
    ),
)
def test_gated_is_the_reference(shape: tuple[int, ...], activation: str, backward: str, dtype: torch.dtype) -> None:
    check_gated(shape, dtype, activation, backward)


@given(
    shape=st.lists(st.integers(1, 40), min_size=0, max_size=3),
    activation=st.sampled_from(["silu", "gelu", "gelu_tanh"]),
    backward=st.sampled_from(["exact", "ratio"]),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=25, deadline=None)
def test_gated_of_any_shape(shape: list[int], activation: str, backward: str, dtype: torch.dtype) -> None:
    check_gated(tuple(shape), dtype, activation, backward)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_is_torchs_own_without_factors(activation: str) -> None:
    gate, up, grad_y = (normal(5, 77, seed=seed, dtype=torch.float32) for seed in (26, 27, 28))
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }

    def torchs(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [t.to(dtype).detach().requires_grad_() for t in (gate, up)]
        y = functions[activation](inputs[0]) * inputs[1]
        return [y.detach(), *torch.autograd.grad(y, inputs, grad_y.to(dtype))]

    y = kernels.gated_forward(gate, up, activation)
    grads = kernels.gated_backward(
        grad_y, gate, up, activation, grad_scale=(1.0, 1.0), activation_backward="exact", needs=(True, True)
    )
    for name, *results in zip(
        ("y", "gate", "up"), (y, *grads), torchs(torch.float64), torchs(torch.float32), strict=True
    ):
        assert_within_budget(*results, what=name)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_the_derivative_of_a_large_gate_keeps_its_digits(activation: str) -> None:
    """``1 - act(x) / x`` has few where that is nearly 1, and is multiplied by x there."""
    gate = torch.linspace(0.5, 15.0, 400, device=DEVICE)
    one = torch.ones_like(gate)
    choice = {"grad_scale": (1.0, 1.0), "activation_backward": "exact"}
    grad, _ = kernels.gated_backward(one, gate, one, activation, **choice, needs=(True, False))
    truth = reference_gated(gate, one, one, activation, "exact", torch.float64, (1.0, 1.0))[1]
    assert_within_budget(grad, truth, truth.float(), activation)


def test_activation_is_rounded_before_the_product() -> None:
    """As in a model that computes act(gate) * up in half precision: at least 99.9 % of the bits agree with it."""
    gate, up = normal(64, 64, seed=29, dtype=torch.float16), normal(64, 64, seed=30, dtype=torch.float16)
    for activation in ("silu", "gelu", "gelu_tanh"):
        eager = pointwise.gated_forward(gate, up, activation)
        agree = (kernels.gated_forward(gate, up, activation) == eager).float().mean().item()
        assert agree >= 0.999, activation


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)))
def test_only_the_gated_gradients_asked_for(needs: tuple[bool, bool]) -> None:
    gate, up, grad_y = (normal(3, 50, seed=seed, dtype=torch.float32) for seed in (31, 32, 33))
    choice = {"grad_scale": (0.5, 0.25), "activation_backward": "exact"}
    grads = kernels.gated_backward(grad_y, gate, up, "gelu", **choice, needs=needs)
    both = kernels.gated_backward(grad_y, gate, up, "gelu", **choice, needs=(True, True))
    assert same(grads, [g if need else None for g, need in zip(both, needs, strict=True)])


def operators() -> dict[str, Any]:
    """Each operator on the Triton engine, as a function of its differentiable inputs."""
    wide = {"x": normal(6, 70, seed=34, dtype=torch.float32, mean=0.3)}
    wide |= {name: normal(70, seed=seed, dtype=torch.float32) for name, seed in (("weight", 35), ("bias", 36))}
    pair = [normal(6, 70, seed=seed, dtype=torch.float32) for seed in (37, 38)]
    x, weight, bias = wide.values()
    ops = torch.ops.gim_kernels
    return {
        "rms": (lambda x, w: ops.rms_norm(x, w, EPS, 1.0, False, "triton")[0], [x, weight]),
        "rms frozen": (lambda x, w: ops.rms_norm(x, w, EPS, 0.0, True, "triton")[0], [x, weight]),
        "layer": (lambda x, w, b: ops.layer_norm(x, w, b, EPS, False, "triton")[0], [x, weight, bias]),
        "layer frozen": (lambda x, w, b: ops.layer_norm(x, w, b, EPS, True, "triton")[0], [x, weight, bias]),
        "gated": (lambda g, u: ops.gated(g, u, "silu", [0.5, 0.5], "exact", "triton"), pair),
        "gated ratio": (lambda g, u: ops.gated(g, u, "gelu", [0.5, 0.5], "ratio", "triton"), pair),
    }


@pytest.mark.parametrize("name", first(operators(), ("rms frozen", "layer", "gated ratio")))
def test_backward_twice_and_again_from_the_start_is_the_same(name: str) -> None:
    function, inputs = operators()[name]
    saved = [t.clone() for t in inputs]

    def once() -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        y = function(*leaves)
        seed = normal(*y.shape, seed=39, dtype=y.dtype)
        first = torch.autograd.grad(y, leaves, seed, retain_graph=True)
        return y.detach(), list(first), list(torch.autograd.grad(y, leaves, seed))

    y, first, second = once()
    assert same(first, second)
    for _ in range(1000 if DEVICE == "cuda" else 3):
        again = once()
        assert torch.equal(again[0], y) and same(again[1], first)
    assert same(inputs, saved)


@pytest.mark.parametrize("operator", first(("rms", "layer", "gated"), ("layer", "gated")))
def test_opcheck(operator: str) -> None:
    if operator == "gated":
        gate = normal(2, 3, 40, seed=40, dtype=torch.float32)[..., ::2].requires_grad_()
        up = normal(2, 3, 20, seed=41, dtype=torch.float32).requires_grad_()
        arguments: tuple[Any, ...] = (gate, up, "silu", [0.5, 0.5], "exact", "triton")
        torch.library.opcheck(torch.ops.gim_kernels.gated.default, arguments)
        return
    x = normal(2, 4, 3, 24, seed=42, dtype=torch.float32).transpose(1, 2).requires_grad_()
    weight = normal(24, seed=43, dtype=torch.float32).requires_grad_()
    if operator == "rms":
        torch.library.opcheck(torch.ops.gim_kernels.rms_norm.default, (x, weight, EPS, 0.0, False, "triton"))
    else:
        bias = normal(24, seed=44, dtype=torch.float32).requires_grad_()
        arguments = (x, weight, bias, EPS, True, "triton")
        torch.library.opcheck(torch.ops.gim_kernels.layer_norm.default, arguments)


def test_empty_tensors() -> None:
    x, weight = torch.empty(0, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    y, mean, inverse = kernels.layer_norm_forward(x, weight, weight, EPS)
    assert y.shape == (0, 8) and mean.shape == inverse.shape == (0, 1)
    grads = kernels.norm_backward(x, x, weight, mean, inverse, 0.0, frozen=False, needs=(True, True, True))
    assert same(grads, [x, torch.zeros_like(weight), torch.zeros_like(weight)])
    assert kernels.gated_forward(x, x, "silu").shape == (0, 8)
    choice = {"grad_scale": (1.0, 1.0), "activation_backward": "exact", "needs": (True, True)}
    assert same(kernels.gated_backward(x, x, x, "silu", **choice), [x, x])


def launches(x: torch.Tensor) -> dict[str, Any]:
    """Every function, called with ``x`` for every tensor."""
    choice = {"grad_scale": (1.0, 1.0), "activation_backward": "exact", "needs": (True, True)}
    needs = (True, True, True)
    return {
        "rms_norm_forward": lambda: kernels.rms_norm_forward(x, None, EPS, 0.0),
        "layer_norm_forward": lambda: kernels.layer_norm_forward(x, None, None, EPS),
        "norm_backward": lambda: kernels.norm_backward(x, x, None, None, x, 0.0, frozen=False, needs=needs),
        "gated_forward": lambda: kernels.gated_forward(x, x, "silu"),
        "gated_backward": lambda: kernels.gated_backward(x, x, x, "silu", **choice),
    }


@pytest.mark.parametrize("name", launches(torch.empty(0)))
def test_float64_is_refused_by_name(name: str) -> None:
    with pytest.raises(TypeError, match=r"must be float32, float16 or bfloat16 for the triton engine, got .*64"):
        launches(torch.ones(2, 4, dtype=torch.float64, device=DEVICE))[name]()


@pytest.mark.parametrize("name", launches(torch.empty(0)))
def test_cpu_tensors_outside_the_interpreter_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match='engine="triton" needs tensors on a GPU'):
        launches(torch.ones(2, 4))[name]()


def test_an_old_gpu_is_refused_with_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        major, minor, name = 7, 5, "an old card"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Old)
    with pytest.raises(RuntimeError, match=r"supports CUDA GPUs from sm_80 on and .* an old card is sm_75"):
        device._check_architecture.__wrapped__(0)


def test_more_rows_than_int32_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 2147483647 rows"):
        rows.rows_of(torch.empty(2**31, 64, device="meta"))


@pytest.mark.parametrize("width", [1, 64, 65, 2048, 4097, 16384, 16385, 32768])
def test_tiles_cover_a_row(width: int) -> None:
    tile = pointwise_tiles.norm_tile(width)
    assert tile.one_pass == (width <= pointwise_tiles.WIDEST)
    assert not tile.one_pass or tile.columns >= width
    assert tile.rows * tile.columns >= pointwise_tiles.ELEMENTS_PER_PROGRAM
    for count in (1, 31, 33, 100_000):
        chunk = pointwise_tiles.rows_per_chunk(count, width)
        assert chunk % pointwise_tiles.WEIGHT_GRADIENT.rows == 0
        blocks = -(-width // pointwise_tiles.WEIGHT_GRADIENT.columns)
        assert -(-count // chunk) * blocks <= max(pointwise_tiles.WEIGHT_GRADIENT_PROGRAMS, blocks)

"""Norms and the gated product against formulas written here, and against torch."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import gim_kernels
from gim_kernels import pointwise, reference
from tests.first import first
from tests.gim_kernels.attention_draws import draw_strides, laid_out
from tests.oracle import assert_close64, assert_within_budget, assert_within_terms

#: Floating-point types of every operator.
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def differentiate(function: Any, tensors: list[torch.Tensor | None], grad: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradient of every tensor."""
    leaves = [None if x is None else x.detach().requires_grad_(True) for x in tensors]
    out = function(*leaves)
    asked = [x for x in leaves if x is not None]
    return [out.detach(), *torch.autograd.grad(out, asked, grad)]


@pytest.fixture(params=[None, 1], ids=["one-block", "row-by-row"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of a test at once, as their number has it, and one row at a time, as long tensors are cut."""
    if request.param is not None:
        monkeypatch.setattr(pointwise, "NUMBERS_PER_THREAD", request.param)


in_blocks = pytest.mark.usefixtures("blocks")


def rms_by_hand(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor, eps: float, frozen: bool) -> list[torch.Tensor]:
    """y, dx and dw of an RMS norm, from the equations of its docstring, one row at a time."""
    y, dx, dw = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(w)
    for row in range(x.shape[0]):
        r = math.sqrt(sum(float(one) ** 2 for one in x[row]) / x.shape[1] + eps)
        n, g = x[row] / r, dy[row] * w
        y[row] = n * w
        dx[row] = g / r if frozen else (g - n * (g * n).mean()) / r
        dw += dy[row] * n
    return [y, dx, dw]


def layer_by_hand(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, dy: torch.Tensor, eps: float, frozen: bool
) -> list[torch.Tensor]:
    """y, dx, dw and db of a layer norm, likewise; dx by the full Jacobian matrix of one row."""
    y, dx, dw, db = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(w), torch.zeros_like(b)
    width = x.shape[1]
    centre = torch.eye(width, dtype=x.dtype) - 1.0 / width
    for row in range(x.shape[0]):
        centred = centre @ x[row]
        s = (centred.pow(2).mean() + eps).sqrt()
        n = centred / s
        y[row] = n * w + b
        jacobian = centre / s
        if not frozen:
            jacobian = jacobian - torch.outer(n, n) / (width * s)
        dx[row] = jacobian.T @ (dy[row] * w)
        dw, db = dw + dy[row] * n, db + dy[row]
    return [y, dx, dw, db]


@in_blocks
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("module", [gim_kernels, reference], ids=["engine", "reference"])
def test_rms_norm_is_its_equation(module: Any, offset: float, frozen: bool) -> None:
    x, w, dy = numbers(5, 33) + 0.5, numbers(33, seed=1), numbers(5, 33, seed=2)
    got = differentiate(lambda *t: module.rms_norm(*t, 1e-2, weight_offset=offset, frozen=frozen), [x, w], dy)
    for name, a, b in zip(("y", "dx", "dw"), got, rms_by_hand(x, w + offset, dy, 1e-2, frozen), strict=True):
        assert_close64(a, b, name)


@in_blocks
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("module", [gim_kernels, reference], ids=["engine", "reference"])
def test_layer_norm_is_its_equation(module: Any, frozen: bool) -> None:
    x, w, b, dy = numbers(5, 33) + 0.5, numbers(33, seed=1), numbers(33, seed=3), numbers(5, 33, seed=2)
    got = differentiate(lambda *t: module.layer_norm(*t, 1e-2, frozen=frozen), [x, w, b], dy)
    for name, p, q in zip(("y", "dx", "dw", "db"), got, layer_by_hand(x, w, b, dy, 1e-2, frozen), strict=True):
        assert_close64(p, q, name)


def test_live_norms_equal_torch() -> None:
    x, w, b, dy = numbers(2, 3, 40), numbers(40, seed=1), numbers(40, seed=3), numbers(2, 3, 40, seed=2)
    pairs = [
        (lambda *t: gim_kernels.rms_norm(*t, 1e-6), lambda *t: F.rms_norm(t[0], (40,), t[1], 1e-6), [x, w]),
        (lambda *t: gim_kernels.rms_norm(t[0], None, 1e-6), lambda *t: F.rms_norm(t[0], (40,), None, 1e-6), [x]),
        (lambda *t: gim_kernels.layer_norm(*t, 1e-5), lambda x, w, b: F.layer_norm(x, (40,), w, b, 1e-5), [x, w, b]),
        (
            lambda *t: gim_kernels.layer_norm(t[0], None, None, 1e-5),
            lambda *t: F.layer_norm(t[0], (40,), None, None, 1e-5),
            [x],
        ),
    ]
    for ours, theirs, tensors in pairs:
        for a, c in zip(differentiate(ours, tensors, dy), differentiate(theirs, tensors, dy), strict=True):
            assert_close64(a, c, "torch")


def norm_terms(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, dy: torch.Tensor, eps: float, frozen: bool
) -> list[torch.Tensor]:
    """For each result, the sum of the absolute values of what it adds up, float64; a layer norm if there is a bias.

    Few features leave little of what is added up: two of them, with their mean taken out, nothing of a live gradient.
    """
    x, w, g = (t.double() for t in (x, w, dy))
    size, centred = x.abs(), x
    if b is not None:
        size, centred = size + size.mean(-1, keepdim=True), x - x.mean(-1, keepdim=True)
    statistic = (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    # The statistic's own relative error.
    grown = 1 + (centred.abs() * size).mean(-1, keepdim=True) / statistic.pow(2)
    normalised = size * grown / statistic
    weighted = (g * w).abs()
    dx = weighted if b is None else weighted + weighted.mean(-1, keepdim=True)
    if not frozen:
        dx = dx + normalised * (weighted * normalised).mean(-1, keepdim=True)
    y, dw = normalised * w.abs(), (g.abs() * normalised).sum(0)
    if b is None:
        return [y, dx * grown / statistic, dw]
    return [y + b.double().abs(), dx * grown / statistic, dw, g.abs().sum(0)]


@settings(max_examples=60)
@given(data=st.data())
def test_norms_stay_within_the_error_budget(data: st.DataObject) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 200)))
    frozen, seed = draw(st.booleans()), draw(st.integers(0, 5))
    x, dy = numbers(*shape, seed=seed, dtype=dtype), numbers(*shape, seed=seed + 1, dtype=dtype)
    w, b = (numbers(shape[1], seed=seed + i, dtype=dtype) for i in (2, 3))
    rms = draw(st.booleans())

    def run(module: Any, convert: Any) -> list[torch.Tensor]:
        if rms:
            return differentiate(
                lambda *t: module.rms_norm(*t, 1e-5, frozen=frozen), [convert(x), convert(w)], convert(dy)
            )
        tensors = [convert(x), convert(w), convert(b)]
        return differentiate(lambda *t: module.layer_norm(*t, 1e-5, frozen=frozen), tensors, convert(dy))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pointwise, "NUMBERS_PER_THREAD", draw(st.sampled_from([1, 400, 2**19])))
        got = run(gim_kernels, lambda t: t)
    yardstick, truth = run(reference, lambda t: t), run(reference, torch.Tensor.double)
    terms = norm_terms(x, w, None if rms else b, dy, 1e-5, frozen)
    for index, results in enumerate(zip(got, truth, yardstick, terms, strict=True)):
        assert_within_terms(*results, what=f"output {index}")


@in_blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_views_are_read_as_they_lie(dtype: torch.dtype) -> None:
    both = numbers(3, 50, 2 * 24, dtype=dtype)
    gate, up = both[..., :24], both[..., 24:]  # halves of a fused projection
    heads = numbers(3, 50, 4, 24, seed=1, dtype=dtype).transpose(1, 2)
    weight, grad = numbers(24, seed=2, dtype=dtype), numbers(3, 50, 24, seed=3, dtype=dtype)

    def run(module: Any, convert: Any) -> list[torch.Tensor]:
        w = convert(weight)
        results = differentiate(lambda g, u: module.gated(g, u, "gelu"), [convert(gate), convert(up)], convert(grad))
        for norm in (
            lambda x: module.rms_norm(x, w, 1e-6, weight_offset=1.0),
            lambda x: module.layer_norm(x, None, w, 1e-6, frozen=True),
        ):
            results += differentiate(norm, [convert(heads)], convert(heads).flip(1))
        return results

    got, yardstick = run(gim_kernels, lambda t: t), run(reference, lambda t: t)
    for index, (a, c, truth) in enumerate(zip(got, yardstick, run(reference, torch.Tensor.double), strict=True)):
        assert_within_budget(a, truth, c, f"output {index}")


@pytest.mark.parametrize("own", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_parameters_may_have_another_dtype_than_the_input(dtype: torch.dtype, own: torch.dtype) -> None:
    x, grad = numbers(3, 8, dtype=dtype), numbers(3, 8, seed=1, dtype=dtype)
    weight, bias = numbers(8, seed=2, dtype=own), numbers(8, seed=3, dtype=own)

    def run(module: Any, convert: Any) -> list[torch.Tensor]:
        rms = differentiate(lambda x, w: module.rms_norm(x, w, 1e-6), [convert(x), convert(weight)], convert(grad))
        tensors = [convert(x), convert(weight), convert(bias)]
        return rms + differentiate(lambda *t: module.layer_norm(*t, 1e-6), tensors, convert(grad))

    got, yardstick = run(gim_kernels, lambda t: t), run(reference, lambda t: t)
    for index, (a, c, truth) in enumerate(zip(got, yardstick, run(reference, torch.Tensor.double), strict=True)):
        assert a.dtype == c.dtype
        assert_within_budget(a, truth, c, f"output {index}")


#: Live norms and a gated product, each of its tensors, and as torch has them.
OURS: dict[str, Any] = {
    "rms": lambda x, w: gim_kernels.rms_norm(x, w, 1e-5),
    "layer": lambda x, w, b: gim_kernels.layer_norm(x, w, b, 1e-5),
    "silu": lambda gate, up: gim_kernels.gated(gate, up, "silu"),
}
TORCHS: dict[str, Any] = {
    "rms": lambda x, w: F.rms_norm(x, w.shape, w, 1e-5),
    "layer": lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-5),
    "silu": lambda gate, up: F.silu(gate) * up,
}


@pytest.mark.parametrize("dtype", first(TYPES, (torch.float32, torch.bfloat16)))
@pytest.mark.parametrize("kind", ["rms", "layer", "silu"])
def test_any_strides_of_every_tensor(kind: str, dtype: torch.dtype) -> None:
    for seed in range(80):
        rng = random.Random(seed)
        shape = (rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 9), rng.choice((1, 2, 7, 16, 33)))
        x, up, dy = (
            laid_out(numbers(*shape, seed=5 * seed + index, dtype=dtype), draw_strides(rng, shape), rng.choice((0, 3)))
            for index in range(3)
        )
        w, b = (
            laid_out(numbers(shape[-1], seed=5 * seed + index, dtype=dtype), (rng.choice((0, 1, 3)),), 0)
            for index in (3, 4)
        )
        tensors = {"rms": [x, w], "layer": [x, w, b], "silu": [x, up]}[kind]
        got = differentiate(OURS[kind], tensors, dy)
        yardstick = differentiate(TORCHS[kind], tensors, dy)
        truth = differentiate(TORCHS[kind], [t.double() for t in tensors], dy.double())
        if kind == "silu":
            sizes = [t.abs() for t in truth]
        else:
            rows = [t.reshape(-1, shape[-1]) for t in (x, dy)]
            sizes = norm_terms(rows[0], w, b if kind == "layer" else None, rows[1], 1e-5, False)
        for index, (a, t, c, size) in enumerate(zip(got, truth, yardstick, sizes, strict=True)):
            assert_within_terms(a, t, c, size.view(t.shape), f"{kind}, output {index} of seed {seed}")


@pytest.mark.filterwarnings("ignore:Mismatch dtype:UserWarning")  # torch, of a norm that it does not fuse
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "dtypes", list(itertools.product(TYPES, repeat=2)), ids=lambda types: "-".join(map(str, types))
)
@pytest.mark.parametrize("kind", OURS)
def test_autocast_changes_nothing_as_in_torch_on_a_cpu(
    kind: str, dtypes: tuple[torch.dtype, torch.dtype], low: torch.dtype
) -> None:
    dtype, other = dtypes
    x, dy = numbers(3, 8, dtype=dtype), numbers(3, 8, seed=1, dtype=dtype)
    w, b, up = numbers(8, seed=2, dtype=other), numbers(8, seed=3, dtype=other), numbers(3, 8, seed=4, dtype=other)
    tensors = {"rms": [x, w], "layer": [x, w, b], "silu": [x, up]}[kind]
    if kind == "silu" and dtype != other:  # torch would give the wider of the two
        with torch.autocast("cpu", low), pytest.raises(TypeError, match="up must have gate's dtype"):
            OURS[kind](*tensors)
        return
    plain = differentiate(OURS[kind], tensors, dy)
    with torch.autocast("cpu", low):
        got = differentiate(OURS[kind], tensors, dy)
        assert all(torch.equal(inside, outside) for inside, outside in zip(got, plain, strict=True))
        narrow = (dtype, torch.float32) if dtype != torch.float64 else (dtype,)
        if kind == "layer" and other not in narrow:
            with pytest.raises(RuntimeError, match="mixed dtype"):  # ours takes parameters of any dtype
                TORCHS[kind](*tensors)
            return
        want = differentiate(TORCHS[kind], tensors, dy)
    truth = differentiate(TORCHS[kind], [t.double() for t in tensors], dy.double())
    for index, results in enumerate(zip(got, truth, want, strict=True)):
        assert_within_budget(*results, what=f"output {index}")


def saved_elements(function: Any, x: torch.Tensor) -> int:
    """How many numbers autograd keeps of one call, other than parameters."""
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(x)
    return sum(kept.values())


def test_a_frozen_norm_keeps_one_number_for_each_row() -> None:
    x = numbers(64, 128).requires_grad_(True)
    weight, bias = torch.ones(128, dtype=torch.float64), torch.zeros(128, dtype=torch.float64)
    assert saved_elements(lambda t: gim_kernels.rms_norm(t, weight, 1e-6, frozen=True), x) == 64 + 128
    assert saved_elements(lambda t: gim_kernels.layer_norm(t, weight, bias, 1e-6, frozen=True), x) == 64 + 128
    assert saved_elements(lambda t: gim_kernels.rms_norm(t, weight, 1e-6), x) == 64 + 128 + 64 * 128
    weight.requires_grad_(True)  # then its own gradient needs the input
    assert saved_elements(lambda t: gim_kernels.rms_norm(t, weight, 1e-6, frozen=True), x) == 64 + 128 + 64 * 128


ACTIVATIONS: dict[str, Any] = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@in_blocks
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backward", ["exact", "ratio"])
@pytest.mark.parametrize("module", [gim_kernels, reference], ids=["engine", "reference"])
def test_gated_is_its_equation(module: Any, backward: str, activation: str) -> None:
    gate, up, dy = numbers(3, 17), numbers(3, 17, seed=1), numbers(3, 17, seed=2)
    gate[0, 0] = 0.0  # act(x) / x has a limit there
    act = ACTIVATIONS[activation]
    values = torch.tensor([act(float(x)) for x in gate.flatten()], dtype=torch.float64).view_as(gate)
    step = 1e-6

    def derivative(x: float) -> float:
        if backward == "exact" or x == 0.0:  # act is 0 at 0, so the limit of the ratio is the derivative there
            return float((act(x + step) - act(x - step)) / (2 * step))
        return float(act(x) / x)

    slopes = torch.tensor([derivative(float(x)) for x in gate.flatten()], dtype=torch.float64).view_as(gate)
    got = differentiate(
        lambda *t: module.gated(*t, activation, grad_scale=(0.5, 0.3), activation_backward=backward), [gate, up], dy
    )
    assert_close64(got[0], values * up, "y")
    assert_close64(got[1], 0.5 * dy * up * slopes, "dgate", relative=1e-9)  # the step of the difference limits it
    assert_close64(got[2], 0.3 * dy * values, "dup")


@in_blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backward", ["exact", "ratio"])
def test_gated_stays_within_the_error_budget(backward: str, activation: str, dtype: torch.dtype) -> None:
    tensors = [numbers(7, 65, dtype=dtype), numbers(7, 65, seed=1, dtype=dtype)]
    dy = numbers(7, 65, seed=2, dtype=dtype)

    def run(module: Any, convert: Any) -> list[torch.Tensor]:
        return differentiate(
            lambda *t: module.gated(*t, activation, grad_scale=(0.5, 0.5), activation_backward=backward),
            [convert(t) for t in tensors],
            convert(dy),
        )

    got, yardstick = run(gim_kernels, lambda t: t), run(reference, lambda t: t)
    for index, (a, c, truth) in enumerate(zip(got, yardstick, run(reference, torch.Tensor.double), strict=True)):
        assert_within_budget(a, truth, c, f"output {index}")


def test_forwards_do_not_depend_on_the_rule_and_a_second_backward_is_the_same() -> None:
    x, w, up = numbers(4, 32, dtype=torch.float32), numbers(32, dtype=torch.float32), numbers(4, 32, seed=3).float()
    assert torch.equal(gim_kernels.rms_norm(x, w, 1e-6), gim_kernels.rms_norm(x, w, 1e-6, frozen=True))
    assert torch.equal(gim_kernels.layer_norm(x, w, w, 1e-6), gim_kernels.layer_norm(x, w, w, 1e-6, frozen=True))
    plain = gim_kernels.gated(x, up, "silu")
    assert torch.equal(plain, gim_kernels.gated(x, up, "silu", grad_scale=(0.5, 0.5), activation_backward="ratio"))
    for function in (
        lambda t: gim_kernels.rms_norm(t, w, 1e-6, frozen=True),
        lambda t: gim_kernels.layer_norm(t, w, w, 1e-6),
        lambda t: gim_kernels.gated(t, up, "gelu", activation_backward="ratio"),
    ):
        leaf = x.clone().requires_grad_(True)
        out = function(leaf)
        (first,) = torch.autograd.grad(out, leaf, up, retain_graph=True)
        (second,) = torch.autograd.grad(out, leaf, up)
        assert torch.equal(first, second)


def test_the_operators_pass_torch_checks() -> None:
    x, w, b = numbers(3, 8).requires_grad_(True), numbers(8).requires_grad_(True), numbers(8).requires_grad_(True)
    ops = torch.ops.gim_kernels
    for frozen in (False, True):
        torch.library.opcheck(ops.rms_norm.default, (x, w, 1e-5, 0.0, frozen, "blockwise"))
        torch.library.opcheck(ops.layer_norm.default, (x, w, b, 1e-5, frozen, "blockwise"))
    up = numbers(3, 8, seed=1).requires_grad_(True)
    torch.library.opcheck(ops.gated.default, (x, up, "silu", [0.5, 0.5], "exact", "blockwise"))


X, W = numbers(2, 8), numbers(8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gim_kernels.rms_norm([1], W, 1e-5), TypeError, "x must be a tensor, got list"),
        (lambda: gim_kernels.rms_norm(X.long(), W, 1e-5), TypeError, "x must be float32.*int64"),
        (lambda: gim_kernels.rms_norm(torch.tensor(1.0), None, 1e-5), ValueError, "x must have a last dimension"),
        (lambda: gim_kernels.rms_norm(X, W[:7], 1e-5), ValueError, r"weight must have the shape.*\[8\], got \(7,\)"),
        (lambda: gim_kernels.rms_norm(X, W, -1.0), ValueError, "eps must be a finite number >= 0, got -1.0"),
        (lambda: gim_kernels.rms_norm(X, W.to("meta"), 1e-5), ValueError, "weight must be on x's device cpu"),
        (lambda: gim_kernels.layer_norm(X, W, W.long(), 1e-5), TypeError, "bias must be float32.*int64"),
        (lambda: gim_kernels.layer_norm(X, W, W[:3], 1e-5), ValueError, "bias must have the shape"),
        (lambda: gim_kernels.gated(X, X[:1], "silu"), ValueError, "up must have gate's shape"),
        (lambda: gim_kernels.gated(X, X.float(), "silu"), TypeError, "up must have gate's dtype"),
        (lambda: gim_kernels.gated(X, X.to("meta"), "silu"), ValueError, "up must be on gate's device"),
        (lambda: gim_kernels.gated(X.long(), X.long(), "silu"), TypeError, "gate must be float32"),
        (lambda: gim_kernels.gated(3, X, "silu"), TypeError, "gate must be a tensor, got int"),
        (lambda: gim_kernels.gated(X, X, "swish"), ValueError, "activation must be one of.*'swish'"),
        (lambda: gim_kernels.gated(X, X, "silu", activation_backward="lrp"), ValueError, "activation_backward must"),
        (lambda: gim_kernels.gated(X, X, "silu", grad_scale=(1.0,)), ValueError, "grad_scale must be two finite"),
    ],
)
def test_refusals_name_the_argument(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()

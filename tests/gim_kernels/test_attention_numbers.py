"""attention() for any strides, scale and temperature, and under autocast."""

from __future__ import annotations

import contextlib
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gim_kernels
from gim_kernels import blockwise, reference
from gim_kernels.blockwise.forward import _for_torch
from gim_kernels.types import ENGINES, Options
from tests.gim_kernels.attention_draws import Draw, check, differentiate, draw, laid_out
from tests.live import peak_bytes
from tests.oracle import assert_close64, assert_within_budget

CPU = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
KERNELS = (torch.float32, torch.float16, torch.bfloat16)
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("first", range(0, 150, 30))
def test_random_draws(first: int) -> None:
    for seed in range(first, first + 30):
        check(draw(seed, CPU), "blockwise")


@pytest.mark.slow
@pytest.mark.parametrize("first", range(150, 20_000, 985))
def test_many_random_draws(first: int) -> None:
    for seed in range(first, first + 985):
        check(draw(seed, CPU), "blockwise")


def _interpreted(first: int, end: int) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("runs in triton's interpreter, which a GPU takes the place of")
    for seed in range(first, end):
        check(draw(seed, KERNELS, most=2), "triton")


# exp2 may overflow where a softcap saturates or a key is masked: NumPy, which the interpreter is, says so.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_random_draws_of_the_kernels() -> None:
    _interpreted(0, 4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("first", range(4, 500, 62))
def test_many_random_draws_of_the_kernels(first: int) -> None:
    _interpreted(first, first + 62)


@pytest.mark.parametrize(
    "option", ["temperature", *(pytest.param(one, marks=pytest.mark.slow) for one in ("scale", "softcap"))]
)
def test_a_number_wrong_by_a_thousandth_is_no_rounding(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gim_kernels.attention

    def wrong(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        return right(*tensors, **{**options, option: options[option] * 1.001})

    monkeypatch.setattr(gim_kernels, "attention", wrong)
    passed = 0
    for seed in range(60):
        given = draw(seed, (torch.float32, torch.float64))
        given.options |= {"scale": 0.5, "softcap": 3.0, "softmax_backward": "temperature", "temperature": 1.5}
        with contextlib.suppress(AssertionError):
            check(given, "blockwise")
            passed += 1
    assert passed <= 15  # one key is seen, or all are alike


# ---- strides


def _guarded(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.gim_kernels.guarded", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_nothing_outside_a_tensor_is_read() -> None:
    done = _guarded("0", "60")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "read nothing outside\n"


@pytest.mark.slow
def test_a_read_outside_a_tensor_would_end_the_process() -> None:
    assert _guarded("beyond").returncode < 0


#: Strides of [2, 4, 9, 8] and whether torch's own kernel takes them as they are.
LAYOUTS = {
    "contiguous": ((288, 72, 8, 1), True),
    "heads inside": ((288, 8, 32, 1), True),
    "batch and heads expanded": ((0, 0, 8, 1), True),
    "gaps": ((400, 90, 10, 1), True),
    "features first": ((288, 72, 1, 9), False),
    "last stride 2": ((576, 144, 16, 2), False),
    "features expanded": ((36, 9, 1, 0), False),
    "rows expanded": ((32, 8, 0, 1), False),
    "rows overlap": ((288, 72, 1, 1), False),
    "heads overlap": ((288, 1, 32, 1), False),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", ["query", "key", "value", "grad_out"])
def test_every_layout_of_every_tensor(name: str, dtype: torch.dtype, which: str) -> None:
    generator = torch.Generator().manual_seed(0)
    names = ("query", "key", "value", "grad_out")
    tensors = {x: torch.randn(2, 4, 9, 8, generator=generator).to(dtype) for x in names}
    tensors[which] = laid_out(tensors[which], LAYOUTS[name][0], 3)
    for options in ({}, {"causal": True, "softmax_backward": "temperature"}, {"softcap": 2.0}, {"window": 3}):
        settings = {"softmax_backward": "exact", "temperature": 2.0, "softcap": None, "causal": False, "scale": None}
        check(Draw(0, dtype, tensors, {**settings, "grad_scale": (0.25, 0.3, 0.5), **options}), "blockwise")


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_what_torchs_kernel_cannot_walk_is_copied(name: str) -> None:
    strides, walkable = LAYOUTS[name]
    x = laid_out(torch.randn(2, 4, 9, 8), strides, 0)
    other = torch.randn(2, 4, 9, 8)
    assert (_for_torch(x) is x) == walkable
    for tensors in ((x, other, other), (other, x, other), (other, other, x)):
        copied = blockwise.forward_workspace(*tensors, Options(1.0), plain=True)
        assert copied == (0 if walkable else x.numel() * 4)
    assert torch.equal(_for_torch(x), x)


@pytest.mark.parametrize(
    "strides",
    [(0, 1, 4, 4096), (2097152, 524288, 128, 2), (524288, 262144, 1, 4096)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["torch", "blocks"])
@pytest.mark.slow
def test_copies_of_other_layouts_are_counted(
    strides: tuple[int, ...], dtype: torch.dtype, options: dict[str, float]
) -> None:
    given = tuple(laid_out(torch.randn(2, 2, 4096, 64).to(dtype), strides, 0) for _ in range(3))
    settings = Options(0.125, True, None, **options)
    named: dict[str, Any] = {"softmax_backward": "temperature", "temperature": 2.0}
    # A gradient of features first is laid out like its input, and is summed elsewhere.
    measured, counted = [], []
    for tensors in (tuple(x.contiguous() for x in given), given):
        query, key, _ = tensors
        plain = blockwise.runs_torchs_kernel(query, key, settings, True)
        assert plain == (not options)

        def forward(tensors: Any = tensors) -> Any:
            return blockwise.attention_forward(tensors[0], tensors[1], tensors[2], None, None, settings)

        out, lse = forward()

        def backward(tensors: tuple[torch.Tensor, ...] = (out, *tensors), saved: Any = (out, lse)) -> Any:
            factors, needs = (1.0, 1.0, 1.0), (True, True, True, False)
            return blockwise.attention_backward(
                *tensors, None, None, *saved, settings, grad_scale=factors, needs=needs, **named
            )

        measured.append((peak_bytes(forward)[0], peak_bytes(backward)[0]))
        counted.append(
            (
                blockwise.forward_workspace(tensors[0], tensors[1], tensors[2], settings, plain),
                blockwise.backward_workspace(tensors[0], tensors[1], tensors[2], settings, **named),
            )
        )
    for run in (0, 1):
        more = measured[1][run] - measured[0][run]
        assert more <= counted[1][run] - counted[0][run] + 2**18


# ---- scales and temperatures


def _by_formula(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_out: torch.Tensor,
    scale: float,
    temperature: float,
) -> dict[str, torch.Tensor]:
    """Causal attention and its gradients, written out."""
    hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    scores = (scale * query @ key.mT).masked_fill(hidden, -math.inf)
    weights, softened = (torch.softmax(scores / t, -1) for t in (1.0, temperature))
    grad_weights = grad_out @ value.mT
    grad_scores = softened * (grad_weights - (softened * grad_weights).sum(-1, keepdim=True))
    return {
        "out": weights @ value,
        "query": scale * grad_scores @ key,
        "key": scale * grad_scores.mT @ query,
        "value": weights.mT @ grad_out,
    }


@pytest.mark.parametrize("engine", ["reference", "blockwise"])
@pytest.mark.parametrize("scale", [-30.0, -0.5, -1e-3, -1e-300, 0.0, 1e-300, 0.5])
def test_any_scale(scale: float, engine: str) -> None:
    generator = torch.Generator().manual_seed(0)
    names = ("query", "key", "value", "grad_out")
    tensors = {name: torch.randn(1, 2, 20, 8, generator=generator, dtype=torch.float64) for name in names}
    want = _by_formula(**tensors, scale=scale, temperature=2.0)
    options = {"causal": True, "scale": scale, "softmax_backward": "temperature"}
    for name, x in differentiate(gim_kernels.attention, tensors, engine=engine, **options).items():
        assert_close64(x, want[name], name)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1e-42])
def test_a_scale_that_torchs_kernel_cannot_take(scale: float) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        query, key, value = torch.randn(3, 1, 2, 20, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        got = gim_kernels.attention(query, key, value, causal=True, scale=scale)
        truth = reference.attention(query.double(), key.double(), value.double(), causal=True, scale=scale)
        yardstick = reference.attention(query, key, value, causal=True, scale=scale)
        assert_within_budget(got, truth, yardstick, f"{dtype}, scale {scale}")


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 0.02, 0.5, 1.0, 2.0, 300.0, 1e6, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_temperature(dtype: torch.dtype, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    names = ("query", "key", "value", "grad_out")
    # Scores are whole numbers, which every type holds: what a temperature makes of them is left.
    tensors = {name: torch.randint(-2, 3, (1, 2, 40, 8), generator=generator).to(dtype) for name in names}
    tensors["value"] = tensors["value"] + torch.rand(1, 2, 40, 8, generator=generator).to(dtype)
    options = {"causal": True, "scale": 1.0, "softmax_backward": "temperature", "temperature": temperature}
    got = differentiate(gim_kernels.attention, tensors, engine="blockwise", **options)
    doubles = {name: x.double() for name, x in tensors.items()}
    truth = _by_formula(**doubles, scale=1.0, temperature=temperature)
    yardstick = differentiate(reference.attention, tensors, **options)
    for name, x in got.items():
        assert_within_budget(x, truth[name], yardstick[name], f"{name}, temperature {temperature}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 1e-6}, "temperature must be from 1e-05 to 1e.30, got 1e-06"),
        ({"temperature": 1e31}, "temperature must be from 1e-05 to 1e.30, got 1e.31"),
        ({"scale": 1e39}, "scale must be finite in torch.float32, the type of the scores, got 1e.39"),
        ({"scale": -math.inf}, "scale must be finite in torch.float32, the type of the scores, got -inf"),
    ],
)
def test_numbers_that_the_scores_cannot_take_are_refused(arguments: dict[str, float], message: str) -> None:
    x = torch.randn(1, 1, 4, 8)
    for engine in ENGINES:
        with pytest.raises(ValueError, match=message):
            gim_kernels.attention(x, x, x, engine=engine, softmax_backward="temperature", **arguments)


# ---- autocast

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "dtypes", list(itertools.product(TYPES, repeat=3)), ids=lambda types: "-".join(map(str, types))
)
def test_autocast_takes_what_torch_takes(dtypes: tuple[torch.dtype, ...], low: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 2, 9, 16, generator=generator).to(dtype).requires_grad_(True) for dtype in dtypes]
    functions: dict[str, Any] = {
        "scaled_dot_product_attention": gim_kernels.scaled_dot_product_attention,
        "attention": gim_kernels.attention,
    }
    with torch.autocast("cpu", low):
        try:
            want = F.scaled_dot_product_attention(*given)
        except RuntimeError:
            for function in functions.values():
                with pytest.raises(TypeError, match="must have query's dtype"):
                    function(*given)
            return
    grad_out = torch.randn(want.shape, generator=generator).to(want.dtype)
    wanted = torch.autograd.grad(want, given, grad_out)
    truth = reference.attention(*(x.to(want.dtype).double() for x in given))
    for name, function in functions.items():
        with torch.autocast("cpu", low):
            out = function(*given)
            assert out.dtype == want.dtype
            grads = torch.autograd.grad(out, given, grad_out)  # inside, where products would be cast as well
        assert_within_budget(out, truth, want, name)
        assert [grad.dtype for grad in grads] == [grad.dtype for grad in wanted] == list(dtypes)


def test_products_in_blocks_are_not_cast_by_autocast() -> None:
    # float64 is left alone by torch, and so must be every product inside.
    given = draw(0, (torch.float64,))
    options = {**given.options, "softcap": 3.0, "softmax_backward": "temperature", "temperature": 3.0}
    with torch.autocast("cpu", torch.bfloat16):
        got = differentiate(gim_kernels.attention, given.tensors, engine="blockwise", **options)
    want = differentiate(gim_kernels.attention, given.tensors, engine="blockwise", **options)
    for name, x in got.items():
        assert torch.equal(x, want[name]), name


def test_two_dtypes_are_refused_where_autocast_is_off() -> None:
    x = torch.randn(1, 1, 4, 8)
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autocast("cpu", enabled=False),
        pytest.raises(TypeError, match="value must have query's dtype torch.float32, got torch.bfloat16"),
    ):
        gim_kernels.attention(x, x, x.bfloat16())

"""Norms that are written out run by the kernels once they have been seen; nothing else does, and nothing changes."""

from __future__ import annotations

import os
import sys
from os import getenv
from sys import getrecursionlimit
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import gim
from gim.applied import UnsupportedModelError
from gim.intercept import fused
from gim_kernels.budget import relative_error
from tests import oracle
from tests.families import ids
from tests.families import make as family

WIDTH = 48


class Written(nn.Module):
    """A layer norm by its equation, in a file of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        centred = wide - wide.mean(dim=-1, keepdim=True)
        wide = centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + 1e-4)
        return (self.scale * wide + self.shift).to(x.dtype)


class AnotherEpsilon(LlamaRMSNorm):
    """An RMS norm that uses another epsilon than it says."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.float()
        return (self.weight * rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-3)).to(hidden_states.dtype)


class Absolute(nn.Module):
    """A norm that no kernel is: its statistic is the mean size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.abs().mean(-1, keepdim=True)


class Half(nn.Module):
    """A norm of which only one half is used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return torch.cat([y[..., : WIDTH // 2], x[..., WIDTH // 2 :]], -1)


class Sometimes(nn.Module):
    """One that looks at a number before it decides."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.detach().abs().max() > 1e6):
            return x
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


KERNELS: dict[str, tuple[Any, str]] = {
    "llama": (lambda: LlamaRMSNorm(WIDTH, 1e-5), "rms_norm"),
    "t5": (lambda: T5LayerNorm(WIDTH, 1e-6), "rms_norm"),
    "gemma": (lambda: GemmaRMSNorm(WIDTH, 1e-6), "rms_norm with weight 1 + w"),
    "another epsilon": (lambda: AnotherEpsilon(WIDTH, 1e-6), "rms_norm"),
    "written": (Written, "layer_norm"),
}
OWN: dict[str, Any] = {"absolute": Absolute, "half": Half, "sometimes": Sometimes}


def build(norm: nn.Module, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 0.5, 0.5)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), norm, nn.Linear(WIDTH, 3)).to(dtype)


def gradient(model: Any, dtype: torch.dtype, size: float = 1.0) -> tuple[torch.Tensor, Any]:
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).mul(size).to(dtype).requires_grad_()
    with gim.GIM(model, rules="FREEZE_ONLY") as report:
        loss = model(x).double().pow(2).sum()
    return torch.autograd.grad(loss, x)[0], report


@pytest.fixture(autouse=True)
def _unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test sees every norm for the first time."""
    monkeypatch.setattr(fused, "_known", {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_a_norm_that_is_written_out_runs_by_the_kernels(name: str, dtype: torch.dtype) -> None:
    make, words = KERNELS[name]
    model = build(make(), dtype)
    first, report = gradient(model, dtype)
    (row,) = report.of("norm")
    assert (row.recognised, row.engine, row.calls) == (f"{words}, written out", "blockwise", 1)
    again, report = gradient(model, dtype)
    assert torch.equal(first, again) and report.of("norm")[0].calls == 1


def unit(x: torch.Tensor, axes: Any = -1) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(axes, keepdim=True) + 1e-6)


#: What is an RMS norm of a few small rows, and something else of others.
HIDDEN: dict[str, Any] = {
    "clipped before": lambda _, x: unit(x.clamp(-8, 8)),
    "clipped statistic": lambda _, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(max=100.0) + 1e-6),
    "clipped after": lambda _, x: unit(x).clamp(-6, 6),
    "chosen": lambda _, x: unit(torch.where(x.abs() > 20, 0, x)),
    "filled": lambda _, x: unit(x).masked_fill(x.abs() > 40, 0),
    "compared": lambda _, x: unit(x) * (x < 40),
    "soft clip": lambda _, x: unit(torch.where(x > 30, 30 + (x - 30).log1p(), x)),
    "bent far out": lambda _, x: unit(torch.tanh(x / 1e4) * 1e4),
    "bent by arithmetic": lambda _, x: unit(x / (1 + (x / 1e5) ** 2).sqrt()),
    "rounded": lambda _, x: unit(x - 1e3 * torch.div(x, 1e3, rounding_mode="trunc")),
    "made integers": lambda _, x: unit(x - 50 * (x / 50).to(torch.int64)),
    "over the batch": lambda _, x: unit(x, (0, -1)),
    "by tokens": lambda _, x: unit(x) if x.shape[1] < 6 else x,
    "by tokens, asked otherwise": lambda _, x: unit(x) if x.size(-2) * x.numel() < 6 * x.numel() else x,
    "by length": lambda _, x: unit(x) if len(x[0]) < 6 else x,
    "a few tokens": lambda _, x: unit(x[:, :1000]) if x.is_contiguous() else x,
    "by a number": lambda _, x: unit(x) if bool(x.abs().amax() < 50) else x,
    "by a gradient": lambda _, x: unit(x) if x.requires_grad else x,
    "in place": lambda _, x: unit(x.mul_(2.0)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_differs_from_a_norm_anywhere_keeps_its_own_code(name: str) -> None:
    norm: Any = type("Hidden", (nn.Module,), {"forward": HIDDEN[name]})
    model = build(norm(), torch.float64)
    small = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    large = torch.cat([small, 1e4 * small], 1)
    for x in (small, large, torch.cat([small, large[:, 5:]])):
        with gim.GIM(model, rules="FREEZE_ONLY", strict=False):
            y = model(x.requires_grad_())
            assert torch.equal(y, model(x))
        assert torch.equal(y, model(x))
    with torch.no_grad():
        with gim.GIM(model, rules="FREEZE_ONLY", strict=False):
            y = model(x)
        assert torch.equal(y, model(x))
    assert not any(fused._known.values())


def test_a_norm_over_an_axis_by_number_is_known_for_that_many_axes() -> None:
    norm: Any = type("Third", (nn.Module,), {"forward": lambda _, x: unit(x, 2)})
    model = build(norm(), torch.float64)
    for shape in ((2, 5, WIDTH), (2, 3, WIDTH, WIDTH)):
        x = torch.randn(shape, dtype=torch.float64).requires_grad_()
        with gim.GIM(model, rules="FREEZE_ONLY", strict=False):
            y = model(x)
        assert relative_error(y, model(x)) < 1e-12
    assert sum(norm is not None for norm in fused._known.values()) == 1


def test_a_kernel_is_held_against_the_first_real_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_recognise", lambda *_: fused.Norm("rms_norm", 1e-2))  # which it is not
    model = build(LlamaRMSNorm(WIDTH), torch.float32)
    _, report = gradient(model, torch.float32, 1e-2)
    assert report.of("norm")[0].engine == "torch" and not any(fused._known.values())


@pytest.mark.parametrize("size", [1.0, 1e-3], ids=["plain", "tiny"])
@pytest.mark.parametrize("name", [*KERNELS, *OWN])
def test_without_the_cache_everything_is_the_same(name: str, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float32 if name in ("llama", "t5", "gemma", "another epsilon") else torch.float64  # their own code's
    model = build(KERNELS[name][0]() if name in KERNELS else OWN[name](), dtype)
    fast, report = gradient(model, dtype, size)
    monkeypatch.setattr(fused, "ENABLED", False)
    own, slow = gradient(model, dtype, size)
    assert relative_error(fast, own) < (1e-12 if dtype == torch.float64 else 1e-5)
    assert report.counts() == slow.counts() and report.complete and slow.complete
    assert slow.of("norm")[0].engine == "torch"


@pytest.mark.parametrize("name", OWN)
def test_what_no_kernel_computes_keeps_its_own_code(name: str) -> None:
    _, report = gradient(build(OWN[name](), torch.float64), torch.float64)
    (row,) = report.of("norm")
    assert row.engine == "torch" and row.recognised == "a value over a statistic of it"


@pytest.mark.parametrize("kind", [lambda: nn.LayerNorm(WIDTH), lambda: nn.RMSNorm(WIDTH), lambda: OlmoLayerNorm(WIDTH)])
def test_what_calls_torchs_function_needs_no_cache(kind: Any) -> None:
    model = build(kind(), torch.float64)
    _, report = gradient(model, torch.float64)
    assert report.of("norm")[0].recognised.startswith("call of F.") and not any(fused._known.values())


def test_a_norm_that_has_been_changed_is_seen_anew() -> None:
    norm = LlamaRMSNorm(WIDTH, 1e-5)
    model = build(norm, torch.float32)
    before, _ = gradient(model, torch.float32, 1e-3)
    norm.variance_epsilon = 1e-2
    changed, _ = gradient(model, torch.float32, 1e-3)
    assert relative_error(changed, before) > 0.1
    norm.forward = lambda x: x
    _, report = gradient(model, torch.float32)
    assert report.of("norm") == []


EPSILON = 1e-5


def rows_of(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON)


class Elsewhere(nn.Module):
    """A norm whose numbers are its class's and its file's."""

    power = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rows_of(x) if self.power == 2 else x


def test_what_a_norm_reads_elsewhere_is_seen_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(Elsewhere(), torch.float64)
    before, report = gradient(model, torch.float64, 1e-3)
    assert report.of("norm")[0].recognised == "rms_norm, written out"
    monkeypatch.setattr(sys.modules[__name__], "EPSILON", 1e-2)
    changed, _ = gradient(model, torch.float64, 1e-3)
    assert relative_error(changed, before) > 0.1
    monkeypatch.setattr(Elsewhere, "power", 1)
    with pytest.raises(UnsupportedModelError, match="run it again to watch it"):
        gradient(model, torch.float64)
    _, report = gradient(model, torch.float64)
    assert report.of("norm") == []


NUMBERS = {"epsilon": EPSILON}


class Settings:
    epsilon = 0.0


class Constants:
    epsilon = EPSILON


SETTINGS, LISTED = Settings(), [EPSILON]
SETTINGS.epsilon = EPSILON


class Configured(nn.Module):
    """A norm whose epsilon lies in what its file holds."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        square = x.pow(2).mean(-1, keepdim=True)
        if self.where == "dict":
            return x * torch.rsqrt(square + NUMBERS["epsilon"])
        if self.where == "class":
            return x * torch.rsqrt(square + Constants.epsilon)
        if self.where == "module":
            return x * torch.rsqrt(square + oracle.NORM_EPSILON)  # type: ignore[attr-defined]
        return x * torch.rsqrt(square + (SETTINGS.epsilon if self.where == "object" else LISTED[0]))


@pytest.mark.parametrize("where", ["dict", "object", "list", "class", "module"])
def test_what_a_norm_reads_is_seen_anew_where_it_has_been_written(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "NORM_EPSILON", EPSILON, raising=False)
    model = build(Configured(where), torch.float64)
    before, report = gradient(model, torch.float64, 1e-3)
    assert report.of("norm")[0].recognised == "rms_norm, written out"
    if where == "list":
        LISTED[0] = 1e-2
    elif where == "dict":
        monkeypatch.setitem(NUMBERS, "epsilon", 1e-2)
    elif where == "module":
        monkeypatch.setattr(oracle, "NORM_EPSILON", 1e-2)
    else:
        monkeypatch.setattr({"object": SETTINGS, "class": Constants}[where], "epsilon", 1e-2)
    changed, _ = gradient(model, torch.float64, 1e-3)
    LISTED[0] = EPSILON
    assert relative_error(changed, before) > 0.1


class Asking(nn.Module):
    """A norm whose epsilon is what something that nobody can look into says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + float(os.environ["EPSILON"]))


class AskingByName(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + float(getenv("EPSILON", "")))


class AskingPython(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + (1e-2 if getrecursionlimit() > 20_000 else 1e-5))


@pytest.mark.parametrize("norm", [Asking, AskingByName, AskingPython])
def test_what_a_norm_asks_of_the_world_is_asked_each_time(
    norm: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPSILON", "1e-5")
    model, limit = build(norm(), torch.float64), sys.getrecursionlimit()
    gradient(model, torch.float64, 1e-3)
    monkeypatch.setenv("EPSILON", "1e-2")
    sys.setrecursionlimit(30_000)
    try:
        changed, report = gradient(model, torch.float64, 1e-3)
    finally:
        sys.setrecursionlimit(limit)
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).mul(1e-3).double().requires_grad_()
    wide = model[0](x)
    out = model[2](wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-2).detach())
    (want,) = torch.autograd.grad(out.pow(2).sum(), x)
    assert report.complete and relative_error(changed, want) < 1e-12


def test_under_a_mode_of_ones_own_its_own_code_runs() -> None:
    class Silent(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return args[0] if func is torch.rsqrt else func(*args, **(kwargs or {}))

    model = build(LlamaRMSNorm(WIDTH), torch.float32)
    kernel, _ = gradient(model, torch.float32)
    with Silent():
        _, report = gradient(model, torch.float32)
        changed = model(torch.ones(2, 3, WIDTH))
    assert report.of("norm")[0].engine == "torch"
    assert not torch.equal(changed, model(torch.ones(2, 3, WIDTH)))
    with torch.device("cpu"):  # which is one of torch's
        again, report = gradient(model, torch.float32)
    assert torch.equal(again, kernel) and report.of("norm")[0].engine == "blockwise"


def test_its_own_code_runs_once_and_its_hooks_each_time() -> None:
    calls: list[str] = []

    class Counted(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            calls.append("code")
            return super().forward(hidden_states)

    model = build(Counted(WIDTH), torch.float32)
    model[1].register_forward_hook(lambda *_: calls.append("hook"))
    for _ in range(3):
        gradient(model, torch.float32)
    assert calls == ["code", "hook", "hook", "hook"]


@pytest.mark.parametrize("norm", [lambda: LlamaRMSNorm(WIDTH), Absolute], ids=["kernel", "own code"])
def test_first_seen_in_a_checkpoint(norm: Any) -> None:
    """What is saved for the backward is counted there, and must be the same in its second run."""
    model = build(norm(), torch.float32)
    want, _ = gradient(build(norm(), torch.float32), torch.float32)
    fused._known.clear()

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    around = Around()
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with gim.GIM(around, rules="FREEZE_ONLY") as report:
        loss = around(x).double().pow(2).sum()
        (got,) = torch.autograd.grad(loss, x)
    assert torch.equal(got, want) and report.counts()["norm"] == (1, 1)


def test_a_norm_that_is_itself_what_a_checkpoint_runs() -> None:
    norm = build(LlamaRMSNorm(WIDTH, 1e-5), torch.float32)[1]
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    wide, weight = x.detach().double(), norm.weight.detach().double()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    for _ in range(2):  # by its own code, then by the kernel
        with gim.GIM(norm, rules="FREEZE_ONLY") as report:
            y = checkpoint(norm, x, use_reentrant=False)
            (got,) = torch.autograd.grad(y.double().square().sum(), x)
        assert relative_error(got, 2 * wide * (inverse * weight).square()) < 1e-5
        assert [(row.recognised, row.calls) for row in report.applications] == [("rms_norm, written out", 1)]


def test_under_autocast_its_own_code_runs() -> None:
    model = build(LlamaRMSNorm(WIDTH), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, report = gradient(model, torch.float32)
    assert report.of("norm")[0].engine == "torch"


@pytest.mark.parametrize("name", ["llama", "gemma3", "cohere2"])
def test_a_model_without_the_cache_has_equal_attributions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, which their norms compute in whatever they are given."""
    model = family(name, torch.float32)
    fast = gim.explain(model, ids(), baseline_token_id=3)
    monkeypatch.setattr(fused, "ENABLED", False)
    own = gim.explain(model, ids(), baseline_token_id=3)
    assert relative_error(fast, own) < 1e-4


def test_no_tensor_is_kept() -> None:
    trace = fused.Trace(LlamaRMSNorm(WIDTH), x := torch.randn(2, WIDTH))
    y = F.silu(x)
    trace.add(F.silu, (x,), {}, y)
    del y
    assert len(trace._slots) == 1


def test_a_norm_that_no_gradient_flows_through_is_the_same_known_or_not() -> None:
    """What ran before in a process must not decide what a report says, or whether a model is refused."""
    model, told = build(LlamaRMSNorm(WIDTH), torch.float64), []
    model[:2].requires_grad_(False)
    for needs in (False, True, False):
        x = torch.randn(1, 3, WIDTH, dtype=torch.float64, requires_grad=needs)
        with gim.GIM(model, rules="FREEZE_ONLY", strict=False) as report:
            model(x)
        told.append((report.counts()["norm"], report.unsupported))
    assert told[0] == told[2] == ((0, 0), []) and told[1] == ((1, 1), [])

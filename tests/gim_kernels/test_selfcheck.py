"""A kernel that is wrong on a device is found at its first use there, and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gim_kernels

pytest.importorskip("triton")

import triton
import triton.language as tl

from gim_kernels import engines
from gim_kernels.aot import variants
from gim_kernels.triton import attention_out, norm, pointwise_tiles, selfcheck, verified
from gim_kernels.triton.selfcheck import KernelError
from tests.gim_kernels import test_attention as contract

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="breaks kernels of the interpreter")


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, the interpreter counts as a device that nobody has tried."""
    monkeypatch.setattr(selfcheck, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(selfcheck, "_right", {})
    yield


@triton.jit
def sees_all(position, key, first, end, window, CAUSAL: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """In place of ``sees``: the window hides nothing."""
    return (key <= position) & (key < end)


@triton.jit
def plain_weight(value, weight_ptr, weight_offset, column, mask):  # type: ignore[no-untyped-def]
    """In place of ``_times_weight``: the offset is forgotten."""
    if weight_ptr is not None:
        value = value * tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    return value


def attend(window: int | None) -> torch.Tensor:
    query, key, value, _ = contract.inputs("triton", 1, 2, 1, 12, 12, 16)
    return gim_kernels.attention(query, key, value, causal=True, window=window, engine="triton")


@pytest.mark.usefixtures("unverified")
def test_a_wrong_option_is_an_error_that_names_variant_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    attend(5)
    assert [name for name in selfcheck.found_right(-1) if "window" in name and "no_window" not in name]
    monkeypatch.setattr(selfcheck, "_right", {})
    monkeypatch.setattr(attention_out, "sees", sees_all)
    for _ in range(2):  # and never a number
        with pytest.raises(
            KernelError,
            match=r"gim_attention_forward_fp32_d16_causal_window_\S+ on triton's interpreter gives a wrong output",
        ):
            attend(5)
    attend(None)  # which is another variant, and right
    assert selfcheck.found_right(-1)


@pytest.mark.usefixtures("unverified")
def test_a_norm_is_held_against_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 70), torch.randn(70)
    monkeypatch.setattr(norm, "_times_weight", plain_weight)
    with pytest.raises(KernelError, match="gim_rms_norm_forward_fp32_weight_16x128 on .* wrong output"):
        gim_kernels.rms_norm(x, weight, 1e-5, weight_offset=1.0, engine="triton")


@pytest.mark.usefixtures("unverified")
def test_what_is_verified_or_cannot_be_compared_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("checked")

    monkeypatch.setattr(selfcheck, "check", fail)
    with pytest.raises(AssertionError, match="checked"):
        attend(None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    attend(None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    names = [entry.variant.name for entry in variants.attention("interpreter", 16, "fp32")]
    name = "gim_attention_forward_fp32_d16_causal_no_window_no_inner_no_key_range_no_sinks"
    monkeypatch.setattr(verified, "on_device", lambda _: frozenset([*names, name]))
    attend(None)


def test_a_check_disturbs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = norm.forward_variant(pointwise_tiles.norm_tile(64), torch.float32, torch.float32, None, False, True)
    state = torch.get_rng_state()
    seen: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch(), torch.autocast("cpu", torch.bfloat16):
        selfcheck.check(variant, CPU)
    assert not seen and torch.equal(torch.get_rng_state(), state)


def test_the_table_counts_for_its_device_triton_and_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert json.loads(verified.TABLE.read_text()) == []
    right = verified.entry(-1, ["b", "a"])
    assert right["variants"] == ["a", "b"]
    rows = [right, *({**right, name: "another", "variants": ["c"]} for name in ("device", "triton", "kernels"))]
    monkeypatch.setattr(verified, "TABLE", tmp_path / "verified.json")
    verified.TABLE.write_text(json.dumps(rows))
    verified.on_device.cache_clear()
    try:
        assert verified.on_device(-1) == {"a", "b"}
    finally:
        verified.on_device.cache_clear()


def test_what_is_known_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(verified, "on_device", lambda _: frozenset("ab"))
    monkeypatch.setattr(selfcheck, "_right", {1: {"c"}})
    assert engines.checked_kernels(torch.device("cuda", 1)) == (
        "on GPU 1 2 kernels have been verified before, and 1 were held against the reference in this process"
    )
    assert engines.checked_kernels(CPU) is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", variants.DTYPES)
def test_every_variant_passes_its_check(dtype: str) -> None:
    entries = [*variants.norms(dtype), *variants.gated_products(dtype), *variants.attention("interpreter", 16, dtype)]
    for variant in {entry.variant.name: entry.variant for entry in entries}.values():
        # float32 has no exact rule of its own but in the C library: see rule_of.
        if dtype != "fp32" or variant.constants.get("RULE") != "exact":
            selfcheck.check(variant, CPU)


@pytest.mark.slow
def test_every_check_runs_what_it_checks_on_a_gpu() -> None:
    """Every variant of the library for sm_90, with a driver that runs nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gim_kernels.launches", "checks"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    # float32 has no exact rule of its own but in the C library: see rule_of.
    assert not seen["otherwise"], seen["otherwise"]
    assert seen["checked"] > 300 and all("_fp32_" in name and "_exact_" in name for name in seen["missed"])

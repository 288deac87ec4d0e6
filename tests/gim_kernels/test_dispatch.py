"""What a launch costs the host, what it compiles, and that it is always the right one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from gim_kernels.triton import dispatch
from tests.gim_kernels import test_attention as contract

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What tests/gim_kernels/launches.py sees, whose triton has no interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gim_kernels.launches"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


#: How many times as long a call takes that works everything out again; 1 where nothing is kept.
SAVED = {
    "attention": 2.0,
    "attention step": 2.0,
    "norm": 1.5,
    "norm step": 1.25,
    "gated": 2.0,
    "gated step": 1.75,
}


@pytest.mark.slow
@pytest.mark.parametrize("subject", SAVED)
def test_a_call_like_an_earlier_one_costs_little(subject: str, seen: dict[str, Any]) -> None:
    kept, anew = seen["times"][subject]
    assert anew / kept > SAVED[subject], f"{kept:.0f} us, and {anew:.0f} us without what is kept"


#: How many functions of Python and C the package itself calls, at most; autograd's own are not counted.
CALLS = {
    "attention": 92,
    "attention step": 203,
    "norm": 71,
    "norm step": 131,
    "gated": 67,
    "gated step": 126,
}


@pytest.mark.slow
@pytest.mark.parametrize("subject", CALLS)
def test_a_call_like_an_earlier_one_does_little(subject: str, seen: dict[str, Any]) -> None:
    """What it costs without a clock: no load of the machine changes it."""
    assert 0 < seen["calls"][subject] <= CALLS[subject]


@pytest.mark.slow
def test_a_length_compiles_nothing_anew(seen: dict[str, Any]) -> None:
    """Eight lengths: a kernel each; a norm's step has four."""
    assert set(seen["compilations"]) == {"norm", "layer norm", "gated", "fused gated", "attention", "norm step"}
    for name, count in seen["compilations"].items():
        assert count <= (4 if name == "norm step" else 1), f"{name}: {count} kernels"


@pytest.mark.slow
def test_a_kernel_gets_what_triton_would_give_it(seen: dict[str, Any]) -> None:
    assert len(seen["arguments"]) == 5
    assert all(seen["arguments"].values()), seen["arguments"]


@pytest.mark.slow
def test_triton_compiles_what_the_variant_says(seen: dict[str, Any]) -> None:
    """None is None for triton too: a stride that a descriptor does not have, say."""
    assert not seen["otherwise"], seen["otherwise"]


@pytest.mark.usefixtures("fresh_memory_is_nan")
def test_what_is_kept_fits_other_numbers_and_other_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter with everything kept that is kept on a GPU: layouts, alignments and options come back in turn."""
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    options: dict[str, Any] = {"causal": True, "softmax_backward": "temperature"}
    for seed, odd, heads_last, temperature in (
        (0, 0, False, 2.0),
        (1, 1, False, 2.0),
        (2, 0, True, 3.0),
        (3, 0, False, 2.0),
    ):
        tensors = []
        for x in contract.inputs("triton", 1, 2, 1, 20, 20, 16, dtype=torch.float16):
            place = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[odd:][: x.numel()]
            place = place.view(1, 20, -1, 16).transpose(1, 2) if heads_last else place.view(x.shape)
            tensors.append(place.copy_(x + seed))
        contract.hold("triton", tuple(tensors), **options, temperature=temperature)


def test_few_plans_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def make(tensors: tuple[torch.Tensor | None, ...], option: int) -> int:
        made.append(option)
        return option

    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    monkeypatch.setattr(dispatch, "MOST_PLANS", 2)
    plans, x = dispatch.Plans(make), torch.zeros(3)
    for option in (0, 1, 0, 1, 2, 0):
        assert plans((x, None), option) == option
    assert made == [0, 1, 2, 0]

"""Every argument of every public function, given what it cannot be: an error whose first word is its name."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gim_kernels

Q, K, V = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4)
X = torch.zeros(3, 4)
FUNCTIONS: dict[Callable[..., Any], dict[str, Any]] = {
    gim_kernels.attention: {"query": Q, "key": K, "value": V},
    gim_kernels.scaled_dot_product_attention: {"query": Q, "key": K, "value": V},
    gim_kernels.rms_norm: {"x": X, "weight": X[0], "eps": 1e-5},
    gim_kernels.layer_norm: {"x": X, "weight": X[0], "bias": X[0], "eps": 1e-5},
    gim_kernels.gated: {"gate": X, "up": X, "activation": "silu"},
}
ODD: list[Any] = [
    "0.5x", b"1", [1], {}, object(), 1j, math.nan, -1.0, torch.zeros(2, 2).to_sparse(), X.numpy(),
    X.to(torch.complex64), X.bool(), torch.nn.Linear(1, 1),
]  # fmt: skip
#: What an argument may be besides what its function's own tests say: any number of any sign.
FINE = {"scale": (-1.0,), "weight_offset": (-1.0,)}


#: Whether something is true can be asked of anything.
SWITCHES = ("causal", "is_causal", "enable_gqa", "frozen")


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda one: one.__name__)
def test_an_odd_argument_is_named(function: Callable[..., Any]) -> None:
    wrong = []
    for name, value in itertools.product(inspect.signature(function).parameters, ODD):
        if name in SWITCHES or (isinstance(value, float) and value in FINE.get(name, ())):
            continue
        try:
            function(**{**FUNCTIONS[function], name: value})
        except (TypeError, ValueError) as error:
            if str(error).split()[0] != name:
                wrong.append(f"{name}={value!r:.60}: {error!s:.100}")
        except Exception as error:
            wrong.append(f"{name}={value!r:.60}: {type(error).__name__} {error!s:.100}")
        else:
            wrong.append(f"{name}={value!r:.60}: no error")
    assert not wrong, "\n".join(wrong)

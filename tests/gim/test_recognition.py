"""Norms and gated MLPs are recognised by what they compute, in every dtype, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from gim.patches import gated_mlps, norms
from gim.patches.norms import Norm

WIDTH = 48


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.5, 0.5)
    return module


NORMS: list[tuple[Any, Norm]] = [
    (lambda: nn.LayerNorm(WIDTH, eps=1e-5), Norm("layer_norm", 1e-5)),
    (lambda: nn.LayerNorm(WIDTH, eps=1e-3, bias=False), Norm("layer_norm", 1e-3)),
    (lambda: nn.LayerNorm(WIDTH, eps=1e-4, elementwise_affine=False), Norm("layer_norm", 1e-4)),
    (lambda: nn.RMSNorm(WIDTH, eps=1e-6), Norm("rms_norm", 1e-6)),
    (lambda: nn.RMSNorm(WIDTH), Norm("rms_norm", torch.finfo(torch.float32).eps)),
    (lambda: LlamaRMSNorm(WIDTH, 1e-5), Norm("rms_norm", 1e-5)),
    (lambda: T5LayerNorm(WIDTH, 1e-6), Norm("rms_norm", 1e-6)),
    (lambda: GemmaRMSNorm(WIDTH, 1e-6), Norm("rms_norm", 1e-6, 1.0)),
    (lambda: OlmoLayerNorm(WIDTH), Norm("layer_norm", 1e-5)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("build", "want"), NORMS, ids=[f"{i}-{want.kind}" for i, (_, want) in enumerate(NORMS)])
def test_norms_are_recognised(build: Any, want: Norm, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and want.eps == torch.finfo(torch.float32).eps:
        want = Norm(want.kind, torch.finfo(dtype).eps)  # torch.nn.RMSNorm without an epsilon takes its dtype's
    assert norms.recognise(randomised(build()).to(dtype)) == want


@pytest.mark.parametrize(("build", "want"), NORMS, ids=[f"{i}-{want.kind}" for i, (_, want) in enumerate(NORMS)])
def test_fresh_norms_are_recognised(build: Any, want: Norm) -> None:
    assert norms.recognise(build()) == want


class Scaled(nn.Module):
    """A vector weight, and no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class WrongEpsilon(LlamaRMSNorm):
    """An RMS norm that uses another epsilon than it says."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + 1e-3)


@pytest.mark.parametrize(
    "module",
    [Scaled(), WrongEpsilon(WIDTH, 1e-6), nn.BatchNorm1d(WIDTH).eval(), nn.GroupNorm(4, WIDTH), nn.PReLU(WIDTH)],
    ids=lambda module: type(module).__name__,
)
def test_what_is_no_norm_is_not_recognised(module: nn.Module) -> None:
    assert norms.recognise(module) is None


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_python", "gelu"),
        ("quick_gelu", None),
        ("relu", None),
        ("sigmoid", None),
        ("tanh", None),
    ],
)
def test_activations_are_recognised(name: str, want: str | None) -> None:
    assert gated_mlps.recognise_activation(ACT2FN[name]) == want

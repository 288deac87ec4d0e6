"""What is the composed engine's own: torch's own bits, its pieces, its memory, what it refuses and what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import gim_kernels
from gim_kernels import composed, reference, reference_engine, told
from gim_kernels.types import Options
from tests.gim_kernels.test_attention import make
from tests.gim_kernels.test_blockwise import Largest
from tests.live import peak_bytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_forward_is_torchs_own_bit_for_bit(dtype: torch.dtype, causal: bool, kv_heads: int) -> None:
    query, key, value, _ = make(2, 4, kv_heads, 70, 70, 16, dtype)
    want = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    for rule in ("exact", "temperature", "constant"):
        got = gim_kernels.attention(query, key, value, causal=causal, softmax_backward=rule, engine="composed")
        assert torch.equal(got, want), rule


@pytest.mark.parametrize("queries", [1, 2, 5, 9, 12])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 9, 10**12])
def test_pieces_hold_what_is_visible_once(
    queries: int, causal: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every query that sees a key is in one piece, which shows it exactly what the specification does."""
    monkeypatch.setattr(composed, "BLOCK", 2)
    keys, options = 9, Options(1.0, causal, window)
    for first in range(keys + 1):
        for end in range(first, keys + 1):
            key_range = torch.tensor([[first, end]])
            want = reference.visible(
                queries, keys, causal=causal, window=window, key_range=key_range, device=torch.device("cpu")
            )[0, 0]
            got, pieces_of = torch.zeros(queries, keys, dtype=torch.bool), torch.zeros(queries, dtype=torch.int64)
            for piece in composed.pieces(queries, keys, options, first, end):
                size = (piece.stop - piece.start, piece.end - piece.first)
                seen = torch.ones(size, dtype=torch.bool)
                if piece.mask == "causal":
                    assert size[0] == size[1]
                    seen = seen.tril()
                elif piece.mask == "band":
                    seen = composed._band(piece, keys - queries, options, torch.device("cpu"))
                assert bool(seen.any(-1).all())
                got[piece.start : piece.stop, piece.first : piece.end] = seen
                pieces_of[piece.start : piece.stop] += 1
            assert torch.equal(got, want), (first, end)
            assert torch.equal(pieces_of, want.any(-1).long()), (first, end)


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "window"), [(1024, 100), (512, None), (1024, None)])
def test_memory_is_linear_in_length(queries: int, window: int | None) -> None:
    keys = 1024
    query, key, value, grad_out = make(1, 1, 1, queries, keys, 8, torch.float32)
    leaves = [x.requires_grad_(True) for x in (query, key, value)]
    with Largest() as largest:
        out = gim_kernels.attention(
            *leaves, causal=True, window=window, softmax_backward="temperature", engine="composed"
        )
        torch.autograd.grad(out, leaves, grad_out)
    assert largest.elements <= composed.BLOCK * keys


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(
    ("engine", "temperature"),
    [(composed, 2.0), (composed, 0.5), (reference_engine, 2.0)],
    ids=["composed", "composed-wider", "reference"],
)
def test_what_a_backward_holds_is_what_is_said(
    engine: Any, temperature: float, key_heads: int, window: int | None
) -> None:
    options = Options(0.1, True, window)
    query, key, value, grad_out = (x.detach() for x in make(1, 4, key_heads, 2048, 2048, 64, torch.float32))
    saved = engine.attention_forward(query, key, value, None, None, options)
    results: list[Any] = []

    def run() -> None:
        results[:] = engine.attention_backward(
            grad_out, query, key, value, None, None, *saved, options, softmax_backward="temperature",
            temperature=temperature, grad_scale=(1.0, 1.0, 1.0), needs=(True, True, True, False),
        )  # fmt: skip

    measured, kept = peak_bytes(run)
    asked = (query, key, value, options, "temperature", temperature) if engine is composed else (query, key)
    assert measured - kept == pytest.approx(engine.backward_workspace(*asked), rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"softcap": 5.0}, "composed.* has no softcap"), ({"sinks": torch.zeros(4)}, "composed.* has no sinks")],
)
def test_what_exact_attention_does_not_have_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    query, key, value, _ = make(1, 4, 2, 6, 6, 8)
    with pytest.raises(NotImplementedError, match=message):
        gim_kernels.attention(query, key, value, engine="composed", **options)


def test_whole_score_matrices_are_refused_by_name() -> None:
    query, key, value, _ = make(1, 4, 2, 6, 6, 8)
    with sdpa_kernel([SDPBackend.MATH]), pytest.raises(NotImplementedError, match=r"no exact attention.* MATH"):
        gim_kernels.attention(query, key, value, engine="composed")


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("auto", "blockwise"),
        ("blockwise", "blockwise"),
        ("composed", "composed (FLASH_ATTENTION)"),
        ("reference", "reference"),
    ],
)
def test_every_operator_says_what_ran(engine: str, said: str) -> None:
    query, key, value, _ = make(1, 2, 1, 4, 4, 8)
    with told.listening() as heard:
        gim_kernels.attention(query, key, value, engine=engine)
    assert str(heard) == said
    others = "blockwise" if engine == "composed" else said
    for run in (
        lambda: gim_kernels.rms_norm(query, None, 1e-6, engine=engine),
        lambda: gim_kernels.layer_norm(query, None, None, 1e-6, engine=engine),
        lambda: gim_kernels.gated(query, query, "silu", engine=engine),
    ):
        with told.listening() as heard:
            run()
        assert str(heard) == others

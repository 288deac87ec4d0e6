"""The sanitizer sees faults planted in small kernels, and none in ours."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton
import triton.language as tl

import gim_kernels
from gim_kernels import triton as kernels
from gim_kernels.triton import device, pointwise_tiles, tiles
from tests.first import first
from tests.gim_kernels.sanitizer import Sanitizer, SanitizerError, sanitize
from tests.gim_kernels.test_attention import PAPERS_RULES, RULES, SOON, in_parts, make
from tests.gim_kernels.test_triton_pointwise import kernel_norm, normal, views

pytestmark = [
    pytest.mark.skipif(not device.interpreted(), reason="compiled kernels are for compute-sanitizer"),
    pytest.mark.usefixtures("fresh_memory_is_nan"),
    pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated"),
    # exp2 may overflow where a softcap saturates or a key is masked: NumPy, which the interpreter is, says so.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

# ---- planted faults


@triton.jit
def copy_kernel(x_ptr: Any, y_ptr: Any, x_size: Any, y_size: Any, stride: Any, block: tl.constexpr) -> None:
    """``y[i] = x[i * stride]``: correct where both sizes are the tensors' and the programs share nothing."""
    i = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(y_ptr + i, tl.load(x_ptr + i * stride, mask=i < x_size, other=0.0), mask=i < y_size)


@triton.jit
def unmasked_kernel(x_ptr: Any, y_ptr: Any, block: tl.constexpr) -> None:
    i = tl.arange(0, block)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@triton.jit
def sum_kernel(x_ptr: Any, y_ptr: Any, place: Any, atomic: tl.constexpr) -> None:
    """Every program adds to, or stores to, ``y[program * place]``."""
    value = tl.load(x_ptr + tl.program_id(0))
    if atomic:
        tl.atomic_add(y_ptr + tl.program_id(0) * place, value)
    else:
        tl.store(y_ptr + tl.program_id(0) * place, value)


@triton.jit
def exchange_kernel(x_ptr: Any, y_ptr: Any, shift: Any, programs: Any) -> None:
    """Stores ``x[program]``, and its double to ``y[(program + shift) % programs]``."""
    program = tl.program_id(0)
    tl.store(y_ptr + (program + shift) % programs, 2.0 * tl.load(x_ptr + program))


@triton.jit
def signal_kernel(flag_ptr: Any, y_ptr: Any, sender: Any) -> None:
    """One program sets a flag by an atomic, the others load it."""
    if tl.program_id(0) == sender:
        tl.atomic_cas(flag_ptr, 0, 1)
    else:
        tl.store(y_ptr + tl.program_id(0), tl.load(flag_ptr))


@triton.jit
def last_stores_kernel(x_ptr: Any, y_ptr: Any, programs: Any) -> None:
    """Every program loads ``x[0]``; the last one stores to ``y[0]``."""
    tl.store(y_ptr, tl.load(x_ptr), mask=tl.program_id(0) == programs - 1)


@triton.jit
def lanes_kernel(y_ptr: Any, values: Any, block: tl.constexpr) -> None:
    """Neighbouring lanes store to one address: the same where ``values`` is 1."""
    i = tl.arange(0, block)
    tl.store(y_ptr + i // 2, i // 2 * 2 + i % 2 * (values - 1))


@triton.jit
def bytes_kernel(x_ptr: Any, y_ptr: Any, first: Any, block: tl.constexpr) -> None:
    """Four-byte loads from byte ``first``, and the bytes of the same."""
    i = tl.arange(0, block)
    pointer = (x_ptr.to(tl.pointer_type(tl.int8)) + first).to(tl.pointer_type(tl.int32))
    narrow = y_ptr.to(tl.pointer_type(tl.int8)) + tl.program_id(0)
    tl.store(narrow + 4 * i, tl.load(pointer + i).to(tl.int8))


@triton.jit
def block_pointer_kernel(x_ptr: Any, y_ptr: Any, size: Any, checked: tl.constexpr, block: tl.constexpr) -> None:
    x = tl.make_block_ptr(x_ptr, (size,), (1,), (0,), (block,), (0,))
    tile = tl.load(x, boundary_check=(0,), padding_option="zero") if checked else tl.load(x)
    tl.store(tl.make_block_ptr(y_ptr, (size,), (1,), (0,), (block,), (0,)), tile, boundary_check=(0,))


@triton.jit
def descriptor_kernel(x_ptr: Any, y_ptr: Any, rows: Any, block: tl.constexpr) -> None:
    x = tl.make_tensor_descriptor(x_ptr, [rows, 16], [16, 1], [block, 16])
    y = tl.make_tensor_descriptor(y_ptr, [rows, 16], [16, 1], [block, 16])
    y.store([0, 0], x.load([0, 0]))


@triton.jit
def foreign_kernel(table_ptr: Any, y_ptr: Any) -> None:
    """Follows an address that lies in memory."""
    tl.store(y_ptr, tl.load(tl.load(table_ptr).to(tl.pointer_type(tl.float32))))


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def rows_with_gaps() -> torch.Tensor:
    """A view whose rows have eight elements, in memory whose rows have ten."""
    return ones(4, 10)[:, :8]


#: What a correct use of each kernel looks like.
CORRECT: dict[str, Callable[[], Any]] = {
    "copy": lambda: copy_kernel[(3,)](ones(20), ones(20), 20, 20, 1, block=8),
    "strided": lambda: copy_kernel[(3,)](ones(20, 3)[:, 1], ones(20), 20, 20, 3, block=8),
    "expanded": lambda: copy_kernel[(3,)](ones(1).expand(20), ones(20), 20, 20, 0, block=8),
    "nothing": lambda: copy_kernel[(1,)](ones(0), ones(0), 0, 0, 1, block=8),
    "unmasked": lambda: unmasked_kernel[(1,)](ones(8), ones(8), block=8),
    "in place": lambda: [exchange_kernel[(4,)](x, x, 0, 4) for x in [ones(4)]],
    "disjoint halves of one tensor": lambda: [unmasked_kernel[(1,)](x[:8], x[8:], block=8) for x in [ones(16)]],
    "read by all": lambda: last_stores_kernel[(3,)](ones(1), ones(1), 3),
    "own place": lambda: sum_kernel[(4,)](ones(4), ones(4), 1, atomic=False),
    "atomics": lambda: sum_kernel[(4,)](ones(4), ones(1), 0, atomic=True),
    "same value twice": lambda: lanes_kernel[(1,)](ones(4, dtype=torch.int32), 1, block=8),
    "bytes": lambda: bytes_kernel[(4,)](ones(4), ones(4), 0, block=4),
    "bytes from the second element": lambda: bytes_kernel[(1,)](ones(5), ones(4), 4, block=4),
    "block pointer": lambda: block_pointer_kernel[(1,)](ones(5), ones(5), 5, checked=True, block=8),
    "descriptor": lambda: descriptor_kernel[(1,)](ones(3, 16), ones(3, 16), 3, block=4),
}
#: ... and what is reported of a wrong one.
FAULTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "read past the end": (
        r"memcheck: copy_kernel, program \(2, 0, 0\): load of 4 bytes outside the elements, at byte offset 80 of "
        r"x_ptr \(float32, shape \(20,\), strides \(1,\)\), 1 lanes",
        lambda: copy_kernel[(3,)](ones(20), ones(20), 21, 20, 1, block=8),
    ),
    "write past the end": (
        r"memcheck: copy_kernel, program \(2, 0, 0\): store of 2 bytes outside the elements, at byte offset 40 of "
        r"y_ptr \(float16, .*, 4 lanes",
        lambda: copy_kernel[(3,)](*[ones(20, dtype=torch.float16)] * 2, 20, 24, 1, block=8),
    ),
    "read before the beginning": (
        r"memcheck: copy_kernel.*: load of 4 bytes .* at byte offset -4 of x_ptr",
        lambda: copy_kernel[(1,)](ones(8), ones(8), 8, 8, -1, block=8),
    ),
    "read past the view": (
        r"memcheck: unmasked_kernel.*: load .* at byte offset 28 of x_ptr",
        lambda: unmasked_kernel[(1,)](ones(20)[:7], ones(8), block=8),
    ),
    "read between the rows of a view": (
        r"memcheck: copy_kernel.*: load .* at byte offset 32 of x_ptr .*strides \(10, 1\)\), 2 lanes",
        lambda: copy_kernel[(1,)](rows_with_gaps(), ones(16), 16, 16, 1, block=16),
    ),
    "read the neighbouring argument": (
        r"memcheck: unmasked_kernel.*: load .* at byte offset 16 of x_ptr",
        lambda: [unmasked_kernel[(1,)](x[:4], x[4:], block=8) for x in [ones(12)]],
    ),
    "read of nothing": (
        r"memcheck: unmasked_kernel.*: load .* at byte offset 0 of x_ptr \(float32, shape \(0,\)",
        lambda: unmasked_kernel[(1,)](ones(0), ones(8), block=8),
    ),
    "atomic past the end": (
        r"memcheck: sum_kernel, program \(2, 0, 0\): atomic of 4 bytes .* at byte offset 8 of y_ptr",
        lambda: sum_kernel[(4,)](ones(4), ones(2), 1, atomic=True),
    ),
    "block pointer without a boundary check": (
        r"memcheck: block_pointer_kernel.*: load .* at byte offset 20 of x_ptr .*, 3 lanes",
        lambda: block_pointer_kernel[(1,)](ones(5), ones(8), 5, checked=False, block=8),
    ),
    "descriptor of too many rows": (
        r"memcheck: descriptor_kernel.*: load .* at byte offset 192 of x_ptr .*, 16 lanes",
        lambda: descriptor_kernel[(1,)](ones(3, 16), ones(4, 16), 4, block=4),
    ),
    "address from memory": (
        r"memcheck: foreign_kernel.*: load of 4 bytes through 0x1000, a pointer made from none of the arguments",
        lambda: foreign_kernel[(1,)](torch.tensor([4096]), ones(1)),
    ),
    "misaligned": (
        r"memcheck: bytes_kernel.*: misaligned load of 4 bytes at byte offset 2 of x_ptr .*, 4 lanes",
        lambda: bytes_kernel[(1,)](ones(5), ones(4), 2, block=4),
    ),
    "one address from two programs": (
        r"racecheck: sum_kernel, program \(1, 0, 0\): store of 4 bytes, after the store of program \(0, 0, 0\), "
        r"at byte offset 0 of y_ptr",
        lambda: sum_kernel[(4,)](ones(4), ones(1), 0, atomic=False),
    ),
    "read what an earlier program writes": (
        r"racecheck: exchange_kernel, program \(1, 0, 0\): load .* after the store of program .* x_ptr",
        lambda: [exchange_kernel[(4,)](x, x, 1, 4) for x in [ones(4)]],
    ),
    "read what a later program writes": (
        r"racecheck: exchange_kernel, program \(1, 0, 0\): store .* after the load of program \(0, 0, 0\), .*y_ptr",
        lambda: [exchange_kernel[(4,)](x, x, 3, 4) for x in [ones(4)]],
    ),
    "write what several programs read": (
        r"racecheck: last_stores_kernel, program \(2, 0, 0\): store .* after the load of several programs, .*y_ptr",
        lambda: [last_stores_kernel[(3,)](x, x, 3) for x in [ones(1)]],
    ),
    "load of what another program's atomic writes": (
        r"racecheck: signal_kernel, program \(1, 0, 0\): load .* after the atomic of program \(0, 0, 0\), .*flag_ptr",
        lambda: signal_kernel[(2,)](ones(1, dtype=torch.int32), ones(2, dtype=torch.int32), 0),
    ),
    "atomic on what another program loads": (
        r"racecheck: signal_kernel, program \(1, 0, 0\): atomic .* after the load of program \(0, 0, 0\), .*flag_ptr",
        lambda: signal_kernel[(2,)](ones(1, dtype=torch.int32), ones(2, dtype=torch.int32), 1),
    ),
    "word of which another program writes a byte": (
        r"racecheck: bytes_kernel, program \(1, 0, 0\): load of 4 bytes, after the store of program .*x_ptr",
        lambda: [bytes_kernel[(2,)](x, x, 0, block=4) for x in [ones(4)]],
    ),
    "two values to one address": (
        r"racecheck: lanes_kernel.*: store of 4 bytes, with different values of two lanes, at byte offset 0 of y_ptr",
        lambda: lanes_kernel[(1,)](ones(4, dtype=torch.int32), 2, block=8),
    ),
    "load of fresh memory": (
        r"initcheck: unmasked_kernel.*: load of NaN at byte offset 0 of x_ptr .*, 8 lanes",
        lambda: unmasked_kernel[(1,)](torch.empty(8), ones(8), block=8),
    ),
}


@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_kernel_is_left_alone(name: str) -> None:
    with sanitize(initcheck=True) as sanitizer:
        CORRECT[name]()
    assert sanitizer.launches.total() == 1


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_reported(name: str) -> None:
    message, launch = FAULTS[name]
    with sanitize(initcheck=True), pytest.raises(SanitizerError, match=message):
        launch()


def test_a_checked_kernel_computes_the_same() -> None:
    x = normal(20, seed=0, dtype=torch.float32)
    plain, checked = torch.zeros(20), torch.zeros(20)
    copy_kernel[(3,)](x, plain, 20, 20, 1, block=8)
    with sanitize():
        copy_kernel[(3,)](x, checked, 20, 20, 1, block=8)
    assert torch.equal(plain, x) and torch.equal(checked, x)
    total = torch.zeros(1)
    with sanitize():
        sum_kernel[(20,)](x, total, 0, atomic=True)
    torch.testing.assert_close(total, x.sum(0, keepdim=True))


def test_a_faulty_store_is_not_carried_out_and_the_next_launch_is_checked_afresh() -> None:
    y = torch.zeros(20)
    with sanitize() as sanitizer:
        for _ in range(2):
            with pytest.raises(SanitizerError, match="memcheck"):
                unmasked_kernel[(1,)](ones(8), y[:4], block=8)
        unmasked_kernel[(1,)](ones(8), y[:8], block=8)
    assert sanitizer.launches == {"unmasked_kernel": 3}
    assert y.sum() == 8
    unmasked_kernel[(1,)](ones(8), y[:4], block=8)  # outside the context nothing is checked


def test_an_error_of_the_kernel_is_not_hidden() -> None:
    with sanitize(), pytest.raises(Exception, match="unsupported operand|NoneType"):
        unmasked_kernel[(1,)](None, ones(8), block=8)


# ---- attention

DTYPES = [torch.float32, torch.float16]
ATTENTION_KERNELS = {"attention_forward_kernel", "grad_query_kernel", "grad_key_value_kernel"}
#: Queries and keys: one row, tiles cut short, whole tiles, a row or two more; more of one than of the other.
LENGTHS = [(1, 1), (1, 130), (63, 128), (111, 111), (111, 63), (128, 128), (128, 1), (130, 111), (130, 130)]
MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": 20, "softcap": 5.0},
    "everything": {"causal": True, "window": 40, "softcap": 2.0, "sinks": True, "key_range": (5, 61)},
}


def with_gaps(x: torch.Tensor) -> torch.Tensor:
    """The same in memory ``[B, T, H, D]`` with NaN before, between and after the rows."""
    batch, heads, length, size = x.shape
    memory = torch.full((batch, length + 2, heads + 2, size + 16), torch.nan, dtype=x.dtype)
    view = memory[:, 1:-1, 1:-1, 8:-8].transpose(1, 2)
    view.copy_(x)
    return view


def packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    """The same as columns of one fused projection, each the neighbour of the next."""
    memory = torch.cat([query, key, value], 1).transpose(1, 2).contiguous()
    heads = [x.shape[1] for x in (query, key, value)]
    return [x.transpose(1, 2) for x in memory.split(heads, 2)]


def check_attention(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    architecture: str = "interpreter",
    layout: str = "gaps",
    needs: tuple[str, ...] = ("query", "key", "value", "sinks"),
    sinks: bool = False,
    key_range: tuple[int, int] | None = None,
    **options: Any,
) -> Sanitizer:
    """Forward and backward with the tiles of ``architecture``; every result must have been written."""
    query, key, value, grad_out = make(*shape, dtype=dtype)
    if layout == "packed":
        query, key, value = packed(query, key, value)
    elif layout == "gaps":
        query, key, value, grad_out = (with_gaps(x) for x in (query, key, value, grad_out))
    tensors = {"query": query, "key": key, "value": value}
    if sinks:
        tensors["sinks"] = torch.linspace(-1, 1, shape[1])
    if key_range is not None:
        # Another range for each row of the batch, one of them past the last key.
        options["key_range"] = torch.tensor([[key_range[0] - b, key_range[1] + b * 100] for b in range(shape[0])]).int()
    leaves = {name: x.detach().requires_grad_(name in needs) for name, x in tensors.items()}
    wanted = [x for x in leaves.values() if x.requires_grad]
    with pytest.MonkeyPatch.context() as patch, sanitize(initcheck=True) as sanitizer:
        patch.setattr(tiles, "architecture_of", lambda x: architecture)
        out = gim_kernels.attention(**leaves, engine="triton", **options)
        grads = torch.autograd.grad(out, wanted, grad_out)
    assert all(bool(x.isfinite().all()) for x in (out, *grads))
    return sanitizer


@pytest.mark.parametrize(
    ("mask", "rule"),
    first(itertools.product(MASKS, RULES), lambda mask, rule: mask in ("plain", "everything") and rule in SOON),
)
def test_attention_under_every_rule_and_mask(mask: str, rule: tuple[str, float]) -> None:
    # Every mask and every rule meets both dtypes and both layouts, not every pair of them.
    other = (list(MASKS).index(mask) + RULES.index(rule)) % 2
    dtype, layout = [(torch.float32, "packed"), (torch.float16, "gaps")][other]
    options = {**MASKS[mask], "softmax_backward": rule[0], "temperature": rule[1]}
    shape = (2 if mask == "everything" else 1, 2, 1, 66, 66, 24)
    seen = check_attention(shape, dtype, layout=layout, **options)
    assert set(seen.launches) == ATTENTION_KERNELS - ({"grad_query_kernel"} if rule[0] == "constant" else set())


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["plain", "everything"])
def test_attention_whose_groups_are_in_parts(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 2)
    options: dict[str, Any] = {**MASKS[mask], "softmax_backward": "temperature"}
    seen = check_attention((2, 8, 2, 66, 66, 24), torch.float16, **options)
    assert seen.launches == dict.fromkeys(ATTENTION_KERNELS, 1) | {"fold_parts_kernel": 2}


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
def test_attention_of_many_lengths(queries: int, keys: int) -> None:
    options: dict[str, Any] = {"causal": queries > 1, "window": 50 if keys == 128 else None}
    seen = check_attention((1, 1, 1, queries, keys, 16), torch.float32, softmax_backward="temperature", **options)
    assert set(seen.launches) == ATTENTION_KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("size", (16, 64, 80, 128, 256))
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("cuda:80", torch.float16), ("cuda:90", torch.float16), ("cuda:80", torch.float32)],
    ids=["sm80-fp16", "sm90-fp16", "fp32"],
)
def test_attention_in_the_tiles_of_a_gpu(architecture: str, dtype: torch.dtype, size: int) -> None:
    shape = (1, 2, 2, 33, 35, size) if dtype == torch.float32 else (1, 1, 1, 130, 133, size)
    rule = "exact" if size == 80 else "temperature"
    seen = check_attention(shape, dtype, architecture=architecture, causal=True, softmax_backward=rule)
    assert set(seen.launches) == ATTENTION_KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("needs", ["query", "key", "value", "sinks"])
@pytest.mark.parametrize(("rule", "temperature"), PAPERS_RULES)
def test_attention_of_one_gradient(rule: str, temperature: float, needs: str) -> None:
    options: dict[str, Any] = {"softmax_backward": rule, "temperature": temperature, "sinks": True}
    check_attention((1, 2, 1, 20, 33, 16), torch.float16, needs=(needs,), causal=True, **options)


@pytest.mark.slow
@settings(max_examples=6, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_attention_of_any_shape_and_option(data: st.DataObject) -> None:
    draw = data.draw
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    queries, keys = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    shape = (draw(st.integers(1, 2)), kv_heads * group, kv_heads, queries, keys, draw(st.integers(1, 40)))
    rule, temperature = draw(st.sampled_from(RULES))
    check_attention(
        shape,
        draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(["gaps", "dense"])),
        sinks=draw(st.booleans()),
        key_range=draw(st.none() | st.tuples(st.integers(0, keys), st.integers(0, keys))),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 80)),
        softcap=draw(st.none() | st.floats(0.5, 30.0)),
        softmax_backward=rule,
        temperature=temperature,
    )


# ---- norms and gated products


def check_norm(x: torch.Tensor, grad_y: torch.Tensor, kind: str, frozen: bool, affine: bool = True) -> None:
    """Forward and backward with every gradient; each result must have been written."""
    weight = torch.linspace(-1, 1, x.shape[-1]).to(x.dtype) if affine else None
    bias = weight if kind == "layer" else None
    with sanitize(initcheck=True) as sanitizer:
        results = kernel_norm(kind, x, weight, bias, grad_y, frozen)
    assert all(bool(t.isfinite().all()) for t in results)
    sums = {"norm_backward_weight_kernel", "fold_kernel"}
    assert set(sanitizer.launches) == {"norm_forward_kernel", "norm_backward_kernel"} | (sums if affine else set())


def check_gated(
    gate: torch.Tensor, up: torch.Tensor, grad_y: torch.Tensor, activation: str, backward: str, needs: tuple[bool, bool]
) -> None:
    """Forward and backward; each result must have been written."""
    with sanitize(initcheck=True) as sanitizer:
        y = kernels.gated_forward(gate, up, activation)
        choice: dict[str, Any] = {"grad_scale": (0.5, 0.25), "activation_backward": backward, "needs": needs}
        grads = kernels.gated_backward(grad_y, gate, up, activation, **choice)
    assert all(bool(t.isfinite().all()) for t in (y, *grads) if t is not None)
    assert sanitizer.launches == {"gated_forward_kernel": 1, "gated_backward_kernel": 1}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("kind", ["rms", "rms1", "layer"])
def test_norms(kind: str, frozen: bool, dtype: torch.dtype) -> None:
    for shape in [(1, 1), (3, 63), (2, 5, 111), (33, 128), (9, 130), (1, 2560)]:
        x, grad_y = (normal(*shape, seed=seed, dtype=dtype) for seed in (0, 1))
        check_norm(x, grad_y, kind, frozen)
    check_norm(x, grad_y, kind, frozen, affine=False)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_in_blocks_of_columns(kind: str, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise_tiles, "WIDEST", 256)
    monkeypatch.setattr(pointwise_tiles, "LOOP", 256)
    for width in (257, 512):
        assert not pointwise_tiles.norm_tile(width).one_pass
        x, grad_y = (normal(3, width, seed=seed, dtype=torch.float32) for seed in (0, 1))
        check_norm(x, grad_y, kind, frozen)


@pytest.mark.slow
def test_weight_gradients_of_many_chunks() -> None:
    count, width = 1050, 5
    assert -(-count // pointwise_tiles.rows_per_chunk(count, width)) > pointwise_tiles.FOLD.rows
    x, grad_y = (normal(count, width, seed=seed, dtype=torch.float32) for seed in (0, 1))
    check_norm(x, grad_y, "rms", frozen=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_frozen_norms_that_kept_no_input(kind: str) -> None:
    for width in (63, 16385):
        grad_y, inverse = normal(5, width, seed=0, dtype=torch.float32), torch.ones(5, 1)
        mean = inverse.new_empty(0) if kind == "layer" else None
        with sanitize(initcheck=True) as sanitizer:
            grads = kernels.norm_backward(
                grad_y, None, None, mean, inverse, 0.0, frozen=True, needs=(True, False, kind == "layer")
            )
        assert all(bool(t.isfinite().all()) for t in grads if t is not None)
        assert sanitizer.launches["norm_backward_kernel"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backward", ["exact", "ratio"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_products(activation: str, backward: str, dtype: torch.dtype) -> None:
    for shape in [(1,), (3, 63), (2, 5, 111), (130, 130), (2, 2500)]:
        gate, up, grad_y = (normal(*shape, seed=seed, dtype=dtype) for seed in (0, 1, 2))
        check_gated(gate, up, grad_y, activation, backward, (True, True))
    for needs in ((True, False), (False, True)):
        check_gated(gate, up, grad_y, activation, backward, needs)


@pytest.mark.slow
@pytest.mark.parametrize("name", views(torch.float32, 0))
def test_views(name: str) -> None:
    x, other = views(torch.float16, 0)[name], views(torch.float16, 1)[name]
    dense = normal(2, 3, 4, 24, seed=2, dtype=torch.float16)
    for grad_y, kind in itertools.product((other, dense), ("rms", "layer")):
        check_norm(x, grad_y, kind, frozen=False)
    for up, grad_y in itertools.product((other, dense), repeat=2):
        check_gated(x, up, grad_y, "silu", "exact", (True, True))


@pytest.mark.slow
@given(
    kind=st.sampled_from(["rms", "layer", "gated"]),
    shape=st.lists(st.integers(1, 6), max_size=3),
    width=st.integers(1, 300),
    gaps=st.lists(st.integers(0, 3), min_size=2, max_size=2),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=15)
def test_pointwise_of_any_shape(kind: str, shape: list[int], width: int, gaps: list[int], dtype: torch.dtype) -> None:
    # Rows that end before the next one starts.
    x, grad_y = (normal(*shape, width + gap, seed=gap, dtype=dtype)[..., gap:] for gap in gaps)
    if kind == "gated":
        check_gated(x, grad_y, x, "gelu", "exact", (True, True))
    else:
        check_norm(x, grad_y, kind, frozen=False)

"""The sanitizer sees faults planted in small kernels, and none in ours."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
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
from tests.gim_kernels.sanitizer import Sanitizer, SanitizerError, sanitize
from tests.gim_kernels.test_attention import RULE_IDS, RULES, differentiate, make
from tests.gim_kernels.test_triton_pointwise import kernel_norm, normal, views

pytestmark = [
    pytest.mark.skipif(not device.interpreted(), reason="compiled kernels are for compute-sanitizer"),
    pytest.mark.usefixtures("fresh_memory_is_nan"),
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
    if checked:
        tile = tl.load(x, boundary_check=(0,), padding_option="zero")
    else:
        tile = tl.load(x)
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
        r"racecheck: exchange_kernel, program \(1, 0, 0\): load .* after the store of program \(0, 0, 0\), at byte .*x_ptr",
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
        r"racecheck: bytes_kernel, program \(1, 0, 0\): load of 4 bytes, after the store of program \(0, 0, 0\), .*x_ptr",
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

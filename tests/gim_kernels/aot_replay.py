"""The C library's own GPU test on a machine without a GPU: its launches are carried out by triton's interpreter.

The build folder of ``CMakeLists.txt`` holds a CUDA driver whose memory is the host's and which hands every launch to a
function. Here that function finds the kernel by its compiled file, reads the parameters the library passed, and runs
the same kernel in the interpreter. So everything is tested but the compiled code: checks, choice of kernel, order and
types of arguments, strides, grids, workspaces. In a process of its own, for the test may end it::

    TRITON_INTERPRET=1 python -m tests.gim_kernels.aot_replay BUILD --head-sizes 16 --dtypes fp16
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import struct
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from gim_kernels.aot.variants import Entry, shipped
from gim_kernels.triton import order

_POINTED = {"*fp32": torch.float32, "*fp16": torch.float16, "*bf16": torch.bfloat16, "*i32": torch.int32}
_NUMBERS: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


def _image_at(address: int) -> bytes:
    """A whole ELF file: its section headers end it."""
    header = ctypes.string_at(address, 64)
    table = int.from_bytes(header[40:48], "little")
    size, count = (int.from_bytes(header[at : at + 2], "little") for at in (58, 60))
    program_table = int.from_bytes(header[32:40], "little")
    program_size, program_count = (int.from_bytes(header[at : at + 2], "little") for at in (54, 56))
    return ctypes.string_at(address, max(table + size * count, program_table + program_size * program_count))


def _described(kind: str, addresses: Iterator[int]) -> TensorDescriptor:
    """The descriptor whose tensor map (see cmake/tests/driver.c), sizes and strides stand at the next addresses."""
    dtype, block = kind.removeprefix("tensordesc<").removesuffix("]>").split("[")
    address, *numbers = struct.unpack("8Q4I2I", ctypes.string_at(next(addresses), 88))
    sizes, strides, box, (number, swizzle) = numbers[3::-1], numbers[6:3:-1], numbers[10:6:-1], numbers[11:]
    strides = [stride // 2 for stride in strides] + [1]
    assert sizes == [ctypes.c_int32.from_address(next(addresses)).value for _ in range(4)]
    assert strides == [ctypes.c_int64.from_address(next(addresses)).value for _ in range(4)]
    shape = [int(n) for n in block.split(",")]
    assert number == {"fp16": 6, "bf16": 9}[dtype] and box[:3] == shape[:3]
    # One copy brings as many columns as the swizzle is wide, and the kernel asks for the next ones.
    assert box[3] == min(shape[3], (16, 32, 64)[swizzle - 1])
    base = torch.frombuffer((ctypes.c_byte * 16).from_address(address), dtype=_POINTED[f"*{dtype}"])
    return TensorDescriptor(base, sizes, strides, shape)


def _check_order(given: dict[str, Any], constants: Mapping[str, Any], grid: int) -> None:
    """Section and members are what the Python launchers hand over where the library was called as it was."""
    query = given["query_ptr"].base if isinstance(given["query_ptr"], TensorDescriptor) else given["query_ptr"]
    width, causal, parted = query.element_size(), constants["CAUSAL"], "members" in given
    length, other, block = ("keys", "queries", "BLOCK_S") if parted else ("queries", "keys", "BLOCK_T")
    tiles = -(-given[length] // constants[block])
    shared_bytes = 2 * given[other] * constants["HEAD_SIZE"] * width
    shared = given["group"]
    if parted:
        parts = given["group"] // given["members"]
        window = given["window"] if given["window"] is not None and given["window"] < given["keys"] else None
        blocks = constants["BLOCK_T"], constants["BLOCK_S"]
        key_heads = grid // tiles // parts
        members = order.members_of(given["queries"], given["keys"], window, causal, *blocks, key_heads, given["group"])
        assert given["members"] == members, f"{given['members']} members, not {members}"
        shared, shared_bytes = 1, members * shared_bytes
    section = order.section_of(tiles, grid // tiles, shared, shared_bytes, causal)
    assert given["section"] == section, f"section {given['section']}, not {section}"


class Replay:
    """Runs launches of a build folder's kernels; ``launched`` counts them by key."""

    def __init__(self, folder: Path, target: str, head_sizes: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        entries = {(entry.key, entry.limit): entry for entry in shipped(target, head_sizes, dtypes)}
        self.kernels: dict[bytes, tuple[Entry, dict[str, Any]]] = {}
        for path in sorted((folder / target.replace(":", "_")).glob("*.json")):
            described = json.loads(path.read_text())
            entry = entries[described["key"], described["limit"]]
            self.kernels[path.with_suffix(".bin").read_bytes()] = (entry, described)
        self.launched: dict[str, int] = {}

    def launch(self, image: int, symbol: bytes, grid: int, block: int, shared: int, parameters: Any) -> int:
        """What the driver calls; a CUresult."""
        try:
            entry, described = self.kernels[_image_at(image)]
            assert symbol.decode() == described["symbol"]
            assert (block, shared) == (32 * described["warps"], described["shared"])
            self._run(entry, grid, parameters)
            self.launched[entry.key] = self.launched.get(entry.key, 0) + 1
        except Exception:
            traceback.print_exc()
            return 1
        return 0

    def _run(self, entry: Entry, grid: int, parameters: Any) -> None:
        variant = entry.variant
        given: dict[str, Any] = dict(variant.constants)
        kinds = [(name, kind) for name, kind in variant.signature.items() if kind != "constexpr"]
        addresses = iter(parameters[index] for index in itertools.count())
        for name, kind in kinds:
            if kind.startswith("tensordesc"):
                given[name] = _described(kind, addresses)
                continue
            address = next(addresses)
            number = _NUMBERS.get(kind, ctypes.c_uint64).from_address(address).value
            assert name not in variant.divisible or number % 16 == 0, f"{name} is not aligned"
            if kind in _POINTED:
                assert number, f"{name} is NULL"
                given[name] = torch.frombuffer((ctypes.c_byte * 16).from_address(number), dtype=_POINTED[kind])
            else:
                given[name] = number
        if "section" in given:
            _check_order(given, variant.constants, grid)
        variant.kernel[(grid,)](**given)


def main() -> int:
    """Run the test of the build folder; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("--target", default="cuda:90:32")
    parser.add_argument("--head-sizes", default="16")
    parser.add_argument("--dtypes", default="fp16")
    given = parser.parse_args()
    sizes = tuple(int(size) for size in given.head_sizes.split(";"))
    replay = Replay(given.build / "kernels", given.target, sizes, tuple(given.dtypes.split(";")))
    driver = ctypes.CDLL(str(given.build / "cmake/tests/driver/libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    function = ctypes.CFUNCTYPE(
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.POINTER(ctypes.c_void_p),
    )
    on_launch = function(replay.launch)
    driver.gim_test_driver(on_launch, int(given.target.split(":")[1]), 1)
    status: int = ctypes.CDLL(str(given.build / "cmake/tests/libgim_launch_replay.so")).main()
    ctypes.CDLL(None).fflush(None)
    sys.stdout.write(json.dumps(replay.launched) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())

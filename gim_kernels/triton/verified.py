"""On which devices a variant has been held against the reference before: ``verified.json``.

The table is a list of objects with a device's name, a version of triton, a fingerprint of the kernels' sources, and the
names of the variants that were right there. An entry counts for that device, that triton and those sources alone.
``make gpu`` writes such a table from what it ran.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import torch
import triton

TABLE = Path(__file__).with_name("verified.json")


@functools.cache
def fingerprint() -> str:
    """Changes with any source of the kernels and their launchers."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def device_name(index: int) -> str:
    """The name of a GPU; of the interpreter for -1, which is where tensors on a CPU are."""
    return "triton's interpreter" if index < 0 else torch.cuda.get_device_name(index)


def entry(index: int, variants: list[str]) -> dict[str, object]:
    """A row of the table that says that these variants are right on a device."""
    where = {"device": device_name(index), "triton": triton.__version__, "kernels": fingerprint()}
    return {**where, "variants": sorted(variants)}


@functools.cache
def on_device(index: int) -> frozenset[str]:
    """The variants verified on a device before, with these kernels and this triton."""
    here = entry(index, [])
    rows = [row for row in json.loads(TABLE.read_text()) if row | {"variants": []} == here]
    return frozenset(name for row in rows for name in row["variants"])

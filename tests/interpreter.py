"""Triton's interpreter with the same numbers in a third of the time, and a check more.

A launch puts functions that compute with NumPy in the place of triton's language, for as long as it runs; each call of
a function in the kernel does so again, to the same modules. The table of NumPy's types is made anew for each tensor.
And whether a sum or product of whole numbers overflows is computed by eight operations of the language, and then nobody
is told; here three of NumPy's tell.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

#: What is changed, and how it comes.
AS_IT_COMES = [
    (owner, name, getattr(owner, name))
    for owner, name in (
        (interpreter, "_patch_lang"),
        (interpreter._LangPatchScope, "restore"),
        (interpreter, "_get_np_dtype"),
        (TritonSemantic, "binary_op_sanitize_overflow_impl"),
    )
]
OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def refuse_overflow(semantic: Any, left: Any, right: Any, operation: Any) -> None:
    """Raise where ``operation`` of two tensors of one type of whole numbers leaves that type."""
    kind = left.type.scalar
    if kind.int_bitwidth >= 64 or not semantic.builder.options.sanitize_overflow:
        return
    name = operation.__name__
    exact = OPERATIONS[name](left.handle.data.astype(np.int64), right.handle.data.astype(np.int64))
    fits = (exact <= kind.get_int_max_value()) & (exact >= kind.get_int_min_value())
    assert fits.all(), f"int{kind.int_bitwidth} overflow detected for operation {name}"


@contextlib.contextmanager
def without_repetition() -> Iterator[None]:
    """Inside, the interpreter does what it does once."""
    patch, restore, kind, _ = (original for _, _, original in AS_IT_COMES)
    kinds, patched = functools.cache(kind), set[tuple[bool, ...]]()

    def patch_once(function: Any) -> Any:
        names = function.__globals__.values()
        here = tuple(any(one is module for one in names) for module in (tl, tl.core))
        if here in patched:
            return None  # a call in a kernel, which looks at nothing that comes back
        patched.add(here)
        return patch(function)

    def restore_all(scope: Any) -> None:
        restore(scope)
        patched.clear()

    def kind_of(given: Any) -> Any:
        return kinds(tl.uint64 if isinstance(given.scalar, tl.pointer_type) else given.scalar)

    with contextlib.ExitStack() as patches:
        for (owner, name, _), new in zip(AS_IT_COMES, (patch_once, restore_all, kind_of, refuse_overflow), strict=True):
            patches.enter_context(mock.patch.object(owner, name, new))
        yield

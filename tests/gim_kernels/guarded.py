"""Operators on tensors that lie against memory nobody may touch: a read outside a tensor ends the process.

``python -m tests.gim_kernels.guarded FIRST END`` runs the draws of these seeds; ``... beyond`` reads one element too
many on purpose.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

from tests.gim_kernels.attention_draws import differentiate, draw

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def guarded(x: torch.Tensor, at_end: bool) -> torch.Tensor:
    """``x`` with its memory copied between two pages without any rights, flush with the last or the first."""
    nbytes = x.untyped_storage().nbytes()
    inside = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, inside + 2 * mmap.PAGESIZE)
    offset = mmap.PAGESIZE + (inside - nbytes if at_end else 0)
    flat = torch.frombuffer(memory, dtype=x.dtype, count=nbytes // x.itemsize, offset=offset)
    flat.copy_(x.as_strided((flat.numel(),), (1,), 0))
    start = flat.data_ptr() - offset
    libc = ctypes.CDLL(None, use_errno=True)
    for page in (start, start + mmap.PAGESIZE + inside):
        if libc.mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, 0) != 0:  # PROT_NONE
            raise OSError(ctypes.get_errno(), "mprotect")
    return flat.as_strided(x.shape, x.stride(), x.storage_offset())


def pointwise(tensors: dict[str, torch.Tensor]) -> None:
    """Norms and the gated product, forward and backward, on tensors of any strides."""
    import gim_kernels

    x, grad, weight = tensors["query"], tensors["grad_out"], tensors["key"][0, 0, 0]
    for function, leaves in (
        (lambda x, weight: gim_kernels.rms_norm(x, weight, 1e-5), (x, weight)),
        (lambda x, weight: gim_kernels.layer_norm(x, weight, weight, 1e-5), (x, weight)),
        (lambda gate, up: gim_kernels.gated(gate, up, "gelu"), (x, grad)),
    ):
        given = [leaf.detach().requires_grad_(True) for leaf in leaves]
        torch.autograd.grad(function(*given), given, grad)


def main(arguments: list[str]) -> None:
    """Run the draws ``FIRST`` to ``END``, each at either end of its memory."""
    torch.set_num_threads(1)
    if arguments == ["beyond"]:
        x = guarded(torch.zeros(8), at_end=True)
        ctypes.string_at(x.data_ptr() + x.nbytes, 1)
        return
    import gim_kernels

    for seed in range(int(arguments[0]), int(arguments[1])):
        given = draw(seed, DTYPES)
        for at_end in (True, False):
            tensors = {name: guarded(x, at_end) for name, x in given.tensors.items()}
            differentiate(gim_kernels.attention, tensors, **given.options, engine="blockwise")
            pointwise(tensors)
    print("read nothing outside")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])

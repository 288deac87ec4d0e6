"""Which variants are built ahead of time, and the names by which the library's launcher asks for them."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from gim_kernels.triton import gated, norm, norm_weight, pointwise_tiles, tiles
from gim_kernels.triton.attention_fold import fold_parts_variant
from gim_kernels.triton.attention_grad_key_value import grad_key_value_variant
from gim_kernels.triton.attention_grad_query import grad_query_variant
from gim_kernels.triton.attention_out import forward_variant

#: What a build holds unless it is told otherwise.
TARGETS = ("cuda:80:32", "cuda:90:32")
HEAD_SIZES = (64, 80, 96, 128, 192, 256)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: What can hide a key, by what a variant must know of it. ``plain``: causality alone. ``general``: a window, a key
#: range and sinks, each of which the launcher can make neutral. ``softcap``: ``general`` with a softcap, which cannot
#: be neutral. float32 is there to check the others: it has no ``plain`` of its own and runs as ``general``.
MASKS = ("plain", "general", "softcap")
#: Rules of the query kernel. The key kernel does not tell ``sharp`` from ``warm``.
RULES = ("exact", "square", "warm", "sharp")
#: Rules that variants with a softcap know; all of those are causal.
SOFTCAP_RULES = ("exact", "square")
#: Rules that ``plain`` variants know: the others run as ``general``.
PLAIN_RULES = ("exact", "square")
#: Widths of norms whose tiles are built, the widest for every wider row too: fewer tiles than the launchers have.
NORM_WIDTHS = (128, 1024, 4096, 8192, 32768)
#: More columns than any row has.
UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class Entry:
    """A variant of the library.

    Args:
        key: what the library's launcher asks for, e.g. ``"attention_forward/bf16/128/causal/plain"``.
        limit: the most columns it takes; of several with one key the first that is wide enough is used.
        variant: a :class:`gim_kernels.triton.tiles.Variant`.
    """

    key: str
    limit: int
    variant: tiles.Variant

    @property
    def path(self) -> str:
        """The key, and the limit where there is one: what patterns select by."""
        return self.key if self.limit == UNLIMITED else f"{self.key}/{self.limit}"

    @property
    def stem(self) -> str:
        """Name of its files in a build folder: of the entry, whatever tile it got."""
        return self.path.replace("/", "-")


def parse_target(target: str) -> tuple[str, int | str, int]:
    """Backend, architecture and warp size of ``"cuda:90:32"`` or ``"hip:gfx942:64"``.

    Raises:
        ValueError: another form.
    """
    parts = target.split(":")
    if len(parts) != 3 or parts[0] not in ("cuda", "hip") or not parts[2].isdigit():
        raise ValueError(f"a target must look like cuda:90:32 or hip:gfx942:64, got {target!r}")
    backend, architecture, warp_size = parts
    if backend == "cuda" and not architecture.isdigit():
        raise ValueError(f"a CUDA target must look like cuda:90:32, got {target!r}")
    return backend, int(architecture) if backend == "cuda" else architecture, int(warp_size)


def attention(architecture: str, head_size: int, dtype: str) -> Iterable[Entry]:
    """Those of attention for an architecture as :func:`gim_kernels.triton.tiles.architecture_of` gives it."""
    kind = DTYPES[dtype]
    yield Entry(f"attention_fold/{dtype}/{head_size}", UNLIMITED, fold_parts_variant(kind, head_size))
    for causal in (True, False):
        for mask in MASKS:
            if (mask == "plain" and dtype == "fp32") or (mask == "softcap" and not causal):
                continue
            general, capped = mask != "plain", mask == "softcap"
            where = f"{dtype}/{head_size}/{'causal' if causal else 'full'}/{mask}"
            common = {"window": general, "softcap": capped, "key_range": general}
            sinks = torch.float32 if general else None
            arguments = (architecture, kind, head_size)
            # The library's tensors are aligned, but a key range wants pointers.
            common["described"] = not general and dtype != "fp32" and architecture in tiles.DESCRIBED
            pair = tiles.attention_tile("grad_key_value", architecture, head_size, kind, capped, common["described"])
            together = not pair.split
            yield Entry(
                f"attention_forward/{where}",
                UNLIMITED,
                forward_variant(*arguments, causal, **common, sinks=sinks),
            )
            yield Entry(
                f"attention_grad_value/{where}",
                UNLIMITED,
                grad_key_value_variant(*arguments, "constant", causal, **common, grad_key=False),
            )
            for rule in {"plain": PLAIN_RULES, "general": RULES, "softcap": SOFTCAP_RULES}[mask]:
                yield Entry(
                    f"attention_grad_query/{where}/{rule}",
                    UNLIMITED,
                    grad_query_variant(*arguments, rule, causal, **common, sinks=sinks),
                )
                if rule != "sharp":
                    yield Entry(
                        f"attention_grad_key{'_value' if together else ''}/{where}/{rule}",
                        UNLIMITED,
                        grad_key_value_variant(*arguments, rule, causal, **common, grad_value=together),
                    )


def norms(dtype: str) -> Iterable[Entry]:
    """Those of the norms."""
    kind = DTYPES[dtype]
    for width in NORM_WIDTHS:
        tile, limit = pointwise_tiles.norm_tile(width), width if width < NORM_WIDTHS[-1] else UNLIMITED
        for name, centre, bias in (
            ("rms", False, None),
            ("layer", True, None),
            ("layer_bias", True, kind),
        ):
            variant = norm.forward_variant(tile, kind, kind, bias, centre, True)
            yield Entry(f"norm_forward/{dtype}/{name}", limit, variant)
        for name, centre in (("rms", False), ("layer", True)):
            for statistic, x in (("live", kind), ("frozen", None)):
                variant = norm.backward_variant(tile, kind, x, kind, centre, True)
                yield Entry(f"norm_backward/{dtype}/{name}/{statistic}", limit, variant)
    for name, centre in (("rms", False), ("layer", True)):
        variant = norm_weight.backward_weight_variant(kind, kind, centre, centre, True)
        yield Entry(f"norm_backward_weight/{dtype}/{name}", UNLIMITED, variant)


def gated_products(dtype: str) -> Iterable[Entry]:
    """Those of the gated products."""
    kind, tile = DTYPES[dtype], pointwise_tiles.gated_tile(pointwise_tiles.ELEMENTS_PER_PROGRAM)
    for activation in gated.ACTIVATIONS:
        variant = gated.forward_variant(tile, kind, activation, True)
        yield Entry(f"gated_forward/{dtype}/{activation}", UNLIMITED, variant)
        for backward in ("exact", "ratio"):
            variant = gated.backward_variant(tile, kind, activation, backward, (True, True), True)
            yield Entry(f"gated_backward/{dtype}/{activation}/{backward}", UNLIMITED, variant)


@functools.cache
def shipped(
    target: str,
    head_sizes: Sequence[int] = HEAD_SIZES,
    dtypes: Sequence[str] = tuple(DTYPES),
    only: Sequence[str] = ("*",),
) -> tuple[Entry, ...]:
    """The variants built for a target, sorted by key and limit.

    Args:
        target: as :func:`parse_target` takes it.
        head_sizes: of attention, multiples of 16 up to 256.
        dtypes: names among :data:`DTYPES`.
        only: patterns of what to keep, by :attr:`Entry.path`.

    Raises:
        ValueError: a target, head size or dtype that is none, or nothing left.
    """
    backend, architecture, _ = parse_target(target)
    for size in head_sizes:
        if size % 16 or not 16 <= size <= 256:
            raise ValueError(f"head sizes must be multiples of 16 from 16 to 256, got {size}")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtypes must be among {tuple(DTYPES)}, got {dtype!r}")
    entries = [Entry("fold", UNLIMITED, norm_weight.fold_variant())]
    for dtype in dtypes:
        entries += [*norms(dtype), *gated_products(dtype)]
        for size in head_sizes:
            entries += attention(f"{backend}:{architecture}", size, dtype)
    kept = [entry for entry in entries if any(fnmatch.fnmatchcase(entry.path, p) for p in only)]
    if not kept:
        raise ValueError(f"no variant matches {tuple(only)}")
    return tuple(sorted(kept, key=lambda entry: (entry.key, entry.limit)))

"""What kind of operator each is, by its name: all that the watch knows of libraries."""

from __future__ import annotations

import re
from typing import Any

import torch

#: Kinds of operators by their names; every other operator is taken to act number by number.
KINDS = {
    name: kind
    for kind, names in {
        "blank": "empty empty_like empty_strided new_empty new_empty_strided",
        "from python": "lift_fresh",
        "fresh": "zeros_like ones_like full_like new_zeros new_ones new_full zero fill",
        "same": "view _unsafe_view _reshape_alias reshape t transpose permute expand unsqueeze squeeze clone alias "
        "detach _to_copy contiguous movedim view_as_complex view_as_real _conj",
        "piece": "slice select split split_with_sizes unbind as_strided diagonal index gather index_select unfold roll "
        "flip topk sort constant_pad_nd repeat masked_select tril triu",
        "linear": "mm addmm bmm baddbmm mv addmv dot linear convolution cumsum _trilinear _cdist_forward _fft_r2c "
        "_fft_c2r _fft_c2c",
        "reduction": "mean sum amax amin max min logsumexp prod cumprod norm linalg_vector_norm var std var_mean "
        "std_mean avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d max_pool2d_with_indices "
        "max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d",
        "softmax": "_softmax _safe_softmax _log_softmax _masked_softmax",
        "join": "cat stack",
        "product": "mul addcmul div addcdiv xlogy special_xlog1py",
        "gated product": "glu",
        "norm": "native_layer_norm _fused_rms_norm renorm native_group_norm native_batch_norm _native_batch_norm_legit",
        "random": "bernoulli bernoulli_ uniform rand rand_like normal randn randn_like native_dropout",
        "copy": "copy",
    }.items()
    for name in names.split()
}
_SEEN_INTO = {"aten", "prim", "prims", "profiler", "_c10d_functional", "c10d_functional", "quantized_decomposed"}
_FUSED = re.compile("scaled_dot_product|flash_att|flex_attention|multi_head_attention|encoder_layer_fwd")
#: Matrix products of any library, quantised ones too, and what quantises and dequantises around them.
_MATRIX = re.compile(r"(mm|matmul|linear|gemm|gemv|bgemm)(_|\d|$)|_mm_|^_?linear|mm_fallback")
_QUANTISED = re.compile("quant|choose_qparams")
#: Of operators made of others, which come whole where autograd is left out, as in inference mode.
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
#: In the name of a library's operator, that it may hold a part that a rule is about.
_RULED = re.compile("norm|silu|gelu|glu|softmax|att|gate|dropout|mlp|moe|expert")
#: Operators of torch that hold gates nobody can see.
_RECURRENT = re.compile("lstm|gru|rnn")
LOOKUP = {"embedding", "index", "index_select", "gather", "_embedding_bag"}
MATRIX_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"}
AFFINE = {"add", "sub", "rsub", "where", "neg", "masked_fill", "lerp"}
#: What writes into places that a tensor or numbers say, several into one.
SCATTERS = {"index_add", "index_put", "scatter", "scatter_add", "scatter_reduce", "index_reduce", "segment_reduce"}
AFFINE |= {*SCATTERS, "index_copy", "slice_scatter", "select_scatter", "masked_scatter"}
POWERS = {"norm", "linalg_vector_norm", "var", "std", "var_mean", "std_mean", "logsumexp"}  # nonlinear in themselves
CLIPS = {"maximum", "minimum", "fmax", "fmin"}
TURNS = {"t", "transpose", "permute", "movedim"}
EXTREMES = {"amax", "amin", "max", "min", "max_pool2d_with_indices", "max_pool3d_with_indices"}
EXTREMES |= {"adaptive_max_pool2d", "adaptive_max_pool3d"}
#: Products whose last factor is bent by the operator itself.
QUOTIENTS = {"div", "addcdiv", "xlogy", "special_xlog1py"}


def may_lack_gradient(kind: str, name: str) -> bool:
    """Whether an operator is taken for a linear map, or a part of one, by its name alone: torch gives those of its own
    that are common a gradient, and of others nobody knows."""
    return kind in ("linear", "same") and name not in KINDS


def describe(func: Any) -> tuple[str, str]:
    """The kind of an operator, and its name without what overload it is and whether it writes in place."""
    space, _, name = (getattr(func, "_name", None) or str(func)).split(".")[0].rpartition("::")
    base = name if name.startswith("__") else name.rstrip("_").removesuffix("_copy") or name
    base = "_to_copy" if base == "_to" else base
    if space == "gim_kernels":
        return "own", name
    if isinstance(func, torch._ops.OpOverload) and func.has_kernel_for_dispatch_key(_COMPOSITE):
        return "composite", base
    if _FUSED.search(name):
        return "softmax over keys", name
    if base in KINDS and space in _SEEN_INTO:
        return KINDS[base], base
    if not _RULED.search(name) and _MATRIX.search(name):
        return "linear", base
    if not _RULED.search(name) and _QUANTISED.search(name + space):
        return "same", base
    if space not in _SEEN_INTO or _RECURRENT.search(name) or name.startswith("_foreach_"):
        return "opaque operator", f"{space}::{name}" if space else name
    if base == "exp2" or str(func) == "aten.pow.Scalar":  # a number to the power of a tensor
        return "pointwise", "exp"
    return "pointwise", base

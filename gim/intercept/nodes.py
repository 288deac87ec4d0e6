"""What a node of autograd's graph does, by its name and by what it has saved."""

from __future__ import annotations

from typing import Any

#: Kinds of nodes by what comes before ``Backward`` in their names; every other node of torch acts number by number.
_KINDS = {
    kind: frozenset(names.split())
    for kind, names in {
        "same": "View UnsafeView ReshapeAlias T Transpose Permute Expand Unsqueeze Squeeze Alias Clone ToCopy _ToCopy "
        "ScaleGradient Contiguous MvNumpyT Lift Tril Triu Movedim SwapAxes Unflatten Flatten Detach Conj Real "
        "ViewAsComplex ViewAsReal",
        "piece": "Slice Select Split SplitWithSizes Unbind Index IndexSelect Gather Narrow Diagonal AsStrided Unfold "
        "Flip Roll Topk Sort MaskedSelect Take ConstantPadNd Repeat ReflectionPad1D",
        "linear": "Mm Addmm Bmm Baddbmm Mv Addmv Dot Linear Convolution MkldnnLinear GroupedMm ScaledGroupedMm "
        "ScaledMm Addbmm EmbeddingBag",
        "source": "Embedding",
        "reduction": "Mean Sum Amax Amin Max Min Logsumexp Prod Norm LinalgVectorNorm Var Std VarMean StdMean Median "
        "Nansum AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D MaxPool2DWithIndices MaxPool3DWithIndices "
        "AdaptiveMaxPool2D AdaptiveMaxPool3D",
        "softmax": "Softmax SafeSoftmax LogSoftmax",
        "join": "Cat Stack CopySlices IndexPut IndexCopy SliceScatter SelectScatter Copy IndexAdd MaskedScatter "
        "ScatterAdd Scatter",
        "product": "Mul Div Addcmul Addcdiv",
        "norm": "NativeLayerNorm FusedRmsNorm NativeGroupNorm NativeBatchNorm CudnnBatchNorm",
        "attention": "ScaledDotProductFlashAttention ScaledDotProductFlashAttentionForCpu "
        "ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention ScaledDotProductFusedAttentionOverrideable "
        "FlashAttention EfficientAttention",
    }.items()
}
#: The package's own operators, by what their nodes are called.
_OWN = {"attention": "attention", "rms_norm": "norm", "layer_norm": "norm", "gated": "product"}
#: The class that all nodes share which other libraries have written in C++; all others have one by their own name.
_UNKNOWN = "CppFunction"
_known: dict[str, tuple[str, str]] = {}


def kind_of(node: Any) -> tuple[str, str]:
    """A node's kind and short name."""
    cls = type(node)
    found = _known.get(cls.__name__)
    if found is None:
        # Of the class, for a function of somebody's own may have given it another meaning on its node.
        found = _classify(cls.name(node))
        if cls.__name__ != _UNKNOWN:
            _known[cls.__name__] = found
    return found


def _classify(full: str) -> tuple[str, str]:
    own = full.removeprefix("gim_kernels_").removesuffix("Backward")
    if full != own and own in _OWN:
        return _OWN[own], own
    short = full.rpartition("::")[2]
    if short == "AccumulateGrad":
        return "leaf", short
    if short == "CopySlices":
        return "join", short
    if short == "BackwardHookFunctionBackward":
        return "each", short  # of torch's full backward hooks: what came in, as it came in
    name, mark, version = short.partition("Backward")
    name = name.lstrip("_")
    if name == "ScaleGradient":
        return "same", name
    if not mark or not version.isdigit():
        return "opaque", name  # a function of somebody's own, or of another library
    if "Attention" in name:
        return "attention", name
    return next((kind for kind, names in _KINDS.items() if name in names), "pointwise"), name


#: What tells what a node does from what others of its name do; where that is a tensor, only its own number does.
WHERE: dict[str, tuple[str, ...]] = {
    "Slice": ("dim", "start", "end", "step"),
    "Select": ("dim", "index"),
    "Split": ("dim",),
    "SplitWithSizes": ("dim",),
    "Unbind": ("dim",),
    "Flip": ("dims",),
    "AsStrided": ("size", "stride", "storage_offset"),
    "Diagonal": ("offset", "dim1", "dim2"),
    "Repeat": ("repeats",),
    "Roll": ("dims", "shifts"),
    "ConstantPadNd": ("pad",),
    "Unfold": ("dimension", "size", "step"),
    **dict.fromkeys(("Cat", "Stack"), ("dim",)),
    **dict.fromkeys(("Silu", "Relu", "Sigmoid", "Tanh", "Exp", "Mish", "LogSigmoid", "Hardswish", "Erf"), ()),
    **dict.fromkeys(("Abs", "Sqrt", "Rsqrt", "Neg"), ()),
    "Gelu": ("approximate",),
    "Pow": ("exponent",),
    "LeakyRelu": ("negative_slope",),
    "Elu": ("alpha", "scale", "input_scale"),
    "Celu": ("alpha",),
    "Softplus": ("beta", "threshold"),
    "Hardtanh": ("min_val", "max_val"),
}


def in_words(node: Any, name: str, output: int) -> tuple[Any, ...] | None:
    """What a node does to its inputs, in words; None where that is not known."""
    where = WHERE.get(name)
    return None if where is None else (name, output, *(str(getattr(node, f"_saved_{one}")) for one in where))

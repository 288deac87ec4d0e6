"""The operators as Triton kernels for tensors on a GPU; names and signatures are those of the other engines."""

from gim_kernels.triton.attention_grad import attention_backward
from gim_kernels.triton.attention_out import attention_forward
from gim_kernels.triton.gated import gated_backward, gated_forward
from gim_kernels.triton.norm import layer_norm_forward, norm_backward, rms_norm_forward

__all__ = [
    "attention_backward",
    "attention_forward",
    "gated_backward",
    "gated_forward",
    "layer_norm_forward",
    "norm_backward",
    "rms_norm_forward",
]

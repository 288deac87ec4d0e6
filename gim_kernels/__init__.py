"""Kernels with GIM backward rules; every default is the ordinary gradient."""

from gim_kernels.attention import attention
from gim_kernels.gated import gated
from gim_kernels.norm import layer_norm, rms_norm
from gim_kernels.sdpa import scaled_dot_product_attention

__all__ = ["attention", "gated", "layer_norm", "rms_norm", "scaled_dot_product_attention"]

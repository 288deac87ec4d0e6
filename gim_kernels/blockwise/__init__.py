"""Attention in O(T) memory in plain PyTorch: what runs wherever there is no GPU.

A block of queries holds all the keys it sees, so one softmax row is always whole: the backward needs no second
pass for its row sums and does five matrix products, as many as the ordinary gradient. Key and query ranges that
the mask leaves empty are never visited. Only the output and one log-sum-exp per row are kept between the passes.
"""

from gim_kernels.blockwise.backward import attention_backward, backward_workspace
from gim_kernels.blockwise.forward import attention_forward, forward_workspace, runs_torchs_kernel

__all__ = [
    "attention_backward",
    "attention_forward",
    "backward_workspace",
    "forward_workspace",
    "runs_torchs_kernel",
]

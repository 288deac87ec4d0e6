"""How the backward's memory is spent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gim.context import decoder_layers, refuse_when_closed
from gim.patches.session import Session, session_of

Checkpoint = Literal["none", "layer"]
CHECKPOINTS: tuple[Checkpoint, ...] = get_args(Checkpoint)

#: Share of the free memory that activations may take before layers are checkpointed.
AUTO_SHARE = 0.5


@dataclass(frozen=True)
class MemoryPlan:
    """What is kept between the forward and the backward.

    Args:
        checkpoint: ``"none"`` keeps every layer's activations: the fastest. ``"layer"`` keeps each decoder layer's
            input and runs the layer again in the backward: about a third more time, the least memory.

    Raises:
        ValueError: a name that is not a plan.
    """

    checkpoint: Checkpoint = "none"

    def __post_init__(self) -> None:
        if self.checkpoint not in CHECKPOINTS:
            raise ValueError(f"checkpoint must be one of {CHECKPOINTS}, got {self.checkpoint!r}")

    def describe(self) -> str:
        """One word or two for a report."""
        return "every activation kept" if self.checkpoint == "none" else "a checkpoint at each layer"


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device, in bytes; None where it cannot be told."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    for line in meminfo.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def activation_bytes(model: nn.Module, tokens: int) -> int | None:
    """Bytes that the activations of all layers take when none is checkpointed, weights and norms frozen.

    A layer keeps its queries, keys and values, attention's output and log-sum-exp, and the two branches of its MLP:
    what the operators of this package save. None where the config does not tell the sizes.

    Args:
        model: a Hugging Face model.
        tokens: batch times length.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = getattr(config, "hidden_size", None)
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(hidden, int) or not isinstance(heads, int) or not isinstance(layers, int):
        return None
    size = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    numbers = 2 * heads * size + 2 * kv_heads * size + 2 * inner
    dtype = next(model.parameters()).dtype
    return tokens * layers * (numbers * dtype.itemsize + 4 * heads)


def resolve(memory: MemoryPlan | str, model: nn.Module, tokens: int, device: torch.device) -> MemoryPlan:
    """The plan that an argument ``memory`` means.

    ``"auto"`` keeps all activations where they take at most :data:`AUTO_SHARE` of the device's free memory, and
    checkpoints each layer elsewhere, or where it cannot be told.

    Raises:
        ValueError: neither a plan nor the name of one.
    """
    if isinstance(memory, MemoryPlan):
        return memory
    if memory in CHECKPOINTS:
        return MemoryPlan(memory)
    if memory != "auto":
        raise ValueError(f"memory must be a MemoryPlan, 'auto' or one of {CHECKPOINTS}, got {memory!r}")
    free, need = free_bytes(device), activation_bytes(model, tokens)
    fits = free is not None and need is not None and need <= AUTO_SHARE * free
    return MemoryPlan("none" if fits or not decoder_layers(model) else "layer")


@contextmanager
def applied(plan: MemoryPlan, model: nn.Module) -> Iterator[None]:
    """Inside, the model's layers spend memory by the plan. Must be inside a GIM context.

    A layer is wrapped on its instance and its training flag is left alone, so that dropout stays off.

    Raises:
        ValueError: a checkpoint for each layer is asked for and the model has no list of layers.
    """
    layers = decoder_layers(model)
    if plan.checkpoint == "none":
        yield
        return
    if not layers:
        raise ValueError(
            f'memory="layer" needs a list of layers, and {type(model).__name__} has no ModuleList whose entries '
            "all contain attention"
        )
    session = session_of(model)
    if session is None:
        raise RuntimeError("a memory plan is applied inside a GIM context only")
    inner = Session(session.rules, session.strict)
    try:
        for name, layer in layers:
            inner.replace_forward(layer, _checkpointed(layer, name, session))
        yield
    finally:
        inner.close()


def _checkpointed(layer: nn.Module, name: str, session: Session) -> Any:
    forward = refuse_when_closed(layer.forward, name, session)

    def run(*inputs: Any, **named: Any) -> Any:
        # The random state is not kept: dropout is refused, so nothing in a layer is random.
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **named)

    return run

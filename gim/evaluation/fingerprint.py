"""What a result depends on, in a form that two runs can be compared by."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gim.evaluation.data import Kept
from gim.parts import anatomy

#: Packages whose versions a result depends on.
PACKAGES = ("gim-kernels", "torch", "transformers", "triton", "captum", "scikit-learn")
#: Numbers of each weight whose places count too.
SAMPLED = 4096
#: Bytes of a weight that are summed at once.
SUMMED = 2**20


def versions() -> dict[str, str]:
    """The version of each package that is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def name_of(model: nn.Module) -> str:
    """A model's class and the last part of where it came from: a path on somebody's disk is nobody's business."""
    path = str(getattr(anatomy.of(model).config, "_name_or_path", "") or "").rstrip("/").rpartition("/")[2]
    return type(model).__name__ + (f" ({path})" if path else "")


def of_model(model: nn.Module) -> str:
    """A digest of a model's class, config and weights.

    Of each weight and buffer: name, shape, dtype, the sum of all of its bytes, and some thousand of them in their
    order. So a change of any one number is seen.
    """
    digest = hashlib.sha256(type(model).__qualname__.encode())
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        fields = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
        digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        if not isinstance(weight, torch.Tensor):  # a module's own extra state
            digest.update(f"{name} {weight!r} ".encode())
            continue
        for part in _held(weight.detach()):
            digest.update(f"{name} {tuple(part.shape)} {part.dtype} ".encode())
            content = part.contiguous().view(-1).view(torch.uint8) if part.numel() else part.new_empty(0)
            step = max(1, len(content) // SAMPLED)
            # A sum of whole numbers does not depend on the order in which they are added. By parts: torch makes eight
            # bytes of each that it adds.
            total = sum(int(some.sum(dtype=torch.int64)) for some in content.split(SUMMED))
            digest.update(f"{total} {content[::step].tolist()}".encode())
    return digest.hexdigest()[:16]


def _held(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a weight is made of: itself, or what a quantised one holds."""
    flatten = getattr(weight, "__tensor_flatten__", None)
    if flatten is None:
        yield weight
        return
    for name in flatten()[0]:
        yield from _held(getattr(weight, name))


def of_example(kept: Kept) -> str:
    """A digest of an example's name, ids, target and foil."""
    content: list[Any] = [kept.example.id, kept.ids.tolist(), kept.target, kept.foil]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

"""Where NaN or infinity first appears in a model: run again only to name the module in an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from gim.parts.anatomy import Anatomy


def _tensors(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors in a module's output, through tuples, lists and dictionaries."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        return [tensor for value in output.values() for tensor in _tensors(value)]
    if isinstance(output, tuple | list):
        return [tensor for value in output for tensor in _tensors(value)]
    return []


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


@contextmanager
def _hooks(parts: Anatomy, watch: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    """Inside, every module but the model itself has the hook that ``watch`` makes of its name."""
    with ExitStack() as hooks:
        for name, module in parts.modules.items():
            if name:
                hooks.enter_context(module.register_forward_hook(watch(name)))
        yield


def refuse_nonfinite(logits: torch.Tensor, parts: Anatomy, run: Callable[[], Any]) -> None:
    """An error where logits hold NaN or infinity; ``run`` gives them again.

    Raises:
        FloatingPointError: they do; names the first module, in the order they finish, that puts one out.
    """
    if not bool(torch.isfinite(logits).all()):
        module = first_nonfinite_output(parts, run)
        raise FloatingPointError(f"logits hold NaN or infinity; the first module that puts one out is {module}")


def first_nonfinite_output(parts: Anatomy, run: Callable[[], Any]) -> str:
    """The name of the first module, in the order they finish, whose output holds NaN or infinity, when it runs."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not found and not all(_finite(tensor) for tensor in _tensors(output)):
                found.append(name)

        return hook

    with _hooks(parts, watch), torch.no_grad():
        run()
    return found[0] if found else type(parts.model).__name__


def first_nonfinite_gradient(
    parts: Anatomy,
    logits_of: Callable[[], torch.Tensor],
    token_ids: torch.Tensor,
    where: torch.Tensor,
) -> str:
    """The name of the first module, going backwards, whose output's gradient holds NaN or infinity.

    Args:
        parts: of a model inside its GIM context, its embedding's output asking for a gradient.
        logits_of: runs it and gives the logits ``[B, K, V]``.
        token_ids: ``[B, P]``, explained tokens.
        where: ``[B, P]``, their positions among the logits.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad: found.append(name) if not _finite(grad) else None)

        return hook

    with _hooks(parts, watch):
        logits = logits_of()
        rows = torch.arange(logits.shape[0], device=logits.device)[:, None]
        total = logits[rows, where, token_ids].sum()
        if total.requires_grad:
            total.backward()
    return found[0] if found else type(parts.model).__name__

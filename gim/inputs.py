"""Checks of what a user gives: every error names the argument, what was wanted and what came."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from gim.parts import anatomy
from gim.parts.placement import refuse_unsupported_placement
from gim.segments import Range
from gim.targets import whole_number, whole_numbers
from gim_kernels.engines import key_range_of


def infer_baseline(tokenizer: Any) -> int:
    """The token that stands for "nothing": the space where it is a token, else padding, else unknown.

    Raises:
        TypeError: no tokenizer.
        ValueError: the tokenizer has none of them.
    """
    if isinstance(tokenizer, str) or not hasattr(tokenizer, "encode"):
        raise TypeError(
            f"tokenizer must be one of transformers, got {tokenizer!r:.80}: load it with "
            "AutoTokenizer.from_pretrained(...)"
        )
    ids = tokenizer.encode(" ", add_special_tokens=False)
    if ids:
        return int(ids[0])
    for name in ("pad_token_id", "unk_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return int(found)
    raise ValueError("baseline could not be inferred: the tokenizer has no space, padding or unknown token. Give one.")


def check_head(model: nn.Module) -> None:
    """Raise a ValueError that names the model unless it reads one text, of whose next token or class its logits are."""
    parts = anatomy.of(model)
    parts.call.refuse()
    head = parts.head
    if head == "class of each token":
        raise ValueError(
            f"model must say a token or a class of the whole text, and {type(model).__name__} says a {head}, which "
            "cannot be explained: open gim.GIM(model), and take the gradient of the logit you mean"
        )


def check_target(model: nn.Module, argument: str, target: int) -> None:
    """Raise a ValueError that names ``argument`` unless the model has a logit for the target."""
    parts = anatomy.of(model)
    if parts.head != "class":
        check_token_id(model, argument, target)
        return
    classes = int(parts.config.num_labels)
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < classes:
        raise ValueError(f"{argument} must be a class in 0..{classes - 1}, got {target!r}")


def check_targets(model: nn.Module, argument: str, target: Any, rows: int) -> list[int]:
    """One target for all rows, or one for each, as a list of 1 or ``rows`` ids that the model has logits for.

    Args:
        model: the model.
        argument: what to call the target in a message.
        target: an integer, or a list, tuple or tensor ``[B]`` of integers; a tensor without dimensions is one integer.
        rows: how many rows there are.

    Raises:
        TypeError: something else than integers.
        ValueError: another shape or length, or an id that the model has no logit for.
    """
    wanted = f"{argument} must be one id, or a list or tensor of {rows}, one for each row of input_ids"
    if isinstance(target, torch.Tensor):
        if target.dtype not in _INTEGERS:
            raise TypeError(f"{argument} must hold integers, got a tensor of {target.dtype}")
        if target.dim() > 1:
            raise ValueError(f"{wanted}; got a tensor of shape {tuple(target.shape)}")
        target = target.tolist()
    ids = whole_numbers(target)
    if ids is None:
        target = whole_number(target)
        check_target(model, argument, target)
        return [target]
    if len(ids) != rows:
        raise ValueError(f"{wanted}; got {len(ids)} of them")
    for row, one in enumerate(ids):
        if isinstance(one, bool) or not isinstance(one, int):
            raise TypeError(f"{argument}[{row}] must be an integer, got {one!r:.80}")
        check_target(model, f"{argument}[{row}]", one)
    return ids


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_segments(segments: Any, length: int) -> dict[str, Range]:
    """Named parts of a text of ``length`` characters, in the order of the text.

    Raises:
        TypeError: no mapping of texts to pairs of integers.
        ValueError: a part that is empty, lies outside the text or overlaps another; names it.
    """
    if not isinstance(segments, Mapping):
        raise TypeError(f"segments must be a mapping of names to (start, end), got {segments!r:.80}")
    found: dict[str, Range] = {}
    for name, given in segments.items():
        ends = whole_numbers(given) or []
        if not isinstance(name, str) or len(ends) != 2 or not all(type(one) is int for one in ends):
            raise TypeError(f"segments must be a mapping of names to (start, end), got {name!r:.80}: {given!r:.80}")
        if not 0 <= ends[0] < ends[1] <= length:
            raise ValueError(
                f"segments[{name!r}] must satisfy 0 <= start < end <= {length} (the length of the text), got {given}"
            )
        found[name] = (ends[0], ends[1])
    ordered = sorted(found.items(), key=lambda one: one[1])
    for (one, (_, end)), (other, (start, _)) in pairwise(ordered):
        if start < end:
            raise ValueError(f"segments[{one!r}] and segments[{other!r}] overlap")
    return dict(ordered)


def check_token_id(model: nn.Module, argument: str, token_id: int) -> None:
    """Raise a ValueError that names ``argument`` unless it is an id of the vocabulary."""
    size = anatomy.of(model).vocabulary_size
    if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < size:
        raise ValueError(f"{argument} must be a token id in 0..{size - 1}, got {token_id!r}")


def check_ids(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids ``[B, T]`` on the model's device, and the padding mask as booleans, None where nothing is padded."""
    if not isinstance(input_ids, torch.Tensor):
        raise TypeError(f"input_ids must be a tensor, got {type(input_ids).__name__}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    if input_ids.dim() not in (1, 2):
        raise ValueError(f"input_ids must have shape [T] or [B, T], got {tuple(input_ids.shape)}")
    if input_ids.numel() == 0:
        raise ValueError(f"input_ids must hold at least one token, got shape {tuple(input_ids.shape)}")
    refuse_unsupported_placement(anatomy.of(model).modules)
    parts = anatomy.of(model)
    device = parts.device
    ids = (input_ids[None] if input_ids.dim() == 1 else input_ids).to(device)
    size = parts.vocabulary_size
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= size:
        raise ValueError(f"input_ids must be in 0..{size - 1}, got ids from {lowest} to {highest}")
    if attention_mask is None:
        return ids, None
    if not isinstance(attention_mask, torch.Tensor):
        raise TypeError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}")
    mask = (attention_mask[None] if attention_mask.dim() == 1 else attention_mask).to(device)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have the shape of input_ids {tuple(ids.shape)}, got {tuple(mask.shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask must hold 0 and 1 only")
    mask = mask.to(torch.bool)
    if not bool(mask.any(-1).all()):
        raise ValueError(
            f"attention_mask must leave each row a token, got none in row {int((~mask.any(-1)).int().argmax())}"
        )
    key_range_of(mask, "attention_mask")
    return ids, None if bool(mask.all()) else mask


def check_positions(ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """Position ids ``[B, T]`` on the ids' device."""
    if position_ids is None:
        return None
    if not isinstance(position_ids, torch.Tensor) or position_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"position_ids must be a tensor of int64 or int32, got {position_ids!r}")
    given = position_ids[None] if position_ids.dim() == 1 else position_ids
    if given.shape != ids.shape:
        raise ValueError(f"position_ids must have the shape of input_ids {tuple(ids.shape)}, got {tuple(given.shape)}")
    return given.to(ids.device)


def check_length(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, allow_extrapolation: bool) -> None:
    """Raise a ValueError where a row has more tokens than the model has positions, unless that is asked for."""
    check_room(model, ids.shape[1] if mask is None else int(mask.sum(-1).max()), allow_extrapolation)


def check_room(model: nn.Module, prompt: int, allow_extrapolation: bool, argument: str = "", more: int = 1) -> None:
    """The same of a prompt of so many tokens, and of ``more`` that ``argument`` puts behind it."""
    if not isinstance(allow_extrapolation, bool):
        raise TypeError(f"allow_extrapolation must be True or False, got {allow_extrapolation!r:.80}")
    limit = anatomy.of(model).position_limit
    # The last token that follows is said and not read.
    if limit is not None and prompt + more - 1 > limit and not allow_extrapolation:
        has = f"the prompt has {prompt:,} token{'s' if prompt > 1 else ''}"
        if prompt <= limit:
            has += f" and {argument} {more:,} more"
        raise ValueError(
            f"{has}, and {type(model).__name__} has {limit:,} positions "
            "(max_position_embeddings): shorten it, or allow extrapolation (allow_extrapolation=True, "
            "--allow-extrapolation), whose attributions explain a model beyond what it was made for"
        )


def resolve_position(position: int, mask: torch.Tensor | None, length: int) -> torch.Tensor:
    """The column ``[B]`` that a target position means in each row."""
    position = whole_number(position)
    if isinstance(position, bool) or not isinstance(position, int):
        raise TypeError(f"target_position must be an integer, got {type(position).__name__}")
    if mask is None:
        if not -length <= position < length:
            raise ValueError(f"target_position must be in {-length}..{length - 1}, got {position}")
        return torch.tensor([position % length], device="cpu")
    if position >= 0:
        if position >= length:
            raise ValueError(f"target_position must be in {-length}..{length - 1}, got {position}")
        if not bool(mask[:, position].all()):
            row = int((~mask[:, position]).int().argmax())
            raise ValueError(f"target_position {position} is padding in row {row}")
        return torch.full((mask.shape[0],), position, device=mask.device)
    columns = torch.arange(length, device=mask.device)
    last = torch.where(mask, columns, -1).amax(-1)  # [B]
    resolved = last + 1 + position
    shortest = int(mask.sum(-1).min())
    if -position > shortest:
        raise ValueError(
            f"target_position must be at least {-shortest}, the length of the shortest row, got {position}"
        )
    return resolved


def check_progress(progress: object) -> None:
    """Refuse what cannot be called to hear how far a run is.

    Raises:
        TypeError: it is no function.
    """
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function or None, got {progress!r:.40}")

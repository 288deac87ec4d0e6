"""Attributions: of ids, with gim-explain's function, and of text."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import nn

from gim import prompts
from gim import targets as target_kinds
from gim.attribution import Attribution
from gim.context import resolve_rules
from gim.inputs import (
    check_ids,
    check_length,
    check_positions,
    check_segments,
    check_target,
    check_targets,
    check_token_id,
    infer_baseline,
    resolve_position,
)
from gim.memory import MemoryPlan, run
from gim.parts import anatomy
from gim.rules import GIM as PAPER_RULES
from gim.rules import PAPER_GATE_UP, PAPER_QKV, PAPER_TEMPERATURE, Rules
from gim.rules import get as get_rules
from gim.scoring import PREDICTION, Progress, Terms
from gim.targets import Continuation, Contrast, Explained, Measure, NextToken, Target, TokenLike
from gim_kernels import engines
from gim_kernels.types import Engine

Function = TypeVar("Function", bound=Callable[..., Any])


def _looked_at_once(function: Function) -> Function:
    """The model, the first argument, is searched for its parts once in the whole call."""

    @functools.wraps(function)
    def once(model: nn.Module, *args: Any, **named: Any) -> Any:
        with anatomy.held(model) if isinstance(model, nn.Module) else nullcontext():
            return function(model, *args, **named)

    return cast(Function, once)


@_looked_at_once
def explain(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    target_token_id: int | Sequence[int] | torch.Tensor | None = None,
    target_position: int = -1,
    baseline_token_id: int | None = None,
    tokenizer: Any = None,
    freeze_norm: bool = True,
    softmax_temperature: float | None = PAPER_TEMPERATURE,
    q_scale: float | None = PAPER_QKV[0],
    k_scale: float | None = PAPER_QKV[1],
    v_scale: float | None = PAPER_QKV[2],
    gate_scale: float | None = PAPER_GATE_UP[0],
    up_scale: float | None = PAPER_GATE_UP[1],
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    rules: Rules | str | None = None,
    memory: MemoryPlan | str = "auto",
    allow_extrapolation: bool = False,
    strict: bool = True,
    engine: Engine = "auto",
) -> torch.Tensor:
    """Attributions of input tokens to one logit, with the names, defaults and result of gim-explain.

    The attribution of a token is ``(embedding - baseline embedding) . gradient``, the gradient of the target logit
    with respect to the embedding under the GIM rules.

    Args:
        model: a Hugging Face language model, causal or masked, or sequence classifier, in evaluation mode; bare or
            inside a wrapper such as PEFT's.
        input_ids: ``[T]`` or ``[B, T]``, integers.
        target_token_id: the token whose logit is explained, or the class of a classifier; a list, tuple or tensor
            ``[B]`` of them, one for each row; None for each row's own prediction.
        target_position: the position whose output is explained. Negative ones count from each row's last token that
            is not padding; others are columns of ``input_ids``.
        baseline_token_id: the token that stands for "nothing"; None to infer one from ``tokenizer``.
        tokenizer: used to infer the baseline: its space token, else its padding, else its unknown token.
        freeze_norm, softmax_temperature, q_scale, k_scale, v_scale, gate_scale, up_scale: as in :class:`gim.GIM`.
        attention_mask: ``[B, T]``, 0 for padding on the left or the right; None where there is none. Each row's
            result equals that of the row alone.
        position_ids: ``[T]`` or ``[B, T]``; None to count each row's tokens. Where they start again, transformers'
            models treat what follows as another document.
        rules: in place of the single rule arguments: :class:`gim.rules.Rules` or the name of a preset.
        memory: a :class:`gim.MemoryPlan` or its name, such as ``"layer+attention"``; ``"auto"`` is the fastest plan
            that fits the device's free memory. Every plan gives the same attributions.
        allow_extrapolation: run prompts longer than the model's position limit.
        strict: whether a part that a rule should act on and cannot is an error; with False it is a warning, which
            names it.
        engine: which code runs the operators, as in :class:`gim.GIM` (``"reference"`` checks the others).

    Returns:
        ``[T]`` for one row, else ``[B, T]``; float32 (float64 for a float64 model), on the model's device, 0 on
        padding.

    Raises:
        UnsupportedModelError: a rule cannot be applied to a part of the model; names it.
        ValueError, TypeError: an argument that does not fit; names it, what was wanted and what came.
        TypeError, RuntimeError, NotImplementedError: as :class:`gim.GIM` of an engine that cannot run here, or has not
            what the model needs.
        FloatingPointError: NaN or infinity in the logits or the gradient; names the first module with one.
        OutOfMemoryError: no plan fits; says the estimate and the longest prompt that would fit.

    Source: Edin et al. 2025, arXiv 2505.17630.

    Example:
        >>> import gim, gim.demo
        >>> model, tokenizer = gim.demo.load()
        >>> ids = tokenizer("The password of Irene is lantern. The password of Irene is", return_tensors="pt").input_ids
        >>> gim.explain(model, ids, tokenizer=tokenizer).shape == ids.shape[1:]
        True
    """
    engines.check_name(engine)
    chosen = resolve_rules(
        rules,
        freeze_norm=freeze_norm,
        softmax_temperature=softmax_temperature,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        gate_scale=gate_scale,
        up_scale=up_scale,
    )
    ids, mask = check_ids(model, input_ids, attention_mask)
    check_length(model, ids, mask, allow_extrapolation)
    if baseline_token_id is None:
        if tokenizer is None:
            raise ValueError("baseline_token_id or tokenizer must be given: attributions are relative to a baseline")
        baseline_token_id = infer_baseline(tokenizer)
    check_token_id(model, "baseline_token_id", baseline_token_id)
    wanted = (
        [PREDICTION]
        if target_token_id is None
        else check_targets(model, "target_token_id", target_token_id, ids.shape[0])
    )
    positions = resolve_position(target_position, mask, ids.shape[1])[:, None]
    scored = Terms(
        positions=positions,
        token_ids=torch.tensor(wanted, device=positions.device)[:, None],
        signs=torch.ones_like(positions),
        measure="logit",
    )
    places = check_positions(ids, position_ids)
    result = run(
        model, ids, mask, scored, baseline_token_id, chosen, memory, None, places, strict=strict, engine=engine
    )
    if not result.report.complete:
        warnings.warn(f"not every rule was applied: {result.report.summary()}", stacklevel=2)
    return result.scores[0] if result.scores.shape[0] == 1 else result.scores


@_looked_at_once
def attribute(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    target: Target | TokenLike | Sequence[int] | None = None,
    baseline: TokenLike | None = None,
    position: int | None = None,
    rules: Rules | str = PAPER_RULES,
    memory: MemoryPlan | str = "auto",
    progress: Progress | None = None,
    allow_extrapolation: bool = False,
    strict: bool = True,
    engine: Engine = "auto",
    measure: Measure | None = None,
    segments: Mapping[str, Sequence[int]] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> Attribution:
    """Attributions of a prompt's tokens to what the model says next, as a result that knows its tokens.

    Args:
        model: a Hugging Face language model, causal or masked, or sequence classifier, in evaluation mode; bare or
            inside a wrapper such as PEFT's.
        tokenizer: its fast tokenizer (one that tells character offsets).
        prompt: the text; it is never cut, and special tokens that it begins or ends with are not put there again. Or a
            chat: messages with ``role`` and ``content`` (text, or parts ``{"type": "text", "text": ...}``), to which
            the tokenizer's chat template is applied, up to where the model's answer starts; a last message of the
            model's own is continued.
        target: what is explained: None for the model's own prediction, a token id, text, several ids, or one of
            :class:`gim.targets.Token`, ``Contrast`` and ``Continuation``. Of a classifier, a class by number or label.
        baseline: the token that stands for "nothing", as id or text; None as in :func:`explain`.
        position: the token whose output is explained, negative from the end; None for the last, and for the mask token
            of a masked language model.
        rules: :class:`gim.rules.Rules` or the name of a preset.
        memory: as in :func:`explain`.
        progress: called with ``("forward" or "backward", layers done, layers in all)``.
        allow_extrapolation: as in :func:`explain`.
        strict: whether a part that a rule should act on and cannot is an error; with False it is in the result's
            ``report.unsupported``.
        engine: as in :func:`explain`; what ran is in the result's ``engine``, and for each part in ``report.engines``.
        measure: ``"logit"`` or ``"logprob"``, in place of the target's own.
        segments: parts of the text by name, each its first and one-past-last character, that do not overlap; None for
            the messages of a chat, by role.
        template_arguments: what the chat template is given besides the messages, such as ``tools`` or
            ``enable_thinking``.

    Returns:
        The attribution. A continuation's own tokens but the last are inputs too, and are part of it. Tokens that are
        the chat template's own have scores and are left out of ranks.

    Raises:
        UnsupportedModelError: a rule cannot be applied to a part of the model; names it.
        ValueError: an empty prompt, a chat that is not all text or that the template refuses or changes, a token that
            is not one, an id out of range, a slow tokenizer, segments that are empty, overlap or lie outside the text,
            template arguments for a text or of names that are not the template's.
        TypeError, RuntimeError, NotImplementedError: as :class:`gim.GIM` of an engine that cannot run here, or has not
            what the model needs.
        FloatingPointError: NaN or infinity in the logits or the gradient; names the first module with one.
        OutOfMemoryError: as in :func:`explain`.

    Source: Edin et al. 2025, arXiv 2505.17630.

    Example:
        >>> import gim, gim.demo
        >>> model, tokenizer = gim.demo.load()
        >>> result = gim.attribute(model, tokenizer, "The password of Irene is lantern. The password of Irene is")
        >>> len(result.scores) == len(result.tokens)
        True
    """
    engines.check_name(engine)
    chosen = get_rules(rules)
    encoded = prompts.encode(prompt, tokenizer, template_arguments)
    text, token_ids, offsets = encoded.text, list(encoded.ids), list(encoded.offsets)
    named = encoded.segments if segments is None else check_segments(segments, len(text))
    head = anatomy.of(model).head
    wanted = target_kinds.parse(_class_number(model, target) if head == "class" else target, tokenizer)
    if measure is not None:
        wanted = dataclasses.replace(wanted, measure=measure)
    baseline_id = (
        infer_baseline(tokenizer) if baseline is None else target_kinds.token_id(baseline, tokenizer, "baseline")
    )
    check_token_id(model, "baseline", baseline_id)

    last = _position(model, tokenizer, token_ids, position)
    if isinstance(wanted, Continuation):
        if head != "next token" or last != len(token_ids) - 1:
            ids, *_ = _continuation(model, wanted, tokenizer)
            pieces = [tokenizer.decode([one]) for one in ids]
            raise ValueError(
                f"target must be one {head} at a position inside the prompt, got {wanted.tokens!r}, which is "
                f"{len(ids)} tokens: {pieces}"
            )
        targets, added, spans = _continuation(model, wanted, tokenizer)
        token_ids += targets[:-1]
        offsets += [(len(text) + start, len(text) + end) for start, end in spans]
        text += added
        signs, positions = [1] * len(targets), list(range(last, last + len(targets)))
    elif isinstance(wanted, Contrast):
        sides = (wanted.token, wanted.against) if head == "class" else target_kinds.contrast_ids(wanted, tokenizer)
        targets = [
            _target_id(model, name, side, tokenizer) for name, side in zip(("target", "against"), sides, strict=True)
        ]
        signs, positions = [1, -1], [last, last]
    else:
        targets, signs, positions = [_target_id(model, "target", wanted.token, tokenizer)], [1], [last]

    ids_tensor, mask = check_ids(model, torch.tensor(token_ids), None)
    check_length(model, ids_tensor, mask, allow_extrapolation)
    scored = Terms(
        positions=torch.tensor([positions], device=ids_tensor.device),
        token_ids=torch.tensor([targets], device=ids_tensor.device),
        signs=torch.tensor([signs], device=ids_tensor.device),
        measure=wanted.measure,
    )
    result = run(model, ids_tensor, mask, scored, baseline_id, chosen, memory, progress, strict=strict, engine=engine)
    found = [int(one) for one in result.token_ids[0]]

    def words_of(ids: Sequence[int]) -> tuple[str, ...]:
        return _class_labels(model, ids) if head == "class" else tuple(tokenizer.decode([one]) for one in ids)

    words, likeliest = words_of(found), result.likeliest[0].tolist()
    explained = _explained(wanted, found, positions, float(result.values[0]), tokenizer, words)
    special = set(tokenizer.all_special_ids)
    return Attribution(
        text=text,
        tokens=tuple(
            text[start:end] if end > start and one not in special else tokenizer.decode([one])
            for one, (start, end) in zip(token_ids, offsets, strict=True)
        ),
        token_ids=tuple(token_ids),
        offsets=tuple(offsets),
        scores=result.scores[0].float().cpu(),
        special=tuple(one in special for one in token_ids),
        target=explained,
        rules=chosen,
        engine=result.report.engine,
        report=result.report,
        model=_model_name(model),
        baseline=(baseline_id, tokenizer.decode([baseline_id])),
        versions=_versions(),
        memory=result.memory,
        # A continuation's own tokens are nobody's template.
        template=tuple(encoded.template) + (False,) * (len(token_ids) - len(encoded.template)),
        segments=named,
        next_tokens=tuple(
            map(NextToken, likeliest, words_of(likeliest), [float(one) for one in result.probabilities[0]])
        ),
    )


def _target_id(model: nn.Module, argument: str, token: TokenLike | None, tokenizer: Any) -> int:
    """The checked id of a target token; :data:`PREDICTION` for None."""
    if token is None:
        return PREDICTION
    if anatomy.of(model).head == "class":
        found = _class_number(model, token)
        if not isinstance(found, int):
            raise ValueError(f"{argument} must be a class by number or label, got {token!r}")
    else:
        found = target_kinds.token_id(token, tokenizer, argument)
    check_target(model, argument, found)
    return found


def _class_labels(model: nn.Module, classes: Sequence[int]) -> tuple[str, ...]:
    labels: Any = getattr(anatomy.of(model).config, "id2label", None) or {}
    return tuple(str(labels.get(one, one)) for one in classes)


def _class_number(model: nn.Module, target: Any) -> Any:
    """A class by number or label as its number; anything else as it is."""
    if not isinstance(target, str):
        return target
    labels: Any = getattr(anatomy.of(model).config, "label2id", None) or {}
    if target not in labels:
        raise ValueError(f"target must be one of the model's classes {sorted(labels)}, got {target!r}")
    return int(labels[target])


def _position(model: nn.Module, tokenizer: Any, ids: list[int], position: int | None) -> int:
    """The index of the token whose output is explained."""
    if position is not None:
        if isinstance(position, bool) or not isinstance(position, int):
            raise TypeError(f"position must be an integer, got {type(position).__name__}")
        if not -len(ids) <= position < len(ids):
            raise ValueError(f"position must be in {-len(ids)}..{len(ids) - 1}, got {position}")
        return position % len(ids)
    if anatomy.of(model).head != "masked token":
        return len(ids) - 1
    masks = [index for index, one in enumerate(ids) if one == tokenizer.mask_token_id]
    if len(masks) != 1:
        raise ValueError(
            f"prompt must hold one {tokenizer.mask_token!r} for a masked language model, got {len(masks)}: give "
            "position"
        )
    return masks[0]


def _continuation(
    model: nn.Module, target: Continuation, tokenizer: Any
) -> tuple[list[int], str, list[tuple[int, int]]]:
    """The checked ids of a continuation; the text of all but the last, and their offsets in it."""
    if isinstance(target.tokens, str):
        encoded = tokenizer(target.tokens, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        spans = [(int(start), int(end)) for start, end in encoded["offset_mapping"][:-1]]
        text = target.tokens[: max((end for _, end in spans), default=0)]
    else:
        ids = list(target.tokens)
        # Decoded together and measured one by one: a character may take several tokens.
        lengths = [len(tokenizer.decode(ids[:count])) for count in range(len(ids))]
        spans = [(min(start, end), end) for start, end in pairwise(lengths)]
        text = tokenizer.decode(ids[:-1])
    if not ids:
        raise ValueError(f"target must have at least one token, got {target.tokens!r}, which has none")
    for one in ids:
        check_token_id(model, "target", one)
    return ids, text, spans


def _explained(
    target: Target, ids: list[int], positions: list[int], value: float, tokenizer: Any, tokens: tuple[str, ...]
) -> Explained:
    if isinstance(target, Continuation):
        kind, label = "continuation", repr(tokenizer.decode(ids))
    elif isinstance(target, Contrast):
        kind, label = "contrast", f"{tokens[0]!r} minus {tokens[1]!r}"
    else:
        kind = "prediction" if target.token is None else "token"
        label = repr(tokens[0])
    return Explained(kind, label, tuple(ids), tokens, tuple(positions), target.measure, value)


def _model_name(model: nn.Module) -> str:
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or getattr(model, "name_or_path", "")
    # A path on somebody's disk is nobody's business in a report; its last part names the model well enough.
    return f"{type(model).__name__}" + (f" ({str(name).rstrip('/').rsplit('/', 1)[-1]})" if name else "")


def _versions() -> dict[str, str]:
    found = {}
    for name in ("gim-kernels", "torch", "transformers", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

"""Attributions: of ids, with gim-explain's function, and of text."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, TypedDict, TypeVar, Unpack, cast, overload

import torch
from torch import nn

from gim import answering, many
from gim.answers import AnswerAttribution
from gim.asked import Asked
from gim.attribution import Attribution
from gim.inputs import (
    check_head,
    check_ids,
    check_length,
    check_positions,
    check_progress,
    check_targets,
    check_token_id,
    infer_baseline,
    resolve_position,
)
from gim.layerwise import LayerwiseAttribution
from gim.memory import MemoryPlan, run
from gim.parts import anatomy
from gim.rules import GIM as PAPER_RULES
from gim.rules import PAPER_GATE_UP, PAPER_QKV, PAPER_TEMPERATURE, Rules, resolve
from gim.scoring import PREDICTION, Progress, Terms
from gim.single import Single, TargetLike
from gim.targets import Measure, Per, TokenLike, whole_number
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
    check_head(model)
    chosen = resolve(
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
    baseline_token_id = whole_number(baseline_token_id)
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


class Shared(TypedDict, total=False):
    """What :func:`attribute` takes besides what decides the type of its result, and is the same for many prompts."""

    baseline: TokenLike | None
    position: int | None
    rules: Rules | str
    memory: MemoryPlan | str
    progress: Progress | None
    allow_extrapolation: bool
    strict: bool
    engine: Engine
    measure: Measure | None
    template_arguments: Mapping[str, Any] | None


class Options(Shared, total=False):
    """The same for one prompt."""

    target: TargetLike
    segments: Mapping[str, Sequence[int]] | None


class ManyOptions(Shared, total=False):
    """The same for a list of prompts: one for all, or a list with one for each."""

    target: TargetLike | list[Any]
    segments: Mapping[str, Sequence[int]] | list[Any] | None


Prompt = str | Sequence[Mapping[str, Any]]
Prompts = list[str] | tuple[str, ...] | Sequence[Sequence[Mapping[str, Any]]]


@overload
def attribute(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    *,
    answer: None = None,
    generate: None = None,
    per: Literal["token"] = "token",
    **options: Unpack[Options],
) -> Attribution: ...
@overload
def attribute(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    *,
    answer: None = None,
    generate: None = None,
    per: Per,
    **options: Unpack[Options],
) -> LayerwiseAttribution: ...
@overload
def attribute(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    *,
    answer: str | Sequence[int],
    generate: None = None,
    **options: Unpack[Options],
) -> AnswerAttribution: ...
@overload
def attribute(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    *,
    answer: None = None,
    generate: int,
    **options: Unpack[Options],
) -> AnswerAttribution: ...
@overload
def attribute(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompts,
    *,
    answer: None = None,
    generate: None = None,
    per: Literal["token"] = "token",
    **options: Unpack[ManyOptions],
) -> list[Attribution]: ...
@overload
def attribute(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompts,
    *,
    answer: None = None,
    generate: None = None,
    per: Per,
    **options: Unpack[ManyOptions],
) -> list[LayerwiseAttribution]: ...
@overload
def attribute(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompts,
    *,
    answer: str | list[Any],
    generate: None = None,
    **options: Unpack[ManyOptions],
) -> list[AnswerAttribution]: ...
@overload
def attribute(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompts,
    *,
    answer: None = None,
    generate: int,
    **options: Unpack[ManyOptions],
) -> list[AnswerAttribution]: ...
@_looked_at_once
def attribute(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt | Prompts,
    *,
    target: TargetLike | list[Any] = None,
    baseline: TokenLike | None = None,
    position: int | None = None,
    rules: Rules | str = PAPER_RULES,
    memory: MemoryPlan | str = "auto",
    progress: Progress | None = None,
    allow_extrapolation: bool = False,
    strict: bool = True,
    engine: Engine = "auto",
    measure: Measure | None = None,
    segments: Mapping[str, Sequence[int]] | list[Any] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    answer: str | Sequence[int] | list[Any] | None = None,
    generate: int | None = None,
    per: Literal["token", "layer", "head"] = "token",
) -> (
    Attribution
    | LayerwiseAttribution
    | AnswerAttribution
    | list[Attribution]
    | list[LayerwiseAttribution]
    | list[AnswerAttribution]
):
    """Attributions of a prompt's tokens to what the model says next, as a result that knows its tokens.

    Args:
        model: a Hugging Face language model, causal or masked, or sequence classifier, in evaluation mode; bare or
            inside a wrapper such as PEFT's.
        tokenizer: its fast tokenizer (one that tells character offsets).
        prompt: the text; it is never cut, and special tokens that it begins or ends with are not put there again. Or a
            chat: messages with ``role`` and ``content`` (text, or parts ``{"type": "text", "text": ...}``), to which
            the tokenizer's chat template is applied, up to where the model's answer starts; a last message of the
            model's own is continued. Or a list of texts or chats, of which several run together (prompts with an
            answer one by one): in one row where the model is proved to read each by itself, else padded,
            those of about the same length; the results' ``memory`` says which. Each result is that of its prompt
            alone, within rounding. ``target``, ``answer`` and ``segments`` are then one for all, or a list with one
            for each.
        target: what is explained: None for the model's own prediction, a token id, text, several ids, or one of
            :class:`gim.targets.Token`, ``Contrast`` and ``Continuation``. Of a classifier, a class by number or label.
        baseline: the token that stands for "nothing", as id or text; None as in :func:`explain`.
        position: the token whose output is explained, negative from the end; None for the last, and for the mask token
            of a masked language model.
        rules: :class:`gim.rules.Rules` or the name of a preset.
        memory: as in :func:`explain`.
        progress: called with ``("forward" or "backward", layers done, layers in all)``; of a list of prompts with
            ``("prompts", prompts done, prompts in all)``.
        allow_extrapolation: as in :func:`explain`.
        strict: whether a part that a rule should act on and cannot is an error; with False it is in the result's
            ``report.unsupported``.
        engine: as in :func:`explain`; what ran is in the result's ``engine``, and for each part in ``report.engines``.
        measure: ``"logit"``, ``"logprob"`` or ``"logodds"``, in place of the target's own.
        segments: parts of the text by name, each its first and one-past-last character, that do not overlap; None for
            the messages of a chat, by role.
        template_arguments: what the chat template is given besides the messages, such as ``tools`` or
            ``enable_thinking``; names that the template does not read are warned of.
        answer: what follows the prompt, as text or ids; every token of it is explained, from one forward for each
            prompt.
        generate: the same of what the model itself says next, at most this many tokens, as its generation config says:
            greedily where that says nothing. Tokens with which the model ends are left out.
        per: ``"token"``; or, from the same backward, ``"layer"`` for scores of the residual stream that each layer
            reads, token by token, or ``"head"`` for those of each attention head's output. Not with ``answer``.

    Returns:
        The attribution; with ``per`` a :class:`gim.LayerwiseAttribution`, which has it; with ``answer`` or ``generate``
        a :class:`gim.AnswerAttribution`; of a list of prompts a list in its order. A continuation's own tokens
        but the last are inputs too, and are part of it. Tokens that are the chat template's own have scores and are
        left out of ranks.

    Raises:
        UnsupportedModelError: a rule cannot be applied to a part of the model, or a layer cannot be looked into; names
            it.
        ValueError: an empty prompt, a chat that is not all text or that the template refuses or changes, a token that
            is not one, an id out of range, a slow tokenizer, segments that are empty, overlap or lie outside the text,
            template arguments for a text or of names that are not the template's; an empty answer, none within
            ``generate`` tokens, or one of a model that says no next tokens.
        PromptErrors: some prompts of a list cannot be attributed (a ValueError, which has the results of the others);
            an error that is the same for all of them is raised as it is.
        AnswerInterrupted: Ctrl-C came among the backwards of an answer; it has the attribution of the answer's first
            tokens, as far as they were finished.
        PromptsInterrupted: Ctrl-C came in a list of prompts; it has the results that were finished.
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
    check_progress(progress)
    if answer is not None or generate is not None:
        for name, given in (("target", target), ("position", position)):
            if given is not None:
                raise ValueError(f"{name} is one token's: answer and generate explain every token of an answer")
        if per != "token":
            raise ValueError(f"per={per!r} is of one explained number: answer and generate explain several")
    ask = functools.partial(
        Asked.of,
        model,
        tokenizer,
        baseline=baseline,
        rules=rules,
        memory=memory,
        allow_extrapolation=allow_extrapolation,
        strict=strict,
        engine=engine,
        per=per,
        template_arguments=template_arguments,
    )
    if many.is_several(prompt):
        return many.attribute(
            *(ask, cast(Sequence[Any], prompt), target, position, measure, answer, generate, segments, progress)
        )
    asked = ask(prompt, segments=segments, progress=progress)
    if answer is not None or generate is not None:
        return answering.attribute(asked, answer, generate, measure)
    one = Single.of(asked, target, position, measure)
    return one.attribution(asked.run([one.wanted], one.target.measure))

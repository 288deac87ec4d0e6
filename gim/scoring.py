"""One forward and one backward under the rules: from checked ids to scores."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gim import memory as memory_plans
from gim.applied import AppliedReport
from gim.context import GIM, decoder_layers
from gim.inputs import embeddings
from gim.memory import MemoryPlan
from gim.nonfinite import first_nonfinite_gradient, first_nonfinite_output
from gim.patches import transformer_lens
from gim.rules import Rules
from gim.targets import Measure

#: Called with ("forward" or "backward", layers done, layers in all).
Progress = Callable[[str, int, int], None]

#: Stands in ``Terms.token_ids`` for the model's own prediction.
PREDICTION = -1


@dataclass(frozen=True)
class Terms:
    """Terms of the explained number: for each row, at ``positions``, ``token_ids`` times ``signs`` are summed.

    ``token_ids`` of :data:`PREDICTION` stand for the model's own prediction. All are ``[B, P]``.
    """

    positions: torch.Tensor
    token_ids: torch.Tensor
    signs: torch.Tensor
    measure: Measure


@dataclass(frozen=True)
class Result:
    scores: torch.Tensor  # [B, T], float32 or float64
    token_ids: torch.Tensor  # [B, P], predictions filled in
    values: torch.Tensor  # [B]
    report: AppliedReport
    plan: MemoryPlan


def run(
    model: nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    scored: Terms,
    baseline_id: int,
    rules: Rules,
    memory: MemoryPlan | str,
    progress: Progress | None,
    position_ids: torch.Tensor | None = None,
) -> Result:
    """One forward and one backward over a checked batch."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("explain cannot run under torch.inference_mode(): gradients do not exist there")
    batch, length = ids.shape
    positions = scored.positions.to(ids.device).expand(batch, -1)
    # The head runs on the union of all rows' positions; each row then takes its own.
    kept, where = torch.unique(positions, return_inverse=True)
    plan = memory_plans.resolve(memory, model, batch * length, ids.device)
    arguments = _forward_arguments(model, ids, mask, kept, position_ids)
    context = GIM(model, rules=rules)
    with torch.enable_grad(), context as report, _frozen_parameters(model), ExitStack() as stack:
        stack.enter_context(memory_plans.applied(plan, model))
        if progress is not None:
            stack.enter_context(_reporting(model, progress))
        leaf = stack.enter_context(_embedding_leaf(model))
        logits = _logits(model(**arguments), arguments, kept)  # [B, K, V]
        if len(leaf) != 1:
            raise ValueError(
                f"model must embed its input ids once, through get_input_embeddings(); it did so {len(leaf)} times"
            )
        if not bool(torch.isfinite(logits).all()):
            module = first_nonfinite_output(model, arguments)
            raise FloatingPointError(f"logits hold NaN or infinity; the first module that puts one out is {module}")
        # A model that is spread over devices puts its logits out on the last.
        wide = logits.to(ids.device, torch.promote_types(logits.dtype, torch.float32))
        rows = torch.arange(batch, device=ids.device)[:, None]
        chosen = wide[rows, where.view(positions.shape)]  # [B, P, V]
        wanted = scored.token_ids.to(ids.device).expand(batch, -1)
        wanted = torch.where(wanted == PREDICTION, chosen.argmax(-1), wanted)
        if scored.measure == "logprob":
            chosen = torch.log_softmax(chosen, dim=-1)
        terms = chosen.gather(-1, wanted[..., None])[..., 0] * scored.signs.to(ids.device)
        values = terms.sum(-1)
        if not values.requires_grad:
            raise ValueError("the logits do not depend on the input embeddings: the model detaches them")
        (grad,) = torch.autograd.grad(values.sum(), leaf[0])
        if not bool(torch.isfinite(grad).all()):
            module = first_nonfinite_gradient(
                model,
                arguments,
                lambda out: _logits(out, arguments, kept),
                wanted,
                where.view(positions.shape),
            )
            raise FloatingPointError(
                f"the gradient holds NaN or infinity; going backwards, the first module whose output's gradient has "
                f"one is {module}"
            )
        with torch.no_grad():
            embedded = leaf[0].detach()
            baseline = embeddings(model)(torch.full((1, 1), baseline_id, device=ids.device))
            wide_dtype = torch.promote_types(embedded.dtype, torch.float32)
            difference = embedded.to(wide_dtype) - baseline.to(wide_dtype)
            scores = (difference * grad.to(wide_dtype)).sum(-1)
            if mask is not None:
                scores = scores.masked_fill(~mask, 0.0)
    return Result(scores, wanted.detach(), values.detach(), report, plan)


def _forward_arguments(
    model: nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    kept: torch.Tensor,
    position_ids: torch.Tensor | None,
) -> dict[str, Any]:
    """What the model is called with."""
    known = inspect.signature(model.forward).parameters
    arguments: dict[str, Any]
    if transformer_lens.is_one(model):
        if position_ids is not None:
            raise ValueError(f"position_ids cannot be given to {type(model).__name__}, whose forward takes none")
        arguments = {"input": ids, "return_type": "logits"}
        if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values()):
            arguments["use_cache"] = False  # a bridge hands it to the Hugging Face model that it wraps
        if mask is not None:
            arguments["attention_mask"] = mask.to(torch.int64)
        return arguments
    arguments = {"input_ids": ids}
    if "use_cache" in known:
        arguments["use_cache"] = False
    if position_ids is not None:
        if "position_ids" not in known:
            raise ValueError(f"position_ids cannot be given to {type(model).__name__}, whose forward takes none")
        arguments["position_ids"] = position_ids
    if mask is not None:
        arguments["attention_mask"] = mask.to(torch.int64)
        if "position_ids" in known and position_ids is None:
            # Models count positions from the first column; a row padded on the left starts later.
            arguments["position_ids"] = (mask.to(torch.int64).cumsum(-1) - 1).clamp_min(0)
    if "logits_to_keep" in known:
        arguments["logits_to_keep"] = kept
    return arguments


def _logits(output: Any, arguments: dict[str, Any], kept: torch.Tensor) -> torch.Tensor:
    """The logits ``[B, K, V]`` at the explained positions; those of a classifier stand for every position."""
    logits = output.logits if hasattr(output, "logits") else output
    if logits.dim() == 2:
        return logits[:, None].expand(-1, len(kept), -1)
    return logits if "logits_to_keep" in arguments else logits[:, kept]


@contextmanager
def _frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient, so that no layer keeps its input for one."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def _embedding_leaf(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Inside, the output of the embedding is a leaf that asks for its gradient; yields the leaves made."""
    leaves: list[torch.Tensor] = []

    def replace(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        leaf = output.detach().requires_grad_(True)
        leaves.append(leaf)
        return leaf

    handle = embeddings(model).register_forward_hook(replace)
    try:
        yield leaves
    finally:
        handle.remove()


@contextmanager
def _reporting(model: nn.Module, progress: Progress) -> Iterator[None]:
    """Inside, ``progress`` hears of every layer that has finished its forward and its backward."""
    layers = decoder_layers(model)
    total = len(layers)
    handles = []

    def watch(index: int) -> Callable[..., None]:
        def before(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = inputs[0] if inputs else named.get("hidden_states")
            if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                # The gradient of a layer's input exists once the layer's backward is done.
                hidden.register_hook(lambda _: progress("backward", total - index, total))

        return before

    def after(index: int) -> Callable[..., None]:
        return lambda *_: progress("forward", index + 1, total)

    for index, (_, layer) in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(watch(index), with_kwargs=True))
        handles.append(layer.register_forward_hook(after(index)))
    progress("forward", 0, total)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

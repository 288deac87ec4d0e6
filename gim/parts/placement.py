"""Where a model's weights and its sequence lie: what is refused because it lies in parts.

A context replaces attention, and explains with weights that it has looked at. A sequence that is sharded over ranks
lies in what attention was before, and would be lost without a word; weights that come and go have numbers only while
their module runs. Both are refused by name. Every check looks at this process alone, so that each rank refuses by
itself and none waits for another. Nothing is imported for it: what has never been imported shards nothing.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gim.applied import UnsupportedModelError
from gim.parts.adapters import hugging_face, transformer_lens
from gim.parts.parameters import named_parameters

#: Packages whose functions are plain attention: over the whole sequence, with all heads, on one device.
PLAIN = ("transformers", "torch", "gim", transformer_lens.PACKAGE)
#: What torch's context parallelism is written in, in each of its releases.
_CONTEXT_PARALLEL = "torch.distributed.tensor.experimental"

_ADVICE = (
    'Choose one of transformers (model.set_attn_implementation("sdpa")) and run the model on the whole sequence: what '
    "shards a sequence over ranks (Ulysses, ring attention) is not supported"
)
_TENSOR_PARALLEL = "Tensor parallelism (tp_plan, DistributedConfig(tp_size=...)) is exact"


def refuse_unsupported_placement(modules: Mapping[str, nn.Module]) -> None:
    """An error where a model's weights or its sequence do not lie whole in this process; names what has them.

    Args:
        modules: of a model, by name. Tensor parallelism is not refused: each rank then has the whole sequence.

    Raises:
        UnsupportedModelError: fully sharded or partitioned parameters, pipeline stages, weights that accelerate
            offloads, parameters on the meta device; and all of :func:`refuse_sharded_sequence`.
    """
    _refuse_sharded_weights(modules)
    _refuse_pipeline_stage(modules)
    _refuse_offloaded_weights(modules)
    refuse_sharded_sequence(modules)
    for name, parameter in named_parameters(modules):
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"{name} is on the meta device: load the weights first; for memory alone, gim.estimate_memory takes "
                "a model without them"
            )


def refuse_sharded_sequence(modules: Mapping[str, nn.Module]) -> None:
    """An error where attention is not plain attention over the sequence that this process has.

    Raises:
        UnsupportedModelError: torch's context parallelism is on; torch's attention function has been replaced; or a
            config names an attention or a mask that is neither transformers' own nor gim's.
    """
    refuse_context_parallelism(modules)
    for name, module in hugging_face.models(modules).items():
        _refuse_unknown_attention(name or type(module).__name__, module)


def refuse_context_parallelism(modules: Mapping[str, nn.Module]) -> None:
    """The part of :func:`refuse_sharded_sequence` that may change while a context is open.

    torch's context parallelism replaces torch's attention function, or makes distributed tensors of what a module is
    called with; both for as long as it is on.
    """
    own = torch._C._nn.scaled_dot_product_attention
    function: Any = nn.functional.scaled_dot_product_attention
    if function is not own:
        what = "context_parallel of torch" if home_of(function).startswith(_CONTEXT_PARALLEL) else _described(function)
        raise UnsupportedModelError(
            f"torch.nn.functional.scaled_dot_product_attention has been replaced by {what}. Where that shards the "
            "sequence, each rank has only a part of it, which gim cannot explain; run the model outside, on the "
            f"whole sequence. {_TENSOR_PARALLEL}"
        )
    api: Any = sys.modules.get("torch.distributed.tensor._api")
    handlers = getattr(getattr(getattr(api, "DTensor", None), "_op_dispatcher", None), "_custom_op_handlers", {})
    if any(home_of(handler).startswith(_CONTEXT_PARALLEL) for handler in handlers.values()):
        raise UnsupportedModelError(
            "context parallelism of torch is on (its dispatcher is enabled), so each rank has only a part of the "
            f"sequence, which gim cannot explain: run the model outside, on the whole sequence. {_TENSOR_PARALLEL}"
        )
    if f"{_CONTEXT_PARALLEL}._attention" not in sys.modules:
        return
    for name, module in modules.items():
        hooks = module._forward_pre_hooks
        if hooks and any(home_of(hook).startswith(_CONTEXT_PARALLEL) for hook in hooks.values()):
            raise UnsupportedModelError(
                f"{name or type(module).__name__} is under context parallelism of torch, so each rank has only a part "
                f"of the sequence, which gim cannot explain. {_TENSOR_PARALLEL}"
            )


def _refuse_unknown_attention(name: str, model: PreTrainedModel) -> None:
    """An error where the attention or the mask that a model's config names is not plain."""
    implementation = model.config._attn_implementation
    source: Any = sys.modules.get(type(model).__module__)
    # A modelling file may have an interface of its own, with functions that are registered in it alone.
    attentions = _interface(source, "ALL_ATTENTION_FUNCTIONS", AttentionInterface, ALL_ATTENTION_FUNCTIONS)
    masks = _interface(source, "ALL_MASK_ATTENTION_FUNCTIONS", AttentionMaskInterface, ALL_MASK_ATTENTION_FUNCTIONS)
    if implementation not in attentions and not _is_built_in(implementation):
        raise UnsupportedModelError(
            f"{name}: its attention implementation {implementation!r} is none that transformers has or that is "
            f"registered. {_ADVICE}"
        )
    # What a context switches to must be gim's own too: some libraries replace every entry of an interface.
    looked_at = [
        (kind, one.get(entry))
        for entry in (implementation, "gim")
        for kind, one in (("attention", attentions), ("mask", masks))
    ]
    foreign = [(kind, _foreign(function)) for kind, function in looked_at if function is not None]
    if implementation not in attentions and hasattr(source, "eager_attention_forward"):
        # A model's own code has an eager attention of its own, in its file or in one beside it.
        beside = type(model).__module__.rpartition(".")[0] or type(model).__module__
        foreign.append(("attention", _foreign(source.eager_attention_forward, (beside,))))
    for kind, what in foreign:
        if what is not None:
            raise UnsupportedModelError(
                f"{name}: its {kind} implementation {implementation!r} runs {what}, which is not transformers' own. "
                f"It may shard the sequence or the heads over ranks, and gim would replace it. {_ADVICE}"
            )


def _is_built_in(implementation: str | None) -> bool:
    """Whether transformers has an implementation without a registered function: some are loaded at their first use."""
    return implementation in (None, "eager") or implementation.startswith("paged|") or "/" in implementation


def _interface(source: Any, name: str, kind: type, fallback: Any) -> Any:
    found = getattr(source, name, None)
    return found if isinstance(found, kind) else fallback


def _foreign(function: Any, beside: tuple[str, ...] = ()) -> str | None:
    """What of a function is not plain, itself, what it wraps, or what it calls, in words; None for nothing.

    Args:
        function: of an interface.
        beside: packages that are plain too.
    """
    for layer in _layers(function):
        if not _is_plain(home_of(layer), beside):
            return _described(layer)
        if isinstance(layer, FunctionType):
            called = (layer.__globals__.get(name) for name in layer.__code__.co_names)
            for one in called:
                if isinstance(one, FunctionType) and not _is_plain(home_of(one), beside):
                    return _described(one)
    return None


def _is_plain(home: str, beside: tuple[str, ...]) -> bool:
    if _is_in(home, ("torch.distributed",)):
        return False
    return _is_in(home, (*PLAIN, *beside)) or home.partition(".")[0] in sys.stdlib_module_names


def _is_in(home: str, packages: tuple[str, ...]) -> bool:
    return any(home == package or home.startswith(f"{package}.") for package in packages)


def _layers(function: Any) -> Iterator[Any]:
    """A function and what it wraps, outside first: partials, bound methods, decorated functions."""
    while function is not None:
        if isinstance(function, functools.partial):
            function = function.func
            continue
        function = getattr(function, "__func__", function)
        yield function
        function = getattr(function, "__wrapped__", None)


def home_of(function: Any) -> str:
    """The module whose file a function was written in, whatever ``functools.wraps`` has made it say."""
    function = next(_layers(function))
    if isinstance(function, FunctionType):
        return str(function.__globals__.get("__name__", ""))
    return str(getattr(function, "__module__", None) or type(function).__module__)


def _described(function: Any) -> str:
    function = next(_layers(function))
    code = getattr(function, "__code__", None)
    name = getattr(code, "co_qualname", None) or getattr(function, "__qualname__", type(function).__name__)
    return f"{home_of(function)}.{name}"


def _refuse_sharded_weights(modules: Mapping[str, nn.Module]) -> None:
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for name, module in modules.items():
        named = name or type(module).__name__
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            raise UnsupportedModelError(
                f"{named} is fully sharded (fully_shard, FSDP2): its parameters lie over the ranks and are whole only "
                f"while it runs. Give gim a model that is not sharded. {_TENSOR_PARALLEL}"
            )
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise UnsupportedModelError(
                f"{named} is wrapped in FullyShardedDataParallel (FSDP): its parameters lie over the ranks and are "
                f"whole only while it runs. Give gim a model that is not sharded. {_TENSOR_PARALLEL}"
            )
    for name, parameter in named_parameters(modules):
        if hasattr(parameter, "ds_id") and hasattr(parameter, "ds_status"):
            raise UnsupportedModelError(
                f"{name} is partitioned by ZeRO-3 of DeepSpeed: it lies over the ranks and is whole only while its "
                f"module runs. Give gim a model that is not partitioned. {_TENSOR_PARALLEL}"
            )


def _refuse_pipeline_stage(modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        if module.__dict__.get("_pp_stage") is not None or type(module).__name__ == "PipelineIdentityLayer":
            raise UnsupportedModelError(
                f"{name or type(module).__name__} is a stage of pipeline parallelism of transformers (pp_size): this "
                f"rank has only some of the layers. Give gim the whole model. {_TENSOR_PARALLEL}"
            )
    for stage in _stages_of_torch():
        held = getattr(stage, "submod", None)
        if isinstance(held, nn.Module) and any(module is held for module in modules.values()):
            raise UnsupportedModelError(
                f"{type(held).__name__} is the module of a {type(stage).__name__} of torch.distributed.pipelining: "
                f"this rank has only some of the layers. Give gim the whole model. {_TENSOR_PARALLEL}"
            )


def _stages_of_torch() -> Iterator[Any]:
    """Every pipeline stage of torch's in this process: a module does not know the stage that holds it."""
    stages: Any = sys.modules.get("torch.distributed.pipelining.stage")
    if stages is None:
        return iter(())
    # Asked by its type: an object may run code when asked for its class.
    return (held for held in gc.get_objects() if issubclass(type(held), stages._PipelineStageBase))


def _refuse_offloaded_weights(modules: Mapping[str, nn.Module]) -> None:
    if "accelerate.hooks" not in sys.modules:
        return
    for name, module in modules.items():
        hook = module.__dict__.get("_hf_hook")
        for one in () if hook is None else (hook, *getattr(hook, "hooks", ())):
            if getattr(one, "offload", False) is True:
                raise UnsupportedModelError(
                    f"{name or type(module).__name__} is offloaded by accelerate ({type(one).__name__}, offload=True): "
                    "its weights are in memory or on disk elsewhere and here only while it runs. Load the model with "
                    "a device_map of devices alone; gim.MemoryPlan spends less memory on activations instead"
                )

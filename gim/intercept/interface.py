"""Models of transformers: their attention and mask interfaces lead here while a forward pass of a session runs."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from gim.applied import UnsupportedModelError
from gim.intercept.attention import RULES, gim_attention
from gim.intercept.frames import Frame, running
from gim.intercept.masks import KeyPattern, key_pattern
from gim.intercept.session import Stack
from gim.parts import anatomy
from gim.parts.adapters import hugging_face
from gim.rules import Rules
from gim.rules import get as get_rules

#: Name of the implementation in both interfaces.
IMPLEMENTATION = "gim"


@functools.cache
def _telling(cls: Any) -> Any:
    """The class of configs of a class that can be told what to say; it says that it is the class itself, and so is a
    copy or a pickle."""

    def implementation(self: Any) -> Any:
        frames = running.frames
        if frames and frames[-1].shows is self:
            return "sdpa"
        if any(id(self) in frame.session.stack.configs for frame in frames):
            return IMPLEMENTATION
        return cls._attn_implementation.fget(self)

    def reduce(self: Any, protocol: Any) -> Any:
        made, (_, *rest), *state = cls.__reduce_ex__(self, protocol)
        return made, (cls, *rest), *state

    named = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    told = property(implementation, cls._attn_implementation.fset)
    named |= {"_attn_implementation": told, "__reduce_ex__": reduce, "__class__": property(lambda _: cls)}
    return type(cls.__name__, (cls,), named)


#: Of any object, whatever it says of itself.
_class: Any = vars(object)["__class__"]


_lock = threading.Lock()
#: Which forward passes run with each config, and what its class is. Two models may share one config, and two threads a
#: model: the first forward makes it one that says ``"gim"`` on the threads of such forwards alone, the last makes it
#: what it was.
_told: dict[int, tuple[Any, set[object]]] = {}


def _tell(config: Any, token: object) -> None:
    with _lock:
        own, tokens = _told.setdefault(id(config), (type(config), set()))
        tokens.add(token)
        _class.__set__(config, _telling(own))


def _release(config: Any, token: object) -> None:
    with _lock:
        own, tokens = _told.get(id(config), (None, set[object]()))
        tokens.discard(token)
        if own is not None and not tokens:
            _class.__set__(config, own)
            _told.pop(id(config), None)


def prepare(modules: Mapping[str, nn.Module], stack: Stack) -> None:
    """Let the forward passes of a stack's model, given by its modules, reach the interface, where its code has one."""
    classes: set[Any] = {type(module) for module in modules.values()} if hugging_face.models(modules) else set()
    callers = tuple(cls for cls in classes if _calls_torch(cls))
    if not callers and not any(uses_interface(cls) for cls in classes):
        return
    configs = stack.configs | {  # those of modules that have gone since may be in use on another thread
        id(config): config
        for module in modules.values()
        if hasattr(config := getattr(module, "config", None), "_attn_implementation_internal")
    }

    def enter(token: object) -> None:
        for config in configs.values():
            _tell(config, token)

    def leave(token: object) -> None:
        for config in configs.values():
            _release(config, token)

    stack.configs, stack.enter, stack.leave = configs, enter, leave
    if callers:
        stack.prepare = lambda module: _as_sdpa if isinstance(module, callers) else None


def uses_interface(cls: type) -> bool:
    """Whether a class comes from a file that calls the attention interface of transformers."""
    own = (base for base in cls.__mro__ if base.__module__ != PreTrainedModel.__module__)
    return any(hasattr(sys.modules.get(base.__module__), "ALL_ATTENTION_FUNCTIONS") for base in own)


@functools.cache
def _calls_torch(cls: Any) -> bool:
    """Whether a module of transformers attends by torch's own function and no interface."""
    if not cls.__module__.startswith("transformers.") or uses_interface(cls):
        return False
    own = (base for base in cls.__mro__ if base.__module__.startswith("transformers."))
    functions = (inspect.unwrap(one) for base in own for one in vars(base).values() if callable(one))
    codes = (getattr(one, "__code__", None) for one in functions)
    return any("scaled_dot_product_attention" in code.co_names for code in codes if code is not None)


def _as_sdpa(frame: Frame, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a module that itself calls torch's function: it sees its config say "sdpa", and no mask."""
    patterns = [one for one in (*inputs, *named.values()) if isinstance(one, KeyPattern)]
    frame.pattern = patterns[0] if patterns else None
    frame.shows = frame.module.__dict__.get("config")
    inputs = tuple(None if isinstance(one, KeyPattern) else one for one in inputs)
    return inputs, {key: None if isinstance(one, KeyPattern) else one for key, one in named.items()}


def set_attention_rules(model: PreTrainedModel, rules: Rules | str | None) -> None:
    """Give a model's attention rules of its own, outside any context: for code that does the rest itself.

    The model must use the implementation ``"gim"``, which is registered once this function is imported::

        from gim import set_attention_rules
        model.set_attn_implementation("gim")
        set_attention_rules(model, "GIM")

    What attention does of ``rules`` is then done in every forward pass: the softmax and the factors of q, k and v.
    Norms and gated MLPs are left to the caller; :func:`gim_kernels.rms_norm`, :func:`gim_kernels.layer_norm` and
    :func:`gim_kernels.gated` are theirs. Inside :class:`gim.GIM` the context's rules are in force.

    Args:
        model: a Hugging Face model.
        rules: :class:`gim.rules.Rules`, the name of a preset, or None to take them back.

    Raises:
        TypeError: model is not a Hugging Face model.
        ValueError: no preset has that name.
        UnsupportedModelError: the model's attention implementation is another.
    """
    modules = anatomy.of(model).modules if isinstance(model, nn.Module) else {}
    if "" not in hugging_face.models(modules):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    chosen = None if rules is None else get_rules(rules)
    if chosen is not None and model.config._attn_implementation != IMPLEMENTATION:
        raise UnsupportedModelError(
            f"{type(model).__name__} uses the attention implementation {model.config._attn_implementation!r}: call "
            'model.set_attn_implementation("gim") first'
        )
    for module in modules.values():
        if chosen is None:
            module.__dict__.pop(RULES, None)
        else:
            module.__dict__[RULES] = chosen


AttentionInterface.register(IMPLEMENTATION, gim_attention)
AttentionMaskInterface.register(IMPLEMENTATION, key_pattern)

"""Models of transformers: their attention and mask interfaces lead here while a forward pass of a session runs."""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from gim.applied import UnsupportedModelError
from gim.intercept.attention import RULES, gim_attention
from gim.intercept.session import Frame, Stack, running
from gim.patches.key_patterns import KeyPattern, key_pattern
from gim.rules import Rules
from gim.rules import get as get_rules

#: Name of the implementation in both interfaces.
IMPLEMENTATION = "gim"


class _Switches:
    """How many forward passes need each config to say ``"gim"``, and what it said before the first.

    Two models may share one config object, and two threads a model; the first switches it, the last puts it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, tuple[Any, str | None, int]] = {}

    def acquire(self, config: Any) -> None:
        with self._lock:
            _, before, users = self._open.get(id(config), (config, config._attn_implementation, 0))
            self._open[id(config)] = (config, before, users + 1)
            config._attn_implementation_internal = IMPLEMENTATION

    def release(self, config: Any) -> None:
        with self._lock:
            _, before, users = self._open.pop(id(config))
            if users > 1:
                self._open[id(config)] = (config, before, users - 1)
            else:
                config._attn_implementation_internal = before


_switches = _Switches()


def prepare(model: nn.Module, stack: Stack) -> None:
    """Let the forward passes of a stack's model reach the interface, where its code has one."""
    roots = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    classes = {type(module) for module in model.modules()} if roots else set()
    callers = tuple(cls for cls in classes if _calls_torch(cls))
    if not callers and not any(uses_interface(cls) for cls in classes):
        return
    configs = {
        id(config): config
        for module in model.modules()
        if hasattr(config := getattr(module, "config", None), "_attn_implementation_internal")
    }
    held = tuple(configs.values())

    @contextmanager
    def switched() -> Iterator[None]:
        done: list[Any] = []
        try:
            for config in held:
                _switches.acquire(config)
                done.append(config)
            yield
        finally:
            for config in done:
                _switches.release(config)

    stack.around = [switched]
    if callers:
        stack.prepare = lambda _, module: _as_sdpa if isinstance(module, callers) else None


def uses_interface(cls: type) -> bool:
    """Whether a class comes from a file that calls the attention interface of transformers."""
    own = (base for base in cls.__mro__ if base.__module__ != PreTrainedModel.__module__)
    return any(hasattr(sys.modules.get(base.__module__), "ALL_ATTENTION_FUNCTIONS") for base in own)


def _calls_torch(cls: type) -> bool:
    """Whether a module of transformers attends by torch's own function and no interface."""
    if not cls.__module__.startswith("transformers.") or uses_interface(cls):
        return False
    try:
        return "scaled_dot_product_attention(" in inspect.getsource(cls)
    except (OSError, TypeError):
        return False


def _as_sdpa(frame: Frame, inner: Callable[..., Any], inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Call a module that itself calls torch's function: it sees its config say "sdpa", and no mask."""
    patterns = [one for one in (*inputs, *named.values()) if isinstance(one, KeyPattern)]
    frame.pattern = patterns[0] if patterns else None
    inputs = tuple(None if isinstance(one, KeyPattern) else one for one in inputs)
    named = {key: None if isinstance(one, KeyPattern) else one for key, one in named.items()}
    module = frame.module
    config = module.__dict__.get("config")
    shown = copy.copy(config)
    if shown is not None:
        shown._attn_implementation_internal = "sdpa"
        module.__dict__["config"] = shown
    running.frames.append(frame)
    try:
        return inner(*inputs, **named)
    finally:
        running.frames.pop()
        if shown is not None:
            module.__dict__["config"] = config


def set_attention_rules(model: PreTrainedModel, rules: Rules | str | None) -> None:
    """Give a model's attention rules of its own, outside any context: for code that does the rest itself.

    The model must use the implementation ``"gim"``, which ``import gim`` registers::

        model.set_attn_implementation("gim")
        gim.set_attention_rules(model, "GIM")

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
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    chosen = None if rules is None else get_rules(rules)
    if chosen is not None and model.config._attn_implementation != IMPLEMENTATION:
        raise UnsupportedModelError(
            f"{type(model).__name__} uses the attention implementation {model.config._attn_implementation!r}: call "
            'model.set_attn_implementation("gim") first'
        )
    for module in model.modules():
        if chosen is None:
            module.__dict__.pop(RULES, None)
        else:
            module.__dict__[RULES] = chosen


AttentionInterface.register(IMPLEMENTATION, gim_attention)
AttentionMaskInterface.register(IMPLEMENTATION, key_pattern)

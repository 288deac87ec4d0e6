"""The state of one open context: what the patched modules consult, and the list of what must be undone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from gim.applied import Application, AppliedReport
from gim.rules import Rules

#: Name under which a module of a patched model holds its session; the rules live on the instances.
SESSION = "_gim_session"

#: Attribute of a replacing ``forward`` that holds the one it replaced.
_ORIGINAL = "_gim_original"

#: Parts of a decoder that run only with an encoder's output, by what is in their names.
OPTIONAL = ("encoder_attn", "cross_attn", "crossattention")

_MISSING = object()


_local = threading.local()


@contextmanager
def probing() -> Iterator[None]:
    """Inside, modules of this thread run to be looked at, and what they run is not counted."""
    before, _local.probing = getattr(_local, "probing", False), True
    try:
        yield
    finally:
        _local.probing = before


class Changes:
    """Changes of instances, each to be put back exactly as it was."""

    def __init__(self) -> None:
        self.undo = ExitStack()

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute on the instance alone, to be put back exactly as it was, or removed."""
        before = module.__dict__.get(name, _MISSING)
        module.__dict__[name] = value
        self.undo.callback(_put_back, module, name, before)

    def replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Give one instance another ``forward``, which remembers the one before."""
        setattr(forward, _ORIGINAL, original_forward(module))
        self.set_attribute(module, "forward", forward)

    def close(self) -> None:
        """Undo every change, the last first."""
        self.undo.close()


class Session(Changes):
    """Rules, report and undo list of one context over one model.

    Args:
        rules: what the backward does.
        strict: whether a part that is not covered is an error.
    """

    def __init__(self, rules: Rules, strict: bool) -> None:
        super().__init__()
        self.rules = rules
        self.strict = strict
        self.report = AppliedReport(rules=rules.describe())
        self.closed = False
        self.thread = threading.get_ident()
        #: Called when a forward pass of the model starts; and when it ends, for what it should have used and did not.
        self.start_of_forward: list[Callable[[], Any]] = []
        self.end_of_forward: list[Callable[[], list[tuple[str, str]]]] = []
        self._by_module: dict[str, Application] = {}
        self._ran: set[str] = set()

    def add(self, application: Application) -> None:
        """Enter a module in the report."""
        self._by_module[application.module] = application
        self.report.applications.append(application)
        self.report.found(application.part)

    def knows(self, module: str) -> bool:
        """Whether a module is in the report."""
        return module in self._by_module

    def unsupported(self, module: str, reason: str) -> None:
        """Note a part that a rule should act on and does not."""
        self.report.unsupported.append((module, reason))

    def count(self, module: str, engine: str) -> None:
        """Count one call of a patched module.

        A checkpoint runs its modules a second time inside the backward; that is the same application, not another.
        """
        if getattr(_local, "probing", False):
            return
        self._ran.add(module)
        if torch._C._current_graph_task_id() == -1:
            application = self._by_module[module]
            application.calls += 1
            application.engine = engine

    def start_forward(self) -> None:
        """Forget which modules ran in the forward before."""
        self._ran.clear()
        for begin in self.start_of_forward:
            begin()

    def not_run(self) -> list[str]:
        """The modules that a rule acts on and that should have run since :meth:`start_forward` and did not."""
        return [
            name for name in self._by_module if name not in self._ran and not any(part in name for part in OPTIONAL)
        ]

    def close(self) -> None:
        """Undo every change, the last first."""
        self.closed = True
        super().close()


def _put_back(module: nn.Module, name: str, before: Any) -> None:
    if before is _MISSING:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = before


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """A module's own ``forward``, also inside a context that has replaced it."""
    forward = module.forward
    return getattr(forward, _ORIGINAL, forward)


def session_of(module: nn.Module) -> Session | None:
    """The innermost open session of a module's model."""
    return module.__dict__.get(SESSION)

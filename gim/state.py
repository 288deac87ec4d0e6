"""What a module's code keeps between its calls: as it was in the first run, for the time it runs again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gim.applied import UnsupportedModelError

#: What every module holds, and what this package puts on one.
_EVERYONES = frozenset({*vars(nn.Module()), "forward"})
#: Attributes that are written in place.
_CONTAINERS = (list, dict, set)


class State:
    """The attributes of some modules and the tensors they hold, by reference; of lists, dicts and sets the entries.

    Args:
        modules: by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._held = [(_attributes(one), _tensors(one)) for one in modules.values()]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the modules hold what they held when this was made; afterwards what they held before.

        Raises:
            UnsupportedModelError: a tensor has been written in place, so that what it held is gone; names it.
        """
        later = State(self._modules)
        for (name, module), (_, then), (_, now) in zip(self._modules.items(), self._held, later._held, strict=True):
            for key, (tensor, version) in then.items():
                if key in now and now[key][0] is tensor and now[key][1] != version:
                    raise UnsupportedModelError(
                        f"{name or type(module).__name__}: its code writes into its {key}, so it does not do the same "
                        'when a memory plan runs it again: memory="none" can be applied'
                    )
        self._put()
        try:
            yield
        finally:
            later._put()

    def _put(self) -> None:
        for module, (attributes, tensors) in zip(self._modules.values(), self._held, strict=True):
            own = vars(module)
            for key in [key for key in own if _is_state(key) and key not in attributes]:
                del own[key]
            for key, (value, entries) in attributes.items():
                if own.get(key, self) is not value:
                    own[key] = value
                if entries is not None and (len(entries) != len(value) or not _same(entries, value)):
                    _refill(value, entries)
            for key, (tensor, _) in tensors.items():
                if key in own["_buffers"] and own["_buffers"][key] is not tensor:
                    own["_buffers"][key] = tensor


def _is_state(key: str) -> bool:
    return key not in _EVERYONES and not key.startswith("_gim")


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    return {
        key: (value, value.copy() if type(value) in _CONTAINERS else None)
        for key, value in vars(module).items()
        if _is_state(key)
    }


def _tensors(module: nn.Module) -> dict[str, tuple[torch.Tensor, int]]:
    """The tensors that a module holds itself, and how often each has been written."""
    held = {**module._buffers, **vars(module)}
    return {
        key: (one, 0 if one.is_inference() else one._version)
        for key, one in held.items()
        if isinstance(one, torch.Tensor)
    }


def _same(one: Any, other: Any) -> bool:
    """Whether two containers hold the same objects; entries may be tensors, whose comparison gives a tensor."""
    if isinstance(one, set):
        return one == other
    if isinstance(one, dict):
        return all(a == b and x is y for (a, x), (b, y) in zip(one.items(), other.items(), strict=True))
    return all(a is b for a, b in zip(one, other, strict=True))


def _refill(container: Any, entries: Any) -> None:
    container.clear()
    container.extend(entries) if isinstance(container, list) else container.update(entries)

"""Packages of the extras ``evaluate``, ``circuits`` and ``graphviz``, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

#: Who needs the packages of an extra.
USERS = {"evaluate": "gim.evaluate", "circuits": "gim.circuits", "graphviz": "Circuit.to_graphviz"}


def need(module: str, extra: str = "evaluate") -> Any:
    """A module of an optional package.

    Args:
        module: its name, such as ``scipy.stats``.
        extra: that installs it.

    Raises:
        ImportError: the package is not there; the message names the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there, and something that it needs is not
        raise ImportError(f"{USERS[extra]} needs {package}: pip install 'gim-kernels[{extra}]'") from error

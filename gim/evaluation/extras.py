"""Packages of the extra ``evaluate``, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def need(module: str) -> Any:
    """A module of an optional package.

    Args:
        module: its name, such as ``scipy.stats``.

    Raises:
        ImportError: the package is not there; the message names the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there, and something that it needs is not
        raise ImportError(f"gim.evaluate needs {package}: pip install 'gim-kernels[evaluate]'") from error

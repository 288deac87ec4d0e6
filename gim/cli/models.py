"""Models, rules, engines and devices by the names that the command line has for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from gim.cli.errors import UserError
from gim.cli.options import Dtype, EngineName

if TYPE_CHECKING:
    from gim.rules import Rules


def rules_named(name: str, temperature: float | None) -> Rules:
    """The preset of that name, with another temperature if one is given."""
    from gim.rules import get

    try:
        rules = get(name)
        if temperature is None:
            return rules
        if rules.softmax != "temperature":
            raise UserError(f"--temperature: the rules {rules.name} have no softmax temperature")
        return dataclasses.replace(rules, temperature=temperature)
    except ValueError as error:
        raise UserError(f"--{error}") from error


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Inside, a terminal says that something is loaded, which takes seconds before anything else shows."""
    from rich.console import Console
    from rich.text import Text

    err = Console(stderr=True)
    with err.status(Text(f"loading {what}")) if err.is_terminal else nullcontext():
        yield


def load(
    name: str, device: str, dtype: Dtype, trust_remote_code: bool, *, with_tokenizer: bool = True
) -> tuple[Any, Any]:
    """The model, in evaluation mode on its device, and its tokenizer."""
    with loading(name):
        return _load(name, device, dtype, trust_remote_code, with_tokenizer)


def _load(name: str, device: str, dtype: Dtype, trust_remote_code: bool, with_tokenizer: bool) -> tuple[Any, Any]:
    from gim import loading

    _check_folder(name)
    quieten()
    where = device_named(device)
    chosen = None if dtype is Dtype.AUTO else dtype.value
    try:
        if with_tokenizer:
            return loading.load(name, dtype=chosen, device=where, trust_remote_code=trust_remote_code)
        model = loading.load_model(name, dtype=chosen, device=where, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model: cannot load {name!r}: {error}") from error
    return model, None


def _check_folder(name: str) -> None:
    from gim.loading import check_folder

    try:
        check_folder(name)
    except FileNotFoundError as error:
        raise UserError(f"model: {error}") from error


def quieten() -> None:
    """Keep libraries from writing between our lines; what they raise and warn of is shown by us."""
    import huggingface_hub
    import transformers
    from rich.console import Console

    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    if not Console(stderr=True).is_terminal:
        transformers.utils.logging.disable_progress_bar()


def refuse_engine(engine: EngineName, model: Any) -> None:
    """Refuse an engine that cannot run a model where it lies, before anything runs."""
    from gim.context import check_engine

    try:
        check_engine(engine.value, model)
    except (TypeError, RuntimeError) as error:
        raise UserError(f"--engine: {error}") from error


def token_count(tokenizer: Any, prompt: Any) -> int:
    """How many tokens a prompt has."""
    from gim.prompts import encode

    return len(encode(prompt, tokenizer).ids)


def twin_of(name: str, rules: Rules, device: Any, dtype: Dtype, trust_remote_code: bool) -> Any:
    """A model's stand-in without memory, from its config."""
    import torch
    import transformers

    from gim.estimate import EstimateError, Twin

    _check_folder(name)
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        return Twin(config, rules, device=device, dtype=None if dtype is Dtype.AUTO else getattr(torch, dtype.value))
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model: cannot load the config of {name!r}: {error}") from error
    except EstimateError as error:
        raise UserError(f"model: {error}") from error


def device_named(name: str) -> Any:
    """The device of that name, if it is there."""
    from gim import loading

    try:
        return loading.device_named(None if name == "auto" else name)
    except ValueError as error:
        raise UserError(f"--device: {error}") from error

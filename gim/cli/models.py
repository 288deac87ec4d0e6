"""Models, rules, engines and devices by the names that the command line has for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
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


def _check_folder(name: str) -> None:
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if not name or (looks_like_path and not Path(name).is_dir()):
        raise UserError(f"model: there is no folder {name!r}")


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
    _check_folder(name)
    with loading(name):
        return _load(name, device, dtype, trust_remote_code, with_tokenizer)


def _load(name: str, device: str, dtype: Dtype, trust_remote_code: bool, with_tokenizer: bool) -> tuple[Any, Any]:
    import torch
    import transformers
    from safetensors import SafetensorError

    from gim.loading import check_weights

    quieten()
    where = device_named(device)
    try:
        tokenizer = (
            transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
            if with_tokenizer
            else None
        )
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        check_weights(name, config)
        model, info = _auto_class(config).from_pretrained(
            name,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            dtype="auto" if dtype is Dtype.AUTO else getattr(torch, dtype.value),
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"model: cannot load {name!r}: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        # They would be random numbers, and so would every attribution.
        raise UserError(f"model: the files of {name!r} lack {len(missing)} weights, such as {missing[0]}")
    return model.to(where).eval(), tokenizer


def _auto_class(config: Any) -> Any:
    """What a checkpoint was saved as: a causal or a masked language model, or a sequence classifier."""
    import transformers

    saved_as = next(iter(getattr(config, "architectures", None) or ()), "")
    for ending in ("ForMaskedLM", "ForSequenceClassification"):
        if saved_as.endswith(ending):
            return getattr(transformers, f"AutoModel{ending}")
    return transformers.AutoModelForCausalLM


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
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"--device: {name!r} is not a device that is there: {first}") from error
    return device

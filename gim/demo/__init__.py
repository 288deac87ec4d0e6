"""A small trained model that looks facts up in its prompt, and a long prompt to explain."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from gim.demo.prompts import Prompt, Statement, make_prompt

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["Prompt", "Statement", "load", "make_prompt", "model_folder", "prompt"]


def model_folder() -> Path:
    """Say where the packaged model lies.

    Returns:
        A folder that the `from_pretrained` methods of transformers accept.

    Raises:
        FileNotFoundError: if the package was installed without its model.
    """
    folder = Path(str(resources.files(__package__))) / "model"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no demo model in {folder}: reinstall the package, or train one with `python -m gim.demo.train --out DIR`"
        )
    return folder


def load(
    device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the packaged model and its tokenizer, without any download.

    Args:
        device: where to put the model.
        dtype: type of its weights; None for float32.

    Returns:
        The model, in evaluation mode, and the tokenizer, which puts BOS first by itself.

    Raises:
        FileNotFoundError: if the package was installed without its model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = model_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32, local_files_only=True)
    model.config.name_or_path = "gim demo model"  # what reports show, in place of the folder's name
    return model.to(device).eval(), _tokenizer(folder)


def prompt(seed: int | str = 0, *, tokens: int = 2048, facts: int = 8) -> Prompt:
    """Make the demo prompt: long, several facts, the asked one stated twice and far apart.

    Args:
        seed: which prompt; all of them are held out from training.
        tokens: least number of tokens, BOS included.
        facts: number of different facts.

    Returns:
        The prompt, with the places of both statements.

    Raises:
        ValueError: if `facts` is not between 1 and 32, or `tokens` too small for them.
        FileNotFoundError: if the package was installed without its model.
    """
    tokenizer = _tokenizer(model_folder())
    return make_prompt(
        seed,
        facts=facts,
        statements=2,
        tokens=tokens,
        count_tokens=lambda text: len(tokenizer(text).input_ids),
    )


@cache
def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer once."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)

"""A front end that keeps its own code: gim-explain, with this package's attention in place of torch's.

gim-explain replaces ``F.scaled_dot_product_attention`` to scale the gradients of queries, keys and values, and Python's
softmax for its temperature; fused attention never calls the second, so that on a Hugging Face model the temperature has
no effect. With ``gim_kernels.scaled_dot_product_attention`` as the function that it wraps, it does.

Run it where ``import gim`` finds gim-explain and ``import gim_kernels`` this package:

    PYTHONPATH=gim-explain python examples/other_front_end.py MODEL PROMPT [--temperatures T ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import gim  # gim-explain's, not this repository's
import gim_kernels


def attributions(model: Any, ids: torch.Tensor, baseline: int, temperature: float, *, stock: bool) -> torch.Tensor:
    """gim-explain's scores ``[T]``, with torch's attention (``stock``) or with this package's."""
    own = F.scaled_dot_product_attention
    if not stock:
        # The one name that changes. A front end of one's own would write it where it calls attention.
        F.scaled_dot_product_attention = functools.partial(
            gim_kernels.scaled_dot_product_attention, softmax_backward="temperature", temperature=temperature
        )
    try:
        return gim.explain(model, ids, baseline_token_id=baseline, softmax_temperature=temperature)
    finally:
        F.scaled_dot_product_attention = own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name or folder of a causal language model")
    parser.add_argument("prompt")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[2.0])
    parser.add_argument("--json", type=Path, help="write ids and scores here")
    arguments = parser.parse_args()
    if hasattr(gim, "attribute"):
        parser.error(f"`import gim` found {gim.__file__}, which is not gim-explain: put its folder first on PYTHONPATH")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = tokenizer(arguments.prompt, return_tensors="pt").input_ids
    baseline = tokenizer.encode(" ", add_special_tokens=False)[0]
    found = []
    for temperature in arguments.temperatures:
        stock, ours = (attributions(model, ids, baseline, temperature, stock=stock) for stock in (True, False))
        print(f"temperature {temperature:g}: torch's attention, gim_kernels'")
        for token, before, after in zip(tokenizer.convert_ids_to_tokens(ids[0]), stock, ours, strict=True):
            print(f"{before:+.4f} {after:+.4f} {token}")
        found.append({"temperature": temperature, "stock": stock.tolist(), "ours": ours.tolist()})
    if arguments.json:
        result = {"ids": ids[0].tolist(), "baseline": baseline, "scores": found}
        arguments.json.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()

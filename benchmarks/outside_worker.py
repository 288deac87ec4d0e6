"""Runs in another environment, where the package ``gim`` is gim-explain's: one rival, driven over a pipe.

Each line of standard input is a command in JSON, each line of the answer too. It imports nothing of this project.
Started by :mod:`benchmarks.outside`.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import sys
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

#: TransformerLens's function that converts the weights, by model type.
CONVERSIONS = {"llama": "convert_llama_weights", "qwen2": "convert_qwen2_weights"}
#: How far logits of the same weights in other code may be off, by dtype: what rounding explains.
LOGITS_RELATIVE = {"torch.float32": 1e-4, "torch.bfloat16": 0.05, "torch.float16": 0.01}


def status(field: str) -> int:
    """A field of the process's status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def tokenizer() -> Any:
    """The least that TransformerLens accepts."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def of_transformer_lens(name: str, module: str = "transformer_lens") -> Any:
    """A class or function of TransformerLens, which got its bridge in 3.0 and lost HookedTransformer in 4.0."""
    try:
        return getattr(importlib.import_module(module), name)
    except (AttributeError, ImportError) as error:
        if error.name not in (name, module):
            raise  # something that it imports is missing
        raise RuntimeError(f"transformer-lens {version('transformer-lens')} has no {name}") from error


def bridge(model: Any, folder: str, device: str) -> Any:
    """The model in TransformerLens's bridge, with the names of hooks that gim-explain looks for."""
    wrapper = of_transformer_lens("TransformerBridge", "transformer_lens.model_bridge")
    tokenizer().save_pretrained(folder)  # it reads one from there, and prompts come as ids
    lens = wrapper.boot_transformers(folder, hf_model=model, device=device)
    lens.enable_compatibility_mode(disable_warnings=True, no_processing=True)  # weights stay as they are
    return lens


def hooked_transformer(model: Any, tokens: int) -> Any:
    """A Llama or Qwen2 as a HookedTransformer, for prompts of at most ``tokens``.

    TransformerLens's own loader derives head sizes from the name or the width, so the config is written out here; the
    weights are converted by its own functions, unprocessed.
    """
    hooked, hooked_config = of_transformer_lens("HookedTransformer"), of_transformer_lens("HookedTransformerConfig")
    config = model.config
    if config.model_type not in CONVERSIONS:
        raise NotImplementedError(f"{config.model_type} is not converted to a HookedTransformer here")
    if config.rope_parameters.get("rope_type", "default") != "default":
        raise NotImplementedError(f"rotary angles of type {config.rope_parameters['rope_type']} are not converted here")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise NotImplementedError("sliding windows are not converted here")
    grouped = config.num_key_value_heads != config.num_attention_heads or config.model_type == "qwen2"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weight = model.get_input_embeddings().weight
    cfg = hooked_config(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_ctx=tokens,  # older releases hold a mask of its square
        d_head=size,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads if grouped else None,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        act_fn=config.hidden_act,
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_dim=size,
        rotary_base=int(config.rope_parameters["rope_theta"]),
        rotary_adjacent_pairs=False,
        eps=config.rms_norm_eps,
        original_architecture=type(model).__name__,
        init_weights=False,
        dtype=weight.dtype,
        device=str(weight.device),
    )
    convert = of_transformer_lens(CONVERSIONS[config.model_type], "transformer_lens.pretrained.weight_conversions")
    lens = hooked(cfg)
    lens.load_and_process_state_dict(
        convert(model, cfg), fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return lens.eval()


def check_logits(lens: Any, model: Any, tokens: int) -> None:
    """Raise where the two do not compute the same; what is timed must be the same model."""
    import torch

    ids = (torch.arange(min(tokens, 32)) * 7919 % model.config.vocab_size).to(model.device)[None]
    with torch.no_grad():
        want, got = model(ids, use_cache=False).logits.double(), lens(ids).double()
    error = float((got - want).norm() / want.norm())
    if not error <= LOGITS_RELATIVE[str(model.dtype)]:
        raise RuntimeError(f"the converted model's logits are {error:.1e} off")


class Worker:
    """A loaded model and the rival's ``explain`` on it."""

    def load(self, system: str, folder: str, device: str, threads: int, tokens: int) -> dict[str, Any]:
        """Load the model, put it in TransformerLens where that is wanted, and say which versions run."""
        names = ["gim-explain", "transformers", "torch", *(["transformer-lens"] if system != "hugging_face" else [])]
        versions = ", ".join(f"{name} {version(name)}" for name in names)
        wanted = Path(str(distribution("gim-explain").locate_file("gim/__init__.py")))
        import torch
        import transformers

        import gim

        if not wanted.samefile(gim.__file__):
            raise RuntimeError(f"the package gim of that environment is {gim.__file__}, not gim-explain's {wanted}")
        torch.set_num_threads(threads)
        self.torch, self.explain, self.device = torch, gim.explain, torch.device(device)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        model = model.to(self.device).eval()
        if system == "bridge":
            model = bridge(model, folder, device)
        elif system == "hooked_transformer":
            lens = hooked_transformer(model, tokens)
            check_logits(lens, model, tokens)
            model = lens
        # As our own cases have it: no gradient of a weight is computed, which nobody asked for.
        self.model = model.requires_grad_(False)
        return {"versions": versions}

    def set_ids(self, ids: list[int]) -> dict[str, Any]:
        """The prompt of all that follows."""
        self.ids = self.torch.tensor([ids], device=self.device)
        return {}

    def run(self, target: int, baseline: int) -> dict[str, Any]:
        """One attribution with the package's defaults."""
        found = self.explain(self.model, self.ids, target_token_id=target, baseline_token_id=baseline)
        if self.device.type == "cuda":
            self.torch.cuda.synchronize(self.device)
        return {"scores": found.float().flatten().tolist()}

    def peak(self, target: int, baseline: int) -> dict[str, Any]:
        """Memory that one attribution adds at its peak, in bytes; measured as the other systems' is."""
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            self.torch.cuda.reset_peak_memory_stats(self.device)
            held = self.torch.cuda.memory_allocated(self.device)
            self.run(target, baseline)
            return {"bytes": self.torch.cuda.max_memory_allocated(self.device) - held}
        ctypes.CDLL(None).malloc_trim(0)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.run(target, baseline)
        return {"bytes": status("VmHWM") - before}


def main() -> None:
    """Answer commands until standard input ends."""
    # Whole score matrices may not fit: where memory runs out, it is this process that ends, and a row says so.
    if sys.platform == "linux":
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    # Libraries print: only answers may go to the pipe.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except BaseException as error:  # whatever it is, the other side turns it into a row
            first = next((one for one in str(error).splitlines() if one.strip()), "")
            answer = {"error": f"{type(error).__name__}: {first.strip()}"[:300]}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()

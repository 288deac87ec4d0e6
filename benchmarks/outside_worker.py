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


class Worker:
    """A loaded model and the rival's ``explain`` on it."""

    def load(self, system: str, folder: str, device: str, threads: int) -> dict[str, Any]:
        """Load the model, wrap it in TransformerLens where that is wanted, and say which versions run."""
        import torch
        import transformers

        import gim

        wanted = Path(str(distribution("gim-explain").locate_file("gim/__init__.py")))
        if not wanted.samefile(gim.__file__):
            raise RuntimeError(f"the package gim of that environment is {gim.__file__}, not gim-explain's {wanted}")
        torch.set_num_threads(threads)
        self.torch, self.explain, self.device = torch, gim.explain, torch.device(device)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        model = model.to(self.device).eval()
        names = ["gim-explain", "transformers", "torch"]
        if system == "transformer_lens":
            bridge = importlib.import_module("transformer_lens.model_bridge").TransformerBridge
            names.append("transformer-lens")
            tokenizer().save_pretrained(folder)  # it reads one from there, and prompts come as ids
            model = bridge.boot_transformers(folder, hf_model=model, device=device)
            # The names of hooks that gim-explain looks for; weights stay as they are.
            model.enable_compatibility_mode(disable_warnings=True, no_processing=True)
        self.model = model
        return {"versions": ", ".join(f"{name} {version(name)}" for name in names)}

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

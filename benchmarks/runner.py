"""Runs a suite, checks every case first, and writes its results as JSON: ``python -m benchmarks.runner explain``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import gim
import gim.demo
from benchmarks import statements as demo_statements
from benchmarks.cases import EXPLAIN_TOKENS, DecoderCase, small_decoder
from benchmarks.measure import MIB, Times, available_bytes, environment, interleaved, peak_bytes
from gim.rules import PRESETS
from tests import eager
from tests.oracle import assert_within_budget

SCHEMA = 1
BASELINE = 0
#: Length at which every system is held against float64 before anything is timed.
CHECK_TOKENS = 256

app = typer.Typer(add_completion=False, help="Throughput and memory of gim-kernels and its rivals.")
console = Console()


def _systems(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Ours and the rival for one model and prompt; the rival is the correct eager implementation of the tests."""

    def ours(rules: str, memory: str) -> Callable[[], torch.Tensor]:
        return lambda: gim.explain(model, ids, baseline_token_id=BASELINE, rules=rules, memory=memory)

    def eager_gim() -> torch.Tensor:
        # Only the last position goes through the head, as in ours.
        table = model.get_input_embeddings().weight
        embedded = table[ids].detach().requires_grad_(True)
        last = torch.tensor([ids.shape[1] - 1])
        logits = eager.forward(model, embedded, eager.PRESETS["GIM"], kept=last)[0, 0]
        (grad,) = torch.autograd.grad(logits.max(), embedded)
        return ((embedded.detach() - table[BASELINE]) * grad).sum(-1)[0]

    return {
        "gim-kernels GIM": ours("GIM", "none"),
        "gim-kernels GIM, checkpoints": ours("GIM", "layer"),
        "gim-kernels GIM_CONSTANT": ours("GIM_CONSTANT", "none"),
        "gim-kernels exact gradient": ours("GRADIENT", "none"),
        "eager GIM": eager_gim,
    }


def check(case: DecoderCase) -> None:
    """Refuse to time a case whose systems are wrong: each is held against float64 at a short length."""
    model, ids = case.build()
    ids = ids[:, :CHECK_TOKENS]
    double = case.build()[0].double()
    for name, run in _systems(model, ids).items():
        preset = {"gim-kernels GIM_CONSTANT": "GIM_CONSTANT", "gim-kernels exact gradient": "GRADIENT"}.get(name, "GIM")
        rules = eager.PRESETS[preset]
        assert preset in PRESETS
        truth, _ = eager.attribution(double, ids, rules, baseline=BASELINE)
        yardstick, _ = eager.attribution(model, ids, rules, baseline=BASELINE, dtype=torch.float32)
        assert_within_budget(run(), truth[0], yardstick[0], name)


def _rows(case: DecoderCase, repeats: int) -> list[dict[str, Any]]:
    model, ids = case.build()
    systems = _systems(model, ids)
    rows: list[dict[str, Any]] = []
    free = available_bytes()
    if case.eager_bytes() > 0.8 * free:
        del systems["eager GIM"]
        needed = f"needs at least {case.eager_bytes() / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
        rows.append({"system": "eager GIM", "note": needed})
    peaks = {name: peak_bytes(run) for name, run in systems.items()}  # each one's warm-up, too
    times: dict[str, Times] = interleaved(systems, repeats)
    for name, measured in times.items():
        rate = case.flops() / measured.median / 1e9
        rows.append(
            {"system": name, **measured.to_dict(), "peak_mib": round(peaks[name] / MIB, 1), "gflops": round(rate, 1)}
        )
    return [{"case": case.name, "tokens": case.tokens, **row} for row in rows]


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="explain: one attribution, forward and backward")
    for column in ("tokens", "system", "median ms", "min .. max", "peak MiB", "GFLOP/s", ""):
        table.add_column(column, justify="left" if column in ("system", "") else "right")
    for row in rows:
        if "note" in row:
            table.add_row(str(row["tokens"]), row["system"], "", "", "", "", row["note"])
        else:
            spread = f"{row['min_ms']:.0f} .. {row['max_ms']:.0f}"
            numbers = (f"{row['median_ms']:.0f}", spread, f"{row['peak_mib']:.0f}", f"{row['gflops']:.0f}")
            table.add_row(str(row["tokens"]), row["system"], *numbers, "")
    console.print(table)


def write(folder: Path, suite: str, rows: list[dict[str, Any]]) -> Path:
    """Write what has been measured so far, so that a cut run leaves its results.

    Rows that the same machine measured on the same day at other lengths stay in the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {"schema": SCHEMA, "suite": suite, **environment(), "rows": rows}
    slug = "".join(c if c.isalnum() else "-" for c in found["device"].split(",")[0].lower()).strip("-")
    path = folder / f"{suite}-{slug}-{found['date']}.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))["rows"]
        measured = {row.get("tokens") for row in rows}
        found["rows"] = [row for row in before if row.get("tokens") not in measured] + rows
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return path


@app.command()
def explain(
    json_folder: Annotated[Path | None, typer.Option("--json", help="Folder for the results.")] = None,
    tokens: Annotated[str, typer.Option(help="Prompt lengths.")] = ",".join(map(str, EXPLAIN_TOKENS)),
    repeats: Annotated[int, typer.Option(min=1, help="Timed repetitions of each system.")] = 3,
) -> None:
    """One attribution end to end, against correct eager GIM, interleaved."""
    lengths = [int(length) for length in tokens.split(",")]
    check(small_decoder(max(lengths)))
    console.print(f"every system agrees with float64 at {CHECK_TOKENS} tokens")
    rows: list[dict[str, Any]] = []
    for length in lengths:
        rows += _rows(small_decoder(length), repeats)
        if json_folder is not None:
            path = write(json_folder, "explain", rows)
    _show(rows)
    if json_folder is not None:
        console.print(f"written to {path}")


@app.command()
def statements(
    json_folder: Annotated[Path | None, typer.Option("--json", help="Folder for the results.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts for each preset.")] = demo_statements.PROMPTS,
) -> None:
    """How often each preset finds both statements of the asked fact in the demo model's prompts."""
    model, tokenizer = gim.demo.load()
    rows: list[dict[str, Any]] = []
    for rules in PRESETS:
        rows.append({"rules": rules, **demo_statements.count(model, tokenizer, rules, prompts)})
        console.print(rows[-1])
        if json_folder is not None:
            write(json_folder, "statements", rows)


@app.callback()
def main() -> None:
    """Choose a suite."""


if __name__ == "__main__":
    app()

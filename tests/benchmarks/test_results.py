"""Results files: read back, compared on one device only, fitted, tabulated and drawn."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import __main__ as program
from benchmarks import conftest, documents, report
from benchmarks.results import SCHEMA, ResultsError, compare, default_name, growth, load, merged, save

RESULTS_FOLDER = Path(__file__).parents[2] / "benchmarks" / "results"


def row(system: str, tokens: int, time: float, peak: float, **more: Any) -> dict[str, Any]:
    config = "step temperature D64 8/8 heads causal float32"
    return {
        "case": f"attention {config} T{tokens}", "op": "attention", "config": config, "tokens": tokens,
        "system": system, "median_ms": time, "min_ms": 0.9 * time, "q1_ms": 0.95 * time, "q3_ms": 1.05 * time,
        "max_ms": 1.2 * time, "repeats": 5, "peak_mib": peak, "gflops": 10.0, "roofline_ms": time / 4,
        "roofline_share": 0.25, **more,
    }  # fmt: skip


def results(device: str = "AMD EPYC, 2 threads", suite: str = "attention") -> dict[str, Any]:
    """Ours linear in memory and quadratic in time; eager quadratic in both, and too large for the longest."""
    rows = []
    for tokens in (1024, 2048, 4096, 8192):
        unit = tokens / 1024
        rows.append(row("gim-kernels", tokens, 2 * unit**2, 3 * unit))
        rows.append(row("torch SDPA, exact", tokens, 1.6 * unit**2, 3 * unit, backend="FLASH_ATTENTION"))
        if tokens < 8192:
            rows.append(row("eager GIM", tokens, 10 * unit**2, 40 * unit**2))
        else:
            keep = ("case", "op", "config", "tokens")
            rows.append({**{k: rows[-1][k] for k in keep}, "system": "eager GIM", "note": "skipped: needs 99 GiB"})
    return {
        "schema": SCHEMA, "suite": suite, "device": device, "system": "Linux", "versions": {"torch": "2.13"},
        "commit": "abc", "date": "2026-01-02", "complete": True, "rows": rows,
        "machine": {"copy_gb_per_s": 20.0, "matrix_gflops": {"float32": 90.0}, "clocks": {}},
    }  # fmt: skip


def written(path: Path, found: Any) -> Path:
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    return path


# ------------------------------------------------------------------------------------------------------- reading


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    save(tmp_path / "a.json", results())
    assert load(tmp_path / "a.json") == results()


@pytest.mark.parametrize("path", sorted(RESULTS_FOLDER.glob("*-*.json")), ids=lambda path: path.name)
def test_committed_results_are_readable(path: Path) -> None:
    found = load(path)
    assert path.name == default_name(found)
    Console(record=True).print(report.headline(found), report.roofline_line(found))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"schema": 1, "rows": []}, "schema version 1, and this program reads version 2 only"),
        ({"schema": 3, "rows": []}, "schema version 3, and this program reads version 2 only"),
        ({"rows": []}, "it has no schema version"),
        ([1, 2], "it has no schema version"),
        ("{", "not a results file: Expecting"),
        ({"schema": 2, "suite": "quick"}, "it has no device, versions, commit, date, rows"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ResultsError, match=message):
        load(written(tmp_path / "a.json", content))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="No such file"):
        load(tmp_path / "a.json")


# ------------------------------------------------------------------------------------------------------ comparing


def test_a_comparison_tells_what_is_beyond_the_spread() -> None:
    new = copy.deepcopy(results())
    new["rows"][0] |= {"median_ms": 2.02, "q1_ms": 1.95, "q3_ms": 2.1, "peak_mib": 6.0}
    new["rows"][1] |= {"median_ms": 3.2, "q1_ms": 3.1, "q3_ms": 3.3}
    found = compare(results(), new)
    assert found[0]["time_ratio"] == pytest.approx(1.01) and not found[0]["beyond_spread"]
    assert found[0]["memory_ratio"] == 2.0
    assert found[1]["time_ratio"] == pytest.approx(2.0) and found[1]["beyond_spread"]
    assert len(found) == 11  # the skipped one has no time


def test_different_devices_or_suites_are_not_compared() -> None:
    with pytest.raises(ResultsError, match="different devices cannot be compared: 'AMD EPYC, 2 threads' and 'H100'"):
        compare(results(), results("H100"))
    with pytest.raises(ResultsError, match="different devices"):
        compare(results(), results("AMD EPYC, 4 threads"))
    with pytest.raises(ResultsError, match="different suites"):
        compare(results(), results(suite="quick"))
    other = {**results(), "rows": []}
    with pytest.raises(ResultsError, match="no measured case and system in common"):
        compare(results(), other)


def test_pytest_benchmark_compares_one_device_only(pytestconfig: pytest.Config) -> None:
    here: dict[str, Any] = {"node": "somebodys-laptop", "system": "Linux"}
    conftest.pytest_benchmark_update_machine_info(pytestconfig, here)
    assert list(here) == ["system", "device"] and "threads" in here["device"]
    stored = {"machine_info": dict(here)}
    conftest.pytest_benchmark_compare_machine_info(pytestconfig, None, here, stored)
    saved = {"benchmarks": [{"name": "a", "params": {"case": "UNSERIALIZABLE[...]"}}]}
    conftest.pytest_benchmark_update_json(pytestconfig, None, saved)
    assert saved == {"benchmarks": [{"name": "a", "params": None}]}
    stored["machine_info"]["device"] = "NVIDIA H100"
    with pytest.raises(pytest.UsageError, match="different devices cannot be compared: 'NVIDIA H100' and"):
        conftest.pytest_benchmark_compare_machine_info(pytestconfig, None, here, stored)


def test_rows_of_the_same_code_on_the_same_device_are_merged_into_a_file(tmp_path: Path) -> None:
    first, second = results(), results()
    first["rows"], second["rows"] = first["rows"][:6], second["rows"][6:]
    assert merged(tmp_path / "a.json", first) == first
    save(tmp_path / "a.json", first)
    assert merged(tmp_path / "a.json", second)["rows"] == results()["rows"]
    assert merged(tmp_path / "a.json", {**second, "commit": "other"})["rows"] == second["rows"]


# --------------------------------------------------------------------------------------------------------- growth


def test_exponents_are_fitted() -> None:
    found = {one["system"]: one for one in growth(results()["rows"])}
    assert found["gim-kernels"]["time"] == pytest.approx(2.0) and found["gim-kernels"]["memory"] == pytest.approx(1.0)
    assert found["eager GIM"]["memory"] == pytest.approx(2.0) and found["eager GIM"]["lengths"] == (1024, 4096)


def test_two_lengths_are_too_few_and_configs_are_apart() -> None:
    assert growth(results()["rows"][:6]) == []
    rows = [{**one, "config": f"{one['config']} {index}"} for index, one in enumerate(results()["rows"])]
    assert growth(rows) == []


# -------------------------------------------------------------------------------------------------- tables, pictures


def test_a_picture_has_a_line_for_each_system_and_the_roofline_on_logarithmic_axes(tmp_path: Path) -> None:
    drawn = report.figure(results())
    time_axis, memory_axis = drawn.axes
    for axis in (time_axis, memory_axis):
        assert axis.get_xscale() == axis.get_yscale() == "log"
    labels = {line.get_label(): line for line in time_axis.get_lines()}
    assert {"gim-kernels", "torch SDPA, exact", "eager GIM", "roofline"} <= labels.keys()
    assert list(labels["gim-kernels"].get_ydata()) == [2, 8, 32, 128]
    assert list(labels["roofline"].get_ydata()) == [0.4, 1.6, 6.4, 25.6]
    crosses = [line for line in time_axis.get_lines() if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[8192]]
    report.plot(results(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        report.figure({**results(), "rows": []})


def test_a_busy_machine_is_told() -> None:
    told = report.busy({"machine": {"busy_share": 0.42}})
    assert told == "others use 42% of this machine's cores: do not trust these times"
    assert report.busy({"machine": {"busy_share": 0.05}}) == report.busy({"machine": None}) == ""


def test_a_config_of_one_length_is_drawn_only_where_there_is_nothing_else() -> None:
    found = results()
    alone = [{**one, "config": "alone"} for one in found["rows"][:2]]
    assert len(report.figure({**found, "rows": [*found["rows"], *alone]}).axes) == 2
    assert len(report.figure({**found, "rows": alone}).axes) == 2


def test_tables_show_ratios_shares_and_notes() -> None:
    console = Console(record=True, width=100)
    console.print(report.case_table(results()["rows"][9:]))
    shown = " ".join(console.export_text().split())
    assert "gim-kernels 128 ±5% 1.00x 24.0 10 25%" in shown
    assert "torch SDPA, exact 102 ±5% 0.80x" in shown and "FLASH_ATTENTION" in shown
    assert "eager GIM skipped: needs 99 GiB" in shown


def test_a_narrow_terminal_cuts_no_number() -> None:
    console = Console(record=True, width=80)
    name = "gim-explain, TransformerLens HookedTransformer"
    console.print(report.case_table([row("gim-kernels", 8192, 54321.0, 12345.6), row(name, 8192, 99999.0, 54321.0)]))
    shown = console.export_text()
    for number in ("54,321", "99,999", "1.84x", "12,346", "54,321"):
        assert number in shown
    assert "\u2026" not in shown and name in " ".join(line[:30].strip() for line in shown.splitlines())


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_documents_take_the_newest_of_a_kind_and_say_what_was_never_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    device = "AMD EPYC, 2 threads" if kind == "cpu" else "NVIDIA H100"

    def found() -> dict[str, Any]:
        text = json.dumps(results(device))
        return dict(
            json.loads(
                text if kind == "cpu" else text.replace("8/8 heads causal float32", "32/32 heads causal bfloat16")
            )
        )

    other = "gpu" if kind == "cpu" else "cpu"
    monkeypatch.setattr(documents, "RESULTS", tmp_path)
    save(tmp_path / "attention-a-new.json", {**found(), "date": "2026-02-01", "commit": "newest"})
    save(tmp_path / "attention-a-old.json", found())
    table = documents.suite_table("attention", kind)
    assert device in table and "commit newest" in table and "25%" in table and "| skipped: needs 99 GiB |" in table
    assert "\n- torch SDPA, exact: FLASH_ATTENTION.\n" in table and "![" not in table
    picture = tmp_path / default_name({**found(), "date": "2026-02-01"}).replace(".json", ".png")
    picture.touch()
    assert table + f"\n![time and memory over length, attention, {device}]({picture.name})\n" == documents.suite_table(
        "attention", kind
    )
    assert documents.suite_table("attention", other) == documents.suite_table("memory", kind) == "Not measured.\n"
    summary = documents.attention_table()
    assert "1.25x" in summary and ("0.20x" if kind == "cpu" else "skipped: needs 99 GiB") in summary
    assert "T1024" not in summary
    called = {"cpu": "a GPU", "gpu": "a CPU"}[kind]
    assert f"Attention alone on {called}: not measured." in summary
    assert "| 1024 to 4096 | 2.00 | 2.00 |" in documents.growth_table()


# ---------------------------------------------------------------------------------------------------- command line


def test_compare_from_the_command_line(tmp_path: Path) -> None:
    cli = CliRunner()
    slower = copy.deepcopy(results())
    for one in slower["rows"]:
        for key in ("median_ms", "q1_ms", "q3_ms"):
            if key in one:
                one[key] *= 3
    old, new = written(tmp_path / "old.json", results()), written(tmp_path / "attention-a-new.json", slower)
    shown = cli.invoke(program.app, ["compare", str(old), str(new)])
    assert shown.exit_code == 0 and "3.00x" in shown.output
    assert cli.invoke(program.app, ["compare", str(old), str(new), "--fail-above", "2"]).exit_code == 1
    elsewhere = written(tmp_path / "gpu.json", results("H100"))
    refused = cli.invoke(program.app, ["compare", str(old), str(elsewhere)])
    assert refused.exit_code == 2 and "different devices" in refused.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "speed"], "no suite is called 'speed'"),
        (["run", "quick", "--device", "abc"], "not the name of a device"),
        (["run", "quick", "--tokens", "many"], "--tokens: want lengths such as 1024,4096"),
        (["run", "quick", "--json", "/nowhere/at/all/a.json"], "folder /nowhere/at/all does not exist"),
        (["run", "quick", "--plot", "/nowhere/a.png"], "folder /nowhere does not exist"),
        (["show", "/nowhere/a.json"], "No such file"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    shown = CliRunner().invoke(
        program.app, [*arguments, *(["--device", "cpu"] if arguments == ["run", "quick"] else [])]
    )
    assert shown.exit_code == 2
    assert shown.output.startswith("error: ") and message in shown.output and shown.output.count("\n") == 1


def test_a_stored_file_is_shown_and_drawn_again(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", results())
    shown = CliRunner().invoke(program.app, ["show", str(path), "--plot", str(tmp_path / "a.png")])
    assert shown.exit_code == 0 and "copy 20.0 GB/s; matrix product float32 90 GFLOP/s" in shown.output
    assert (tmp_path / "a.png").exists()


def test_the_name_of_a_suite_alone_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(program, "app", type("App", (), {
        "registered_commands": program.app.registered_commands,
        "__call__": lambda self, arguments, prog_name: asked.append(arguments),
    })())  # fmt: skip
    for arguments in (["quick", "--json", "a"], ["compare", "a", "b"], ["--help"]):
        program.main(arguments)
    assert asked == [["run", "quick", "--json", "a"], ["compare", "a", "b"], ["--help"]]

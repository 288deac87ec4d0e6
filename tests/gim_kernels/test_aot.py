"""The ahead-of-time library and the compile report. What compiles does so in a process without the interpreter."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from gim_kernels.aot import variants
from gim_kernels.aot.__main__ import main
from gim_kernels.aot.report import markdown
from gim_kernels.aot.resources import loop_stores

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "benchmarks" / "results" / "compile_report.json"
#: What the library of this test holds: every rule of attention, one norm, one activation.
SELECTION = {
    "GIM_TARGETS": "cuda:90:32",
    "GIM_HEAD_SIZES": "16",
    "GIM_DTYPES": "fp16",
    "GIM_ONLY": "attention_*/causal/general*;attention_*/full/plain*;*fold*;*layer_bias/128;*layer_bias;"
    "norm_backward/*/layer/live/128;norm_backward/*/layer/live;norm_backward_weight/*/layer;*/silu*",
}
#: What is compiled here and held against the committed report: what every user of GIM runs.
FRESH = "attention_forward/*/causal/plain;attention_grad*/causal/plain/square;norm_backward/*/rms/frozen/4096"
FRESH_HEAD_SIZE = 128


def without_interpreter() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A finished process; a failed one shows what it printed."""
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@functools.cache
def committed() -> dict[str, Any]:
    report: dict[str, Any] = json.loads(REPORT.read_text())
    return report


def rows_of(report: dict[str, Any], target: str) -> list[dict[str, Any]]:
    return [row for row in report["variants"] if row["target"] == target]


def scores_for_each_thread(row: dict[str, Any]) -> int:
    return row["block"][0] * row["block"][1] // (32 * row["warps"])


def check_local_memory(row: dict[str, Any], what: str) -> None:
    """No loop over whole tiles of attention writes to local memory; what else there is of it is done once a program."""
    operator, *options = row["key"].split("/")
    if not operator.startswith("attention") or operator == "attention_fold":
        assert row["stack"] == 0 and row["spills"] == 0, f"{what}: {row['stack']} of stack, {row['spills']} spills"
        return
    # One loop without a mask and one with it for each pass; a temperature below 1 looks for the maximum first.
    # Where all keys are seen, only the last tile needs a mask: no loop.
    loops, passes = row["loop_stores"], row["passes"] + (options[-1] == "sharp")
    each = {"plain": (2, 1), "general": (2,), "softcap": (2,)}[options[3]][: 1 + (options[2] == "full")]
    assert len(loops) in [n * passes for n in each], f"{what}: {len(loops)} loops for {passes} passes"
    assert not any(loops[:: len(loops) // passes]), f"{what}: {loops} stores in the loops"


def check_bounds(row: dict[str, Any]) -> None:
    """What must hold of a variant on an NVIDIA GPU."""
    what = f"{row['target']} {row['key']} {row['limit']}"
    check_local_memory(row, what)
    assert row["shared"] + row["shared_static"] <= {"cuda:80:32": 163, "cuda:90:32": 227}[row["target"]] * 1024, what
    operator, *options = row["key"].split("/")
    if not operator.startswith("attention") or operator == "attention_fold":
        assert row["matrix"] == {}, what
        return
    if options[0] == "fp32":  # products are IEEE's: no matrix instruction keeps 24 bits
        assert row["matrix"] == {}, what
    elif row["target"] == "cuda:90:32" and int(options[1]) >= 64:
        assert set(row["matrix"]) == {"HGMMA"}, f"{what}: {row['matrix']}"
    else:
        assert set(row["matrix"]) <= {"HGMMA", "HMMA"} and row["matrix"], f"{what}: {row['matrix']}"


def check_exponentials(row: dict[str, Any]) -> None:
    """One exponential for each score and pass with T = 2, in the loop over whole tiles and in that over masked ones.

    Where more keys can be hidden than by causality alone, sinks and caps have exponentials of their own.
    """
    operator, *options = row["key"].split("/")
    if operator.startswith("attention") and options[-1] == "square" and options[3] == "plain":
        assert row["exponentials"] == 2 * row["passes"] * scores_for_each_thread(row), f"{row['target']} {row['key']}"


def check_products(row: dict[str, Any]) -> None:
    """On sm_80 no warp repeats the matrix product of another: each of the two loops holds every product once.

    An HMMA is a product of 16 x 8 x 16. Hopper's instructions have many sizes, which the code does not count out.
    """
    operator, *options = row["key"].split("/")
    if row["target"] != "cuda:80:32" or not row["matrix"]:
        return
    products = {
        "attention_forward": 2,
        "attention_grad_value": 2,
        "attention_grad_key": 3,
        "attention_grad_key_value": 4,
        "attention_grad_query": {"exact": 3, "sharp": 5}.get(options[-1], 4) + (row["passes"] == 2),
    }[operator]
    head = 1 << (int(options[1]) - 1).bit_length()
    each = row["block"][0] * row["block"][1] * head // (16 * 8 * 16 * row["warps"])
    assert row["matrix"]["HMMA"] == 2 * products * each, f"{row['key']}: {row['matrix']}, want {2 * products * each}"


def check(row: dict[str, Any]) -> None:
    """All that must hold of a row."""
    check_bounds(row)
    check_exponentials(row)
    check_products(row)


def test_every_shipped_variant_is_in_the_committed_report() -> None:
    for target in variants.TARGETS:
        shipped = [(entry.key, entry.limit) for entry in variants.shipped(target)]
        limit = {None: variants.UNLIMITED}
        reported = [(row["key"], limit.get(row["limit"], row["limit"])) for row in rows_of(committed(), target)]
        assert reported == shipped, (
            f"{target}: {set(reported) ^ set(shipped)}: python -m gim_kernels.aot report "
            "--out benchmarks/results/compile_report"
        )


@pytest.mark.parametrize("target", variants.TARGETS)
def test_no_whole_tile_spills_and_all_use_the_tensor_cores(target: str) -> None:
    rows = rows_of(committed(), target)
    for row in rows + rows_of(committed()["beside"], target):
        check(row)
    assert any(row["key"].endswith("plain/square") for row in rows)


def test_the_report_has_two_versions_of_triton_side_by_side() -> None:
    """Of what models run on sm_90, whose code differs."""
    report, beside = committed(), committed()["beside"]
    assert (report["triton"], beside["triton"]) == ("3.7.1", "3.6.0")
    here, there = ({row["key"]: row for row in rows_of(x, "cuda:90:32")} for x in (report, beside))
    want = {key for key in here if re.fullmatch(r"attention_.*/bf16/(64|128|256)/causal/plain.*", key)}
    assert len(want) == 18 and want <= set(there)
    assert any(here[key]["registers"] != there[key]["registers"] for key in want)
    assert all(here[key]["block"] == there[key]["block"] for key in there)


def test_the_bounds_can_fail() -> None:
    hopper = {
        "key": "attention_grad_query/bf16/128/causal/plain/square", "limit": None, "target": "cuda:90:32",
        "block": [128, 32], "passes": 1, "warps": 8, "stack": 0, "spills": 0, "shared": 1, "shared_static": 0,
        "loop_stores": [0, 0], "matrix": {"HGMMA": 8}, "exponentials": 32,
    }  # fmt: skip
    ampere = {**hopper, "target": "cuda:80:32", "matrix": {"HMMA": 256}}
    check(hopper)
    check(ampere)
    check({**hopper, "stack": 8, "spills": 3, "loop_stores": [0, 2]})
    worse: list[dict[str, Any]] = [
        {"loop_stores": [1, 0]},
        {"loop_stores": [0]},
        {"shared": 228 * 1024},
        {"matrix": {}},
    ]
    full = {**hopper, "key": "attention_grad_query/bf16/128/full/plain/square", "loop_stores": [0]}
    check(full)
    with pytest.raises(AssertionError):
        check({**full, "loop_stores": [1]})
    for good in (hopper, ampere):
        for change in [*worse, {"exponentials": 64}, {"passes": 2}]:
            with pytest.raises(AssertionError):
                check({**good, **change})
    with pytest.raises(AssertionError):
        check({**hopper, "matrix": {"HMMA": 256}})
    with pytest.raises(AssertionError):
        check({**ampere, "matrix": {"HMMA": 384}})
    with pytest.raises(AssertionError):
        check({**hopper, "key": "norm_forward/bf16/rms"})
    norm = {**hopper, "key": "norm_forward/bf16/rms", "matrix": {}}
    check(norm)
    with pytest.raises(AssertionError):
        check({**norm, "spills": 1})


def test_the_markdown_holds_every_row_of_the_json() -> None:
    text = REPORT.with_suffix(".md").read_text()
    assert text == markdown(committed())


def test_a_report_shows_two_versions_of_triton_or_one() -> None:
    row = {
        "key": "attention_forward/bf16/128/causal/plain", "limit": None, "target": "cuda:90:32", "block": [128, 128],
        "passes": 1, "warps": 8, "stages": 2, "registers": 245, "stack": 0, "shared": 1024, "shared_static": 0,
        "spills": 0, "loop_stores": [0, 1], "matrix": {"HGMMA": 32}, "exponentials": 132, "bytes": 1,
    }  # fmt: skip
    alone: dict[str, Any] = {"triton": "3.7.1", "variants": [row, {**row, "key": "fold"}], "beside": {}}
    want = "| attention_forward/bf16/128/causal/plain | 128x128 8w 2s | 245 | 0 | 0 | 0 1 | 1 | 32 HGMMA | 132 |"
    assert want in markdown(alone).splitlines()
    both = {**alone, "beside": {"triton": "3.6.0", "variants": [{**row, "registers": 163}]}}
    lines = markdown(both).splitlines()
    assert f"{want} 163 | 0 | 0 | 0 1 |" in lines and "| cuda:90:32 | 3.6.0 | 1 | 163 | 0 | 0 | 0 | 1 |" in lines
    columns = {line.count("|") for line in lines[lines.index("## cuda:90:32") + 2 :] if line}
    assert len(columns) == 1


def test_stores_are_counted_in_the_loops_that_hold_them() -> None:
    """A listing as nvdisasm writes it: a loop over whole tiles, one over masked ones, and what is in neither."""
    lines = [
        "        /*0010*/                   STL [R1], R2 ;",
        ".L_x_0:",
        "        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;",
        ".L_x_1:",
        "        /*0030*/                   LDL R2, [R1] ;",
        "        /*0040*/              @!P0 BRA `(.L_x_2) ;",
        "        /*0050*/               @P1 BRA `(.L_x_0) ;",
        ".L_x_2:",
        "        /*0060*/                   HMMA.16816.F32 R4, R8, R12, R4 ;",
        "        /*0070*/                   STL [R1+0x4], R4 ;",
        "        /*0080*/               @P2 BRA `(.L_x_2) ;",
        ".L_x_3:",
        "        /*0090*/                   STL [R1+0x8], R4 ;",
        "        /*00a0*/               @P3 BRA `(.L_x_3) ;",
        "        /*00b0*/                   EXIT ;",
    ]
    assert loop_stores("\n".join(lines)) == [0, 1]
    lines[4] = lines[4].replace("LDL R2, [R1]", "STL [R1], R2")
    assert loop_stores("\n".join(lines)) == [1, 1]


@pytest.mark.slow
def test_what_is_compiled_here_is_what_the_report_says(tmp_path: Path) -> None:
    run(
        sys.executable, "-m", "gim_kernels.aot", "report", "--head-sizes", FRESH_HEAD_SIZE, "--dtypes", "bf16",
        "--only", FRESH, "--jobs", "1", "--out", tmp_path / "report", env=without_interpreter(),
    )  # fmt: skip
    fresh = json.loads((tmp_path / "report.json").read_text())
    assert len(fresh["variants"]) >= 8
    for row in fresh["variants"]:
        check(row)
    if fresh["triton"] == committed()["triton"]:  # another compiler makes other code
        known = {(row["target"], row["key"], row["limit"]): row for row in committed()["variants"]}
        for row in fresh["variants"]:
            assert row == known[row["target"], row["key"], row["limit"]]


@pytest.mark.slow
def test_blackwell_and_amd_compile_too(tmp_path: Path) -> None:
    run(
        sys.executable, "-m", "gim_kernels.aot", "report", "--targets", "cuda:100:32;hip:gfx942:64", "--head-sizes",
        "64", "--dtypes", "bf16", "--only", "attention_forward/*/causal/plain;fold",
        "--jobs", "1", "--out", tmp_path / "report", env=without_interpreter(),
    )  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    attention = {row["target"]: row for row in report["variants"] if row["key"].startswith("attention")}
    assert len(attention) == 2 and len(report["variants"]) == 4
    assert any("MMA" in kind for kind in attention["cuda:100:32"]["matrix"])
    assert any("mfma" in kind for kind in attention["hip:gfx942:64"]["matrix"])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder of the C library with :data:`SELECTION`."""
    if shutil.which("cmake") is None or shutil.which("cc") is None:
        pytest.skip("needs cmake and a C compiler")
    # The workers of pytest-xdist share one build: whoever is first makes it.
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "library"
    done = folder / "built"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            options = [f"-D{name}={value}" for name, value in SELECTION.items()]
            options += ["-G", "Ninja"] if shutil.which("ninja") else []
            python = f"-DPython3_EXECUTABLE={sys.executable}"
            run("cmake", "-S", ROOT, "-B", folder, python, *options, env=without_interpreter())
            run("cmake", "--build", folder, env=without_interpreter())
            done.touch()
    return folder


@pytest.mark.slow
def test_library_passes_its_own_tests(library: Path) -> None:
    done = run("ctest", "--test-dir", library, "--output-on-failure", "--no-tests=error")
    assert "functions_c " in done.stdout and "package " in done.stdout and "dispatch " in done.stdout


@pytest.mark.slow
def test_second_build_does_nothing(library: Path) -> None:
    objects = {path: path.stat().st_mtime_ns for path in (library / "CMakeFiles").rglob("*.o")}
    kernels = {path: path.stat().st_mtime_ns for path in (library / "kernels").rglob("*")}
    run("cmake", "--build", library, env=without_interpreter())
    assert objects and objects == {path: path.stat().st_mtime_ns for path in objects}
    assert kernels == {path: path.stat().st_mtime_ns for path in kernels}


@pytest.mark.slow
def test_library_needs_no_driver_and_names_no_path_of_this_machine(library: Path) -> None:
    file = library / "libgim_kernels.so"
    if shutil.which("readelf"):
        needed = run("readelf", "-d", file).stdout
        assert "libcuda" not in needed and "libpython" not in needed
    content = file.read_bytes()
    for path in (ROOT, Path(sys.prefix), library):
        assert str(path).encode() not in content
    names = [
        entry.key for entry in variants.shipped("cuda:90:32", (16,), ("fp16",), tuple(SELECTION["GIM_ONLY"].split(";")))
    ]
    for name in names:
        assert f"cuda:90:32 {name}".encode() in content


@pytest.mark.slow
def test_library_launches_what_the_interpreter_finds_right(library: Path) -> None:
    """The library's GPU test, carried out by the interpreter: right numbers through every function of the library."""
    environment = {**without_interpreter(), "TRITON_INTERPRET": "1"}
    done = run(
        sys.executable, "-m", "tests.gim_kernels.aot_replay", library, "--head-sizes", "16", "--dtypes", "fp16",
        env=environment,
    )  # fmt: skip
    assert "0 failures" in done.stdout
    launched = set(json.loads(done.stdout.splitlines()[-1]))
    only = tuple(SELECTION["GIM_ONLY"].split(";"))
    assert launched == {entry.key for entry in variants.shipped("cuda:90:32", (16,), ("fp16",), only)}


@pytest.mark.slow
def test_an_unchanged_kernel_is_not_compiled_again(library: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    shutil.copytree(library / "kernels", folder)
    broken = folder / "cuda_90_32" / "fold.json"
    broken.write_text(broken.read_text().replace('"fingerprint": "', '"fingerprint": "x'))
    unwanted = folder / "cuda_90_32" / "attention_forward-fp16-17-causal-plain.bin"
    unwanted.write_bytes(b"of another build")
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "cuda_90_32").iterdir()}
    run(
        sys.executable, "-m", "gim_kernels.aot", "build", "--targets", SELECTION["GIM_TARGETS"], "--head-sizes", "16",
        "--dtypes", "fp16", "--only", SELECTION["GIM_ONLY"], "--out", folder, env=without_interpreter(),
    )  # fmt: skip
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "cuda_90_32").iterdir()}
    assert set(before) - set(after) == {unwanted.name}
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"fold.bin", "fold.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "cuda:90"], "must look like cuda:90:32 or hip:gfx942:64, got 'cuda:90'"),
        (["--targets", "metal:1:32"], "must look like cuda:90:32"),
        (["--targets", "cuda:sm_90:32"], "a CUDA target must look like cuda:90:32"),
        (["--targets", ""], "targets must name at least one"),
        (["--head-sizes", "24"], "multiples of 16 from 16 to 256, got 24"),
        (["--head-sizes", "272"], "got 272"),
        (["--dtypes", "fp8"], "dtypes must be among .* got 'fp8'"),
        (["--only", "nothing"], r"no variant matches \('nothing',\)"),
    ],
)
def test_bad_options_are_refused_before_anything_is_compiled(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["build", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_keys_are_unique_and_sorted() -> None:
    for target in (*variants.TARGETS, "hip:gfx942:64"):
        entries = variants.shipped(target)
        keys = [(entry.key, entry.limit) for entry in entries]
        assert keys == sorted(set(keys))
        stems = [entry.stem for entry in entries]
        assert len(set(stems)) == len(stems)
        for entry in entries:
            assert set(entry.variant.divisible) <= set(entry.variant.signature)


def test_every_option_of_attention_is_shipped() -> None:
    """For each head size: every rule, with and without a causal mask, alone and with everything that hides keys."""
    keys = {entry.key for entry in variants.shipped("cuda:90:32")}
    for dtype in variants.DTYPES:
        for size in variants.HEAD_SIZES:
            for causal in ("causal", "full"):
                where = f"{dtype}/{size}/{causal}/general"
                assert {f"attention_forward/{where}", f"attention_grad_value/{where}"} <= keys
                for rule in variants.RULES:
                    assert f"attention_grad_query/{where}/{rule}" in keys
                    if rule != "sharp":
                        both, alone = (
                            f"attention_grad_key_value/{where}/{rule}",
                            f"attention_grad_key/{where}/{rule}",
                        )
                        assert (both in keys) != (alone in keys)
            assert f"attention_forward/{dtype}/{size}/causal/softcap" in keys

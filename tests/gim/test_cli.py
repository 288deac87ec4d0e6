"""The command line on a tiny random model."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rich.console
import rich.progress
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import gim
from gim import cli, demo, rules, targets
from gim.attribution import Attribution
from gim.circuits import Circuit
from gim.circuits.graph import Graph
from gim.cli import attributions
from gim.cli.errors import UserError
from gim.cli.output import deliver
from tests.first import first

PROMPT = "The password of Irene is lantern. The password of Otto is camel. The password of Irene is"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights and a byte-level tokenizer trained on one sentence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROMPT] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(path)
    wrapped.save_pretrained(path)
    return path


class Result:
    """Exit code and what was written, with white space as one space."""

    def __init__(self, arguments: list[str], stdin: bytes | None = None) -> None:
        outcome = CliRunner().invoke(cli.app, arguments, input=stdin, env={"COLUMNS": "100"})
        if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
            raise outcome.exception
        self.code = outcome.exit_code
        self.out = outcome.stdout
        self.err = outcome.stderr


def run(*arguments: object, stdin: bytes | None = None) -> Result:
    return Result([str(argument) for argument in arguments], stdin)


@pytest.fixture(scope="session")
def loaded(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def expected(loaded: tuple[Any, Any]) -> Any:
    """The same attribution from Python."""
    return lambda **arguments: gim.attribute(*loaded, PROMPT, **arguments)


# --------------------------------------------------- explain


def test_explain_writes_what_python_computes(folder: Path, tmp_path: Path, expected: Any) -> None:
    files = {kind: tmp_path / f"a.{kind}" for kind in ("html", "json", "png")}
    options = [argument for kind, path in files.items() for argument in (f"--{kind}", path)]
    result = run("explain", "--model", folder, "--prompt", PROMPT, "--top", 3, *options)
    assert result.code == 0, result.err
    assert result.err == ""
    found = Attribution.from_json(files["json"])
    same = expected()
    assert torch.equal(found.scores, same.scores)
    assert (found.text, found.rules, found.target) == (PROMPT, rules.GIM, same.target)
    assert files["png"].read_bytes()[:4] == b"\x89PNG"
    assert files["html"].read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert len(list(tmp_path.iterdir())) == 3
    ranked = re.findall(r"^ +(\d+) +([+-][\d.]+) +█* +(\d+) ", result.out, re.MULTILINE)
    assert [(int(rank), int(at)) for rank, _, at in ranked] == [(t.rank, t.position) for t in same.top(3)]
    for path in files.values():
        assert f"wrote {path}" in result.out


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["--target", " lantern"], {"target": targets.Token(" lantern")}),
        (["-t", " lantern", "-c", " camel"], {"target": targets.Contrast(" lantern", " camel")}),
        (["--contrast", " camel"], {"target": targets.Contrast(None, " camel")}),
        (["--target", " lantern. The"], {"target": targets.Continuation(" lantern. The")}),
        (["--target", " camel", "--measure", "logprob"], {"target": targets.Token(" camel", "logprob")}),
        (["--measure", "logprob"], {"target": targets.Token(None, "logprob")}),
        (["--baseline", " of"], {"baseline": " of"}),
        (["--rules", "gim-constant"], {"rules": rules.GIM_CONSTANT}),
        (["--temperature", "3"], {"rules": rules.Rules(temperature=3.0)}),
        (["--memory", "layer"], {"memory": "layer"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_explain_options(
    folder: Path, tmp_path: Path, expected: Any, options: list[str], arguments: dict[str, Any]
) -> None:
    result = run("explain", "-m", folder, "-p", PROMPT, "--json", tmp_path / "a", *options)
    assert result.code == 0, result.err
    found, same = Attribution.from_json(tmp_path / "a"), expected(**arguments)
    assert torch.equal(found.scores, same.scores)
    assert (found.target, found.rules, found.baseline, found.memory) == (
        same.target,
        same.rules,
        same.baseline,
        same.memory,
    )
    plain = expected()
    # Each option changes something, or the comparison above would say nothing about it.
    assert found.memory != plain.memory or not torch.equal(found.scores, plain.scores)


def test_dtype_of_the_weights(folder: Path, tmp_path: Path, expected: Any) -> None:
    for dtype in ("float64", "float32"):
        assert run("explain", "-m", folder, "-p", PROMPT, "--dtype", dtype, "--json", tmp_path / dtype).code == 0
    wide, narrow = (Attribution.from_json(tmp_path / dtype) for dtype in ("float64", "float32"))
    assert torch.equal(narrow.scores, expected().scores)
    assert torch.allclose(wide.scores, narrow.scores, rtol=1e-3, atol=1e-4)
    assert not torch.equal(wide.scores, narrow.scores)


def test_prompt_from_a_file_and_from_standard_input(folder: Path, tmp_path: Path) -> None:
    text = "Zwei Zeilen\nmit ü und 日本\n"
    for name, content, stdin, arguments in (
        ("file", b"\xef\xbb\xbf" + text.encode() + b"\n", None, ["--prompt-file", tmp_path / "prompt"]),
        ("dash", None, text.encode() + b"\r\n", ["-"]),
        ("dash file", None, text.encode() + b"\n", ["-f", "-"]),
    ):
        if content is not None:
            (tmp_path / "prompt").write_bytes(content)
        result = run("explain", "-m", folder, *arguments, "--json", tmp_path / name, stdin=stdin)
        assert result.code == 0, result.err
        assert Attribution.from_json(tmp_path / name).text == text


def test_no_bar_unless_the_error_stream_is_a_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    heard: list[bool] = []
    original = gim.attribute

    def attribute(*positional: Any, progress: Any = None, **named: Any) -> Attribution:
        heard.append(progress is not None)
        return original(*positional, progress=progress, **named)

    monkeypatch.setattr(gim, "attribute", attribute)
    quiet = run("explain", "-m", folder, "-p", "a")
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setattr(Console, "is_dumb_terminal", False)
    drawn = run("explain", "-m", folder, "-p", "a")
    assert heard == [False, True]
    assert quiet.err == ""
    assert "backward" in drawn.err
    assert "backward" not in drawn.out


def test_a_bar_waits_with_a_line_and_has_no_rate_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what was done before a stage was first heard of nobody knows how long it took."""
    screen, clock = io.StringIO(), iter([0.0, 1e-9, 2.0])
    make = rich.console.Console
    monkeypatch.setattr(rich.console, "Console", lambda **_: make(file=screen, force_terminal=True, width=100))
    monkeypatch.setattr(attributions, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    rates: list[str] = []
    update = rich.progress.Progress.update

    def heard(bars: Any, *given: Any, **named: Any) -> None:
        rates.append(named["rate"])
        update(bars, *given, **named)

    monkeypatch.setattr(rich.progress.Progress, "update", heard)
    with attributions.progress_bar(100, "The model writes its answer") as report:
        assert report is not None
        for _ in range(200):  # it is drawn from another thread
            if "The model writes its answer" in screen.getvalue():
                break
            time.sleep(0.05)
        assert "The model writes its answer" in screen.getvalue()
        report("backward", 1, 10)
        report("backward", 3, 10)
    assert rates[0] == "" and rates[1].endswith(" tokens/s") and float(rates[1].split()[0]) == 10


def test_warnings_of_libraries_are_single_lines_at_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = gim.attribute

    def attribute(*positional: Any, **named: Any) -> Attribution:
        for _ in range(3):
            warnings.warn("something\n is  odd\x1b[2J", stacklevel=1)
        return original(*positional, **named)

    monkeypatch.setattr(gim, "attribute", attribute)
    result = run("explain", "-m", folder, "-p", "a")
    assert result.code == 0
    assert result.err == "warning: something is odd␛[2J\n"


# --------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "--prompt: the prompt must not be empty"),
        ([], "the prompt must come from one of --prompt, --prompt-file and -; got none of them"),
        (["-p", "a", "-f", "b"], "got --prompt and --prompt-file"),
        (["-p", "a", "-"], "got --prompt and -"),
        (["text"], "the only argument there can be is -, for standard input; got 'text'"),
        (["-f", "{tmp}/none"], "--prompt-file {tmp}/none: No such file"),
        (["-f", "{tmp}/binary"], "--prompt-file {tmp}/binary: not text in UTF-8: byte 0xff at offset 2"),
        (["-f", "{tmp}/empty"], "--prompt-file {tmp}/empty: the prompt must not be empty"),
        (["-p", "a", "--rules", "LRP"], "--rules must be Rules or one of GIM, GIM_CONSTANT, "),
        (["-p", "a", "--temperature", "0"], "--temperature must be > 0, got 0.0"),
        (["-p", "a", "--temperature", "nan"], "--temperature must be a finite number, got nan"),
        (["-p", "a", "--temperature", "3", "-r", "GRADIENT"], "the rules GRADIENT have no softmax temperature"),
        (["-p", "a", "--html", "{tmp}/no/a"], "--html: cannot write {tmp}/no/a: folder {tmp}/no does not exist"),
        (["-p", "a", "--json", "{tmp}"], "--json: cannot write {tmp}: it is a folder"),
        (["-p", "a", "--json", "{tmp}/x", "--png", "{tmp}/x"], "--png: {tmp}/x is the file of --json too"),
        (["-p", "a", "--target", ""], "--target must not be empty"),
        (["-p", "a", "--contrast", ""], "--contrast must not be empty"),
        (["-p", "a", "--device", "abacus"], "--device: 'abacus' is not a device that is there"),
        (["-p", "a", "--contrast", "two words"], "--contrast must be one token, but 'two words' is"),
        (
            ["-p", "a", "-t", " Irene is", "-c", " Otto is"],
            "--target must be one token, but ' Irene is' is 2: [' Irene', ' is']; --contrast must be one token, "
            "but ' Otto is' is 2: [' Otto', ' is']. A contrast is of two tokens that may come next: give those in "
            "which the two first differ, ' Irene' and ' Otto', or explain each text by itself",
        ),
        (["-p", "a", "--baseline", "two words"], "baseline must be one token, but 'two words' is"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_changes_nothing(
    folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "binary").write_bytes(b"ab\xff\xfe")
    (tmp_path / "empty").write_bytes(b"\n")
    before = sorted(tmp_path.iterdir())
    result = run("explain", "-m", folder, *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert message.replace("{tmp}", str(tmp_path)) in result.err
    assert result.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("command", "other"),
    [
        ("explain -m x -f {0} --html {0}", "--prompt-file"),
        ("show other {0} --html {0}", "results"),
        ("evaluate -m x {0} --save {0}", "data"),
        ("evaluate -m x facts --resume {0} --html {0}", "--resume"),
        ("circuit find -m x {0} --save {0}", "data"),
        ("circuit score -m x {0} agreement --save {0}", "circuit"),
        ("circuit score -m x other {0} --save {0}", "data"),
        ("circuit export {0} {0}", "circuit"),
        ("circuit show {0} --html {0}", "circuit"),
    ],
)
def test_no_file_that_is_read_is_written(tmp_path: Path, command: str, other: str) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("hours of work")
    result = run(*command.format(path).split())
    assert result.code == 2 and result.err.endswith(f"{path} is the file of {other} too\n")
    assert path.read_text() == "hours of work"


def test_outputs_are_checked_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded too early")

    monkeypatch.setattr(cli.explain, "load", refuse)
    assert run("explain", "-m", "x", "-p", "a", "--html", tmp_path / "no" / "a").code == 2
    assert run("explain", "-m", "x", "-f", tmp_path / "none").code == 2
    with pytest.raises(AssertionError, match="loaded too early"):
        run("explain", "-m", "x", "-p", "a", "--html", tmp_path / "a")


def test_picture_without_matplotlib_is_refused_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else original(name))
    result = run("explain", "-m", "x", "-p", "a", "--png", tmp_path / "a.png")
    assert (result.code, "pip install gim-kernels[report]" in result.err) == (2, True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "model: there is no folder './nowhere'"),
        ("/a/b/c", "model: there is no folder '/a/b/c'"),
        ("", "model: there is no folder ''"),
        ("surely-no-such-model", "model: cannot load 'surely-no-such-model': "),
    ],
)
def test_unknown_models(name: str, message: str) -> None:
    for command in (["explain", "-p", "a", "-m", name], ["check", name]):
        result = run(*command)
        assert result.code == 2
        assert result.err.startswith(f"error: {message}")
        assert result.err.count("\n") == 1


def test_only_safetensors_with_all_weights(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    result = run("check", tmp_path)
    assert result.code == 2
    assert "safetensors" in result.err

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    result = run("check", tmp_path)
    assert result.code == 2
    assert "lack 1 weights, such as model.layers.1.mlp.up_proj.weight" in result.err

    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    assert run("check", tmp_path).code == 2


def test_code_of_a_model_is_not_run_unless_asked_for(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    result = run("check", tmp_path)
    assert result.code == 2
    assert "trust_remote_code" in result.err
    assert not (tmp_path / "ran").exists()


def test_unexpected_errors_keep_their_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(gim, "attribute", break_down)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run("explain", "-m", folder, "-p", "a")


def test_debug_shows_the_traceback_of_a_refusal() -> None:
    result = run("explain", "-m", "./nowhere", "-p", "a", "--debug")
    assert result.code == 2
    assert "Traceback" in result.err
    assert result.err.endswith("error: model: there is no folder './nowhere'\n")


# --------------------------------------------------- check


def test_check_lists_every_part_once(folder: Path) -> None:
    result = run("check", folder)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    counted = {match[1]: int(match[2]) for line in lines if (match := re.match(r"^ (model\S+) +(\d+) ", line))}
    assert counted == {
        "model.layers.{0-1}.self_attn": 2,
        "model.layers.{0-1}.input_layernorm": 2,
        "model.layers.{0-1}.post_attention_layernorm": 2,
        "model.norm": 1,
        "model.layers.{0-1}.mlp": 2,
    }
    assert "LlamaRMSNorm" in result.out
    assert lines[-2:] == [
        "watched, every operator of a forward over 'The capital of France is'",
        "every rule can be applied",
    ]
    assert "a forward over 'Otto'" in run("check", folder, "--prompt", "Otto").out
    assert rules.GRADIENT.describe() in run("check", folder, "--rules", "GRADIENT").out


def test_check_fails_where_a_part_is_not_covered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gim import context
    from gim.applied import AppliedReport

    monkeypatch.setattr(
        context, "inspect", lambda *_, engine: AppliedReport("GIM", [], [("layers.0.norm", "odd")], ["no gates"])
    )
    result = run("check", folder)
    assert result.code == 1
    assert "not covered: layers.0.norm: odd" in result.out
    assert "note: no gates" in result.out
    assert "not watched" in result.out.splitlines()
    assert result.out.splitlines()[-1] == "NOT every rule can be applied"


@pytest.mark.parametrize(
    ("modules", "name"),
    [
        (["norm"], "norm"),
        (["layers.4.mlp"], "layers.4.mlp"),
        (["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"], "layers.{0-2}.mlp"),
        (["layers.0.mlp", "layers.2.mlp"], "layers.{0,2}.mlp"),
        (["b.1.e.0", "b.1.e.1", "b.2.e.0", "b.2.e.1"], "b.{1-2}.e.{0-1}"),
    ],
)
def test_names_in_one(modules: list[str], name: str) -> None:
    assert cli.check.numbered(modules) == name


# --------------------------------------------------- demo


def test_demo_shows_the_answer_and_both_statements(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = demo.make_prompt(1, facts=4, statements=2)
    monkeypatch.setattr(demo, "load", lambda: loaded)
    monkeypatch.setattr(demo, "prompt", lambda: prompt)
    result = run("demo", "--html", tmp_path / "a.html", "--json", tmp_path / "a.json")
    assert result.code == 0, result.err
    same = gim.attribute(*loaded, prompt.text)
    assert torch.equal(Attribution.from_json(tmp_path / "a.json").scores, same.scores)
    assert (tmp_path / "a.html").stat().st_size > 10_000
    assert f"Question: What is the password of {prompt.name}?" in result.out
    # Random weights do not answer right.
    assert f"(wrong, it is '{prompt.answer.strip()}')" in result.out

    shown = " ".join(result.out[result.out.index("2 statements of the asked fact") :].split())
    sizes = same.scores.abs().tolist()
    sizes[0] = -1.0  # the begin-of-text token is not ranked
    for statement in prompt.statements:
        start, end = statement.sentence
        within = [size for size, (a, b) in zip(sizes, same.offsets, strict=True) if a < end and b > start]
        rank = sum(size > max(within) for size in sizes) + 1
        assert f" {rank} of {len(sizes) - 1} " in shown


def test_demo_says_right_when_it_is(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = demo.make_prompt(1, facts=4, statements=2)
    answer = gim.attribute(*loaded, prompt.text).target.tokens[0]
    monkeypatch.setattr(demo, "load", lambda: loaded)
    monkeypatch.setattr(demo, "prompt", lambda: replace(prompt, answer=f" {answer.strip()}"))
    assert "(right)" in run("demo").out


def test_demo_without_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise FileNotFoundError("no demo model in x")

    monkeypatch.setattr(demo, "load", missing)
    result = run("demo")
    assert (result.code, result.err) == (2, "error: no demo model in x\n")


# --------------------------------------------------- show


def test_show_draws_what_explain_wrote(folder: Path, tmp_path: Path) -> None:
    written, page = tmp_path / "a.json", tmp_path / "a.html"
    explained = run("explain", "--model", folder, "--prompt", PROMPT, "--json", written, "--html", page)
    again = tmp_path / "b.html"
    shown = run("show", written, "--html", again)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.replace(f"wrote {again}\n", "") in explained.out
    assert again.read_bytes() == page.read_bytes()
    twice = run("show", written, written)
    assert twice.out == 2 * run("show", written).out
    for arguments, message in (
        (
            (written, written, written, "--html", page),
            "error: --html is for one result, or for two compared, got 3 of them\n",
        ),
        ((written, written, "--png", tmp_path / "a.png"), "error: --png is for one result, got 2 of them\n"),
        ((tmp_path / "none.json",), f"error: {tmp_path / 'none.json'}: No such file or directory\n"),
        ((page,), f"error: {page} "),
    ):
        refused = run("show", *arguments)
        assert refused.code == 2 and refused.err.startswith(message), refused.err


# --------------------------------------------------- files before what is shown


def broken_pipe() -> io.TextIOWrapper:
    """The end of a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", encoding="utf-8")


#: Consoles that cannot take what is shown, with the exit code then; of 0, everything was.
CONSOLES: dict[str, tuple[Callable[[], Any], int]] = {
    "pipe": (broken_pipe, 1),
    "full": (lambda: os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", encoding="utf-8"), 2),
    "ascii": (lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"), 0),
}


COMMANDS = (
    "explain -m {model} -p naïve→ --json",
    "demo --json",
    "show {saved} --html",
    "show {saved} {saved} --html",
    "evaluate -m {demo} facts-in-context --methods random --limit 1 --grid coarse --save",
    "circuit find agreement -m {demo} --pairs 1 --level node --save",
    "circuit show {circuit} --html",
    "circuit export {circuit}",
    "check {model} -p naïve→",
    "tasks",
)


@pytest.mark.parametrize(
    ("command", "console"),
    first(
        itertools.product(COMMANDS, CONSOLES),
        lambda command, console: console == "full" or command.startswith(("explain", "tasks")),
    ),
)
def test_files_are_written_whatever_the_console_takes(
    command: str, console: str, folder: Path, loaded: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / ("a.parquet" if command.endswith("--save") else "a.html")
    names: dict[str, Any] = {"model": folder, "demo": demo.model_folder()}
    names |= {"saved": tmp_path / "s.json", "circuit": tmp_path / "c.json"}
    prompt = replace(demo.make_prompt(1, facts=4, statements=2), answer=" →")
    monkeypatch.setattr(demo, "load", lambda: loaded)
    monkeypatch.setattr(demo, "prompt", lambda: prompt)
    if "{saved}" in command:
        model, tokenizer = loaded
        gim.attribute(model, tokenizer, "naïve→").to_json(names["saved"])
    if "{circuit}" in command:
        Circuit(Graph(1, 1, False, 8), torch.ones(3, 5), {"model": "→"}).to_mib(names["circuit"])
    asked = [part.format(**names) for part in command.split()]
    writes = not command.startswith(("check", "tasks"))
    stream, code = CONSOLES[console]
    shown = stream()
    monkeypatch.setattr(sys, "stdout", shown)
    with pytest.raises(SystemExit) as ended:
        cli.app([*asked, *([str(file)] if writes else [])])
    shown.flush()
    assert ended.value.code == code
    assert file.exists() == writes
    said = capfd.readouterr().err
    assert ("error: cannot write to standard output: No space left on device\n" in said) == (console == "full"), said


def test_a_file_that_fails_keeps_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(_: Path) -> None:
        raise OSError("cannot write a: File too large")

    seen: list[object] = []
    writers: dict[str, Any] = {"--a": fail, "--b": seen.append}
    with pytest.raises(UserError, match="--a: cannot write a: File too large"):
        deliver({"--a": Path("a"), "--b": Path("b")}, writers, lambda: seen.append("shown"))
    assert seen == [Path("b"), "shown"]
    assert capfd.readouterr().out == "wrote b\n"


# --------------------------------------------------- version


def test_version_and_help() -> None:
    assert re.match(r"gim-kernels \S+", run("--version").out)
    helped = run("--help")
    assert helped.code == 0
    for command in ("explain", "check", "demo"):
        assert command in helped.out


def test_the_package_runs_as_the_command() -> None:
    shown, _ = process("-m", "gim", "--help")
    assert shown.startswith("Usage: gim ") or " gim [OPTIONS]" in shown


def process(*arguments: str) -> tuple[str, float]:
    """What another Python prints, and its process time in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return shown.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


HELP = "import sys; sys.argv = ['gim', '--help']; from gim.cli import app; app(standalone_mode=False)"


def test_help_loads_nothing_heavy() -> None:
    shown, _ = process("-c", f"{HELP}; print(*sorted(sys.modules))")
    modules = shown.splitlines()[-1].split()
    assert "typer" in modules and "gim.cli.explain" in modules
    assert not {"torch", "transformers", "numpy", "jinja2", "rich.console", "importlib.metadata", "gim.context"} & set(
        modules
    )


@pytest.mark.slow
def test_help_costs_little_more_than_what_draws_it() -> None:
    rounds = [(process("-c", HELP)[1], process("-c", "import typer, rich")[1]) for _ in range(9)]
    ours, least = (min(one) for one in zip(*rounds, strict=True))
    assert ours <= 2.5 * least, f"{ours:.3f} s against {least:.3f} s"


def test_public_names_are_loaded_when_asked_for() -> None:
    shown, _ = process("-c", "import sys, gim; print('torch' in sys.modules, gim.rules.GIM.name, *dir(gim))")
    heavy, preset, *names = shown.split()
    assert (heavy, preset) == ("False", "GIM") and set(gim.__all__) <= set(names)
    assert all(getattr(gim, name).__name__.rpartition(".")[2] == name for name in gim.__all__)
    with pytest.raises(AttributeError, match="module 'gim' has no attribute 'explane'"):
        _ = gim.explane  # type: ignore[attr-defined]


def test_a_terminal_says_that_something_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=60, color_system=None)
    monkeypatch.setattr("rich.console.Console", lambda **_: terminal)
    with cli.models.loading("org/[bold]name"):
        pass
    assert "loading org/[bold]name" in screen.getvalue()


# ---- gim plan


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config alone: no weights, no tokenizer."""
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("config")
    LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=1024
    ).save_pretrained(path)
    return path


@pytest.mark.slow
def test_plan_shows_every_plan_from_the_config_alone(config_folder: Path) -> None:
    import gim
    from gim.plan import PLANS

    result = run("plan", config_folder, "--tokens", "2000", "--gpu-memory", "1GiB")
    assert result.code == 0, result.err
    assert "1.0 GiB given" in result.out and "predicted, not measured" in result.out
    for estimate in gim.estimate_memory(_config(config_folder), 2000):
        row = next(
            line for line in result.out.splitlines() if re.search(rf"^ [ *] +{re.escape(estimate.plan.name)} ", line)
        )
        assert gim.memory.size(estimate.peak) in row and f"{estimate.relative_cost:.2f}x" in row
        assert row.startswith(" * ") == (estimate.plan == PLANS[0])
    assert "the model has 1,024 positions: more needs --allow-extrapolation" in result.out


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def test_plan_is_of_the_model_that_would_be_loaded(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, T5Config

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**sizes, num_labels=3))
    model.save_pretrained(tmp_path / "classifier")
    (tmp_path / "classifier" / "model.safetensors").unlink()
    result = run("plan", tmp_path / "classifier", "--tokens", "16")
    assert result.code == 0 and "BertForSequenceClassification, 16 tokens" in result.out, result.out
    (want,) = gim.estimate_memory(model, 16, plans=gim.plan.PLANS[:1])
    row = next(line for line in result.out.splitlines() if " none " in line)
    assert gim.memory.size(want.peak) in row and "512" in row  # as many positions as it has a table of
    said = " ".join(result.out.split())
    assert said.count("layer+tile=4096: runs MLPs in parts, which does not apply to bert.encoder.layer.0") == 1
    assert said.count("runs MLPs in parts") == 1  # once for all plans of one reason
    T5Config(d_model=32, d_ff=48, num_layers=1, num_heads=2).save_pretrained(tmp_path / "pair")
    result = run("plan", tmp_path / "pair", "--tokens", "16")
    assert result.code == 2 and "T5Config is an encoder-decoder, which embeds the ids of two texts" in result.err


@pytest.mark.slow
def test_plan_marks_what_fits(config_folder: Path) -> None:
    import gim

    estimates = gim.estimate_memory(_config(config_folder), 20000)
    layer = next(one for one in estimates if one.plan.name == "layer")
    memory = layer.parts["weights"] + layer.activations / gim.memory.AUTO_SHARE + 2
    result = run("plan", config_folder, "-n", "20000", "--gpu-memory", f"{int(memory)}B")
    assert result.code == 0, result.err
    marked = [line for line in result.out.splitlines() if line.startswith(" * ")]
    assert len(marked) == 1 and "none" not in marked[0] and "offload" not in marked[0]
    result = run("plan", config_folder, "-n", "20000", "--gpu-memory", "20MB")
    assert result.code == 1 and "no plan fits" in result.out
    assert not [line for line in result.out.splitlines() if line.startswith(" * ")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "10", "--gpu-memory", "much"], "--gpu-memory must be a size such as 80GiB or 80GB, got 'much'"),
        (["--tokens", "10", "--gpu-memory", "0GiB"], "--gpu-memory must be a size"),
        (["--tokens", "10", "--explained", "11"], "--explained must be at most the 10 tokens, got 11"),
        (["--tokens", "100000000000"], "--tokens must be at most 134,217,728, got 100,000,000,000"),
        (["--tokens", "10", "--rules", "none"], "--rules must be Rules or one of"),
    ],
)
def test_plan_refuses(config_folder: Path, arguments: list[str], message: str) -> None:
    result = run("plan", config_folder, *arguments)
    assert result.code == 2 and message in result.err


def test_plan_needs_a_config(tmp_path: Path) -> None:
    result = run("plan", tmp_path, "--tokens", "10")
    assert result.code == 2 and "model: cannot load the config of" in result.err
    result = run("plan", "./nowhere", "--tokens", "10")
    assert result.code == 2 and "model: there is no folder './nowhere'" in result.err


def test_explain_takes_the_name_of_a_plan(folder: Path, tmp_path: Path, expected: Any) -> None:
    result = run("explain", "-m", folder, "-p", PROMPT, "--json", tmp_path / "a", "--memory", "layer+attention+tile=4")
    assert result.code == 0, result.err
    assert Attribution.from_json(tmp_path / "a").memory == expected(memory="layer+attention+tile=4").memory
    result = run("explain", "-m", folder, "-p", PROMPT, "--memory", "lean")
    assert result.code == 2 and "memory must be a MemoryPlan, 'auto' or one of" in result.err


def test_a_prompt_beyond_the_position_limit(folder: Path) -> None:
    config = _config(folder)
    prompt = "word " * (config.max_position_embeddings + 1)
    result = run("explain", "-m", folder, "-p", prompt)
    assert result.code == 2 and f"has {config.max_position_embeddings:,} positions" in result.err
    result = run("explain", "-m", folder, "-p", prompt, "--allow-extrapolation")
    assert result.code == 0, result.err

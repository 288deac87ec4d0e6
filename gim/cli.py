"""The command line: `gim explain`, `gim evaluate`, `gim tasks`, `gim check`, `gim plan`, `gim demo`, `gim bench`.

Nothing heavy is imported before a command runs, so that `gim --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from gim import cli_evaluate

if TYPE_CHECKING:
    from gim.applied import AppliedReport
    from gim.attribution import Attribution
    from gim.memory import PlanRow
    from gim.rules import Rules
    from gim.targets import Target

#: What a model reads in `gim check`, where no other text is given.
CHECK_PROMPT = "The capital of France is"
#: How often `gim check --engine` runs each of the two engines.
COMPARED_TIMES = 5

app = typer.Typer(
    name="gim",
    help="Gradient attribution of large language models with the GIM rules.",
    no_args_is_help=True,
    add_completion=False,
    # A traceback of an unexpected error is for whoever mends it: Python's own, without the values in it.
    pretty_exceptions_enable=False,
)


class Measure(StrEnum):
    """As what a token's score is explained."""

    LOGIT = "logit"
    LOGPROB = "logprob"


class Dtype(StrEnum):
    """The type that weights are loaded in; `auto` is the checkpoint's own."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


class EngineName(StrEnum):
    """As :class:`gim.GIM` takes them."""

    AUTO = "auto"
    TRITON = "triton"
    COMPOSED = "composed"
    BLOCKWISE = "blockwise"
    REFERENCE = "reference"


class UserError(Exception):
    """Something the user can put right: shown in one line, without a traceback."""


_Model = Annotated[
    str, typer.Option("--model", "-m", help="Hub id or folder of a language model or sequence classifier.")
]
_RulesName = Annotated[
    str, typer.Option("--rules", "-r", help="Preset: GIM, GIM_CONSTANT, GRADIENT, TRANSFORMER_LRP, ATTNLRP, ...")
]
_Device = Annotated[str, typer.Option(help="Where to run, such as cpu or cuda:1; auto is a GPU if there is one.")]
_DtypeOption = Annotated[Dtype, typer.Option(help="Type to load the weights in; auto is the checkpoint's own.")]
_Memory = Annotated[
    str, typer.Option(help="What is kept for the backward: auto, or a plan as `gim plan` names it, such as layer.")
]
_Extrapolate = Annotated[
    bool, typer.Option("--allow-extrapolation", help="Run prompts longer than the model's position limit.")
]
_Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model. Off by default.")
]
_Html = Annotated[Path | None, typer.Option("--html", help="Write a self-contained page here.")]
_Json = Annotated[Path | None, typer.Option("--json", help="Write the scores and all about them here.")]
_Png = Annotated[Path | None, typer.Option("--png", help="Write a picture here (needs the extra report).")]
_Top = Annotated[int, typer.Option("--top", "-k", min=1, help="How many of the strongest tokens to list.")]
_EngineOption = Annotated[
    EngineName,
    typer.Option("--engine", help="Which code runs the operators; composed and reference check the others, slowly."),
]
_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of every error, and library warnings.")]


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        version = importlib.metadata.version("gim-kernels")
    except importlib.metadata.PackageNotFoundError:
        version = "of a source tree that is not installed"
    typer.echo(f"gim-kernels {version}")
    raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def explain(
    model: _Model,
    source: Annotated[
        str | None, typer.Argument(metavar="[-]", help="A single dash reads the prompt from standard input.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompt-file", "-f", help="A UTF-8 file with the prompt; its last line end is dropped."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="Explain this token, continuation or class, not the model's prediction."),
    ] = None,
    contrast: Annotated[
        str | None, typer.Option("--contrast", "-c", help="Explain the target minus this next token.")
    ] = None,
    measure: Annotated[
        Measure | None,
        typer.Option(help="Score to explain; by default the logit, of a continuation the log-probability."),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The token that stands for nothing; by default a space, padding or unknown.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is what a user says: put it into the model's chat template.")
    ] = False,
    rules: _RulesName = "GIM",
    temperature: Annotated[
        float | None, typer.Option(help="Temperature of the softmax backward, in place of the preset's.")
    ] = None,
    html: _Html = None,
    json: _Json = None,
    png: _Png = None,
    top: _Top = 10,
    device: _Device = "auto",
    dtype: _DtypeOption = Dtype.AUTO,
    memory: _Memory = "auto",
    allow_extrapolation: _Extrapolate = False,
    trust_remote_code: _Trust = False,
    debug: _Debug = False,
    engine: _EngineOption = EngineName.AUTO,
) -> None:
    """Attribute what a model says next to the tokens of its prompt.

    The prompt comes from --prompt, from --prompt-file, or, given a single dash, from standard input.
    """
    with _handled(debug):
        chosen = _rules(rules, temperature)
        text = _read_prompt(source, prompt, prompt_file)
        _check_texts({"--target": target, "--contrast": contrast, "--baseline": baseline})
        outputs = _check_outputs({"--html": html, "--json": json, "--png": png})
        loaded, tokenizer = _load(model, device, dtype, trust_remote_code)
        _check_engine(engine, loaded)
        with _refused():
            wanted = _target(target, contrast, measure, tokenizer, loaded)
            import gim

            asked = [{"role": "user", "content": text}] if chat else text
            with _progress(_token_count(tokenizer, asked)) as progress:
                attribution = gim.attribute(
                    loaded,
                    tokenizer,
                    asked,
                    target=wanted,
                    baseline=baseline,
                    rules=chosen,
                    memory=memory,
                    progress=progress,
                    allow_extrapolation=allow_extrapolation,
                    engine=engine.value,
                )
        _show(attribution, top)
        _write(attribution, outputs, top)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a language model or sequence classifier.")],
    rules: _RulesName = "GIM",
    device: _Device = "cpu",
    dtype: _DtypeOption = Dtype.AUTO,
    trust_remote_code: _Trust = False,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="What the model reads while every operator is watched.")
    ] = CHECK_PROMPT,
    debug: _Debug = False,
    engine: _EngineOption = EngineName.AUTO,
) -> None:
    """Show what each rule is applied to in one forward pass, watched operator by operator.

    With --engine, the prompt is explained under that engine and under auto, and the two are shown side by side.
    Exits with 1 where a rule cannot be applied to a part that it is meant for.
    """
    with _handled(debug):
        chosen = _rules(rules, None)
        loaded, tokenizer = _load(model, device, dtype, trust_remote_code)
        _check_engine(engine, loaded)
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(loaded.device)
        if not ids.numel():
            raise UserError("--prompt: holds no token")
        with _refused():
            from gim.context import inspect

            report = inspect(loaded, chosen, ids, engine=engine.value)
            compared = [] if engine is EngineName.AUTO else _compare(loaded, ids, chosen, engine)
        _show_report(type(loaded).__name__, chosen, report, prompt)
        _show_compared(compared)
    if not report.complete:
        raise typer.Exit(1)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a causal language model; its config is enough.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Length of the prompt.")],
    gpu_memory: Annotated[
        str | None,
        typer.Option(help="Memory of the GPU, such as 80GiB; by default that of the device that is there."),
    ] = None,
    explained: Annotated[int, typer.Option(min=1, help="How many positions are explained.")] = 1,
    rules: _RulesName = "GIM",
    dtype: _DtypeOption = Dtype.AUTO,
    trust_remote_code: _Trust = False,
    debug: _Debug = False,
) -> None:
    """Predict the memory of an attribution under every plan, before anything is loaded.

    Exits with 1 where no plan fits.
    """
    with _handled(debug):
        chosen = _rules(rules, None)
        if explained > tokens:
            raise UserError(f"--explained must be at most the {tokens} tokens, got {explained}")
        memory = None if gpu_memory is None else _bytes(gpu_memory)
        import torch

        from gim.memory import free_bytes, plan_rows

        _quieten()
        device = torch.device("cuda" if memory is not None or torch.cuda.is_available() else "cpu")
        twin = _twin(model, chosen, device, dtype, trust_remote_code)
        total = free_bytes(device) if memory is None else memory
        rows = plan_rows(twin, tokens, total, explained=explained)
        _show_plans(type(twin.model).__name__, twin, tokens, total, gpu_memory is not None, rows)
    if not any(row.chosen for row in rows):
        raise typer.Exit(1)


@app.command()
def demo(
    html: _Html = None,
    json: _Json = None,
    png: _Png = None,
    rules: _RulesName = "GIM",
    top: _Top = 10,
    debug: _Debug = False,
) -> None:
    """Ask a small model that comes with the package for a fact in a long text, and see where it looked."""
    with _handled(debug):
        chosen = _rules(rules, None)
        outputs = _check_outputs({"--html": html, "--json": json, "--png": png})
        import gim
        import gim.demo

        _quieten()
        try:
            model, tokenizer = gim.demo.load()
            prompt = gim.demo.prompt()
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
        with _refused(), _progress(_token_count(tokenizer, prompt.text)) as progress:
            attribution = gim.attribute(model, tokenizer, prompt.text, rules=chosen, progress=progress)
        _show(attribution, top)
        _show_demo(attribution, prompt)
        _write(attribution, outputs, top)


#: Runs the benchmarks of the source tree named first, before everything else that Python can import.
_BENCH = "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); runpy.run_module('benchmarks', run_name='__main__')"


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    short_help="Measure throughput and memory against rivals; needs a source tree.",
)
def bench(context: typer.Context) -> None:
    """Run the benchmarks of the source tree that this package, or the current folder, belongs to.

    They are no part of the package: nothing is timed before the tests' oracle has held it against float64, and the
    rivals are written in the tests' words. They run in a process of their own, with the code of their own tree, so that
    the commit in the results is the one that was timed.
    """
    with _handled(False):
        places = (Path(__file__).parents[1], Path.cwd())
        parts = ("benchmarks/__main__.py", "tests/oracle.py", "gim_kernels/__init__.py")
        tree = next((place for place in places if all((place / part).is_file() for part in parts)), None)
        if tree is None:
            raise UserError(
                "benchmarks run from a source tree of gim-kernels, where the oracle is that they hold everything to: "
                "go to a checkout's folder and run gim bench there"
            )
    command = [sys.executable, "-c", _BENCH, str(tree), *context.args]
    try:
        code = subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        code = 130  # the other process was interrupted too, and has kept what it had
    raise typer.Exit(code)


# ---------------------------------------------------------------------------------------------- what was asked for


def _rules(name: str, temperature: float | None) -> Rules:
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


def _read_prompt(source: str | None, prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt from the one place that was named."""
    if source not in (None, "-"):
        raise UserError(f"the only argument there can be is -, for standard input; got {source!r} (use --prompt)")
    given = {"--prompt": prompt is not None, "--prompt-file": prompt_file is not None, "-": source == "-"}
    named = [name for name, is_given in given.items() if is_given]
    if len(named) != 1:
        got = " and ".join(named) or "none of them"
        raise UserError(f"the prompt must come from one of --prompt, --prompt-file and -; got {got}")
    if prompt is not None:
        name, text = "--prompt", prompt
    elif prompt_file is None or str(prompt_file) == "-":
        name, text = "standard input", _decode("standard input", typer.get_binary_stream("stdin").read())
    else:
        name = f"--prompt-file {prompt_file}"
        try:
            content = prompt_file.read_bytes()
        except OSError as error:
            raise UserError(f"{name}: {error.strerror or error}") from error
        text = _decode(name, content)
    if not text:
        raise UserError(f"{name}: the prompt must not be empty")
    return text


def _decode(name: str, content: bytes) -> str:
    """Text from UTF-8, without a byte order mark and without the line end that editors put at the end."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise UserError(f"{name}: not text in UTF-8: byte 0x{byte:02x} at offset {error.start}") from error
    if text.endswith("\r\n"):
        return text[:-2]
    return text.removesuffix("\n")


def _check_texts(texts: dict[str, str | None]) -> None:
    for name, text in texts.items():
        if text == "":
            raise UserError(f"{name} must not be empty")


def _check_outputs(outputs: dict[str, Path | None]) -> dict[str, Path]:
    """The files to write, after it is known that they can be."""
    from gim.files import check_writable

    wanted = {name: path for name, path in outputs.items() if path is not None}
    seen: dict[Path, str] = {}
    for name, path in wanted.items():
        try:
            check_writable(path, name)
        except OSError as error:
            raise UserError(str(error)) from error
        other = seen.setdefault(path.resolve(), name)
        if other != name:
            raise UserError(f"{name}: {path} is the file of {other} too")
    if "--png" in wanted and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--png: a picture needs matplotlib: pip install gim-kernels[report]")
    return wanted


def _target(target: str | None, contrast: str | None, measure: Measure | None, tokenizer: Any, model: Any) -> Target:
    """The target that --target, --contrast and --measure mean together."""
    from gim import targets
    from gim.parts import anatomy

    wanted: Target
    if contrast:
        wanted = targets.Contrast(target, contrast)
        if anatomy.of(model).head != "class":
            targets.contrast_ids(wanted, tokenizer, ("--target", "--contrast"))
    else:
        # The name of a class is no text of the tokenizer's.
        wanted = targets.Token(target) if anatomy.of(model).head == "class" else targets.parse(target, tokenizer)
    return wanted if measure is None else dataclasses.replace(wanted, measure=measure.value)


def _check_folder(name: str) -> None:
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if not name or (looks_like_path and not Path(name).is_dir()):
        raise UserError(f"model: there is no folder {name!r}")


def _load(
    name: str, device: str, dtype: Dtype, trust_remote_code: bool, *, with_tokenizer: bool = True
) -> tuple[Any, Any]:
    """The model, in evaluation mode on its device, and its tokenizer."""
    _check_folder(name)
    import torch
    import transformers
    from safetensors import SafetensorError

    from gim.loading import check_weights

    _quieten()
    where = _device(device)
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


def _quieten() -> None:
    """Keep libraries from writing between our lines; what they raise and warn of is shown by us."""
    import huggingface_hub
    import transformers

    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    if not Console(stderr=True).is_terminal:
        transformers.utils.logging.disable_progress_bar()


def _check_engine(engine: EngineName, model: Any) -> None:
    """Refuse an engine that cannot run a model where it lies, before anything runs."""
    from gim.context import check_engine

    try:
        check_engine(engine.value, model)
    except (TypeError, RuntimeError) as error:
        raise UserError(f"--engine: {error}") from error


@dataclasses.dataclass(frozen=True)
class _Compared:
    """One engine's attribution of a prompt: what ran, the seconds it took, how far it is off that of ``auto``."""

    asked: str
    ran: str
    seconds: float
    difference: float


def _compare(model: Any, ids: Any, rules: Rules, engine: EngineName) -> list[_Compared]:
    """A prompt ``[1, T]`` explained under ``auto`` and another engine, in turn; the fastest of a few times each."""
    import torch

    from gim.memory import run
    from gim.scoring import PREDICTION, Terms

    last = torch.tensor([[ids.shape[1] - 1]], device=ids.device)
    scored = Terms(last, torch.full_like(last, PREDICTION), torch.ones_like(last), "logit")
    # On a CPU the time that this process took, whatever else the machine does.
    clock = time.process_time if ids.device.type == "cpu" else time.perf_counter
    asked = (EngineName.AUTO, engine)
    seconds = dict.fromkeys(asked, float("inf"))
    found = {}
    for _ in range(COMPARED_TIMES):
        for one in asked:
            start = clock()
            found[one] = run(model, ids, None, scored, 0, rules, "layer", None, strict=False, engine=one.value)
            found[one].scores.sum().item()  # on a GPU, when it is done
            seconds[one] = min(seconds[one], clock() - start)
    ours = found[EngineName.AUTO].scores.double()
    tiny = torch.finfo(ours.dtype).tiny
    return [
        _Compared(
            one.value,
            _ran(found[one].report),
            seconds[one],
            float((found[one].scores.double() - ours).norm() / ours.norm().clamp_min(tiny)),
        )
        for one in asked
    ]


def _ran(report: AppliedReport) -> str:
    """What ran each part, in words."""
    return ", ".join(f"{part.replace('_', ' ')} by {name}" for part, name in report.engines.items())


def _show_compared(rows: list[_Compared]) -> None:
    """Engines side by side."""
    if not rows:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("engine", no_wrap=True)
    table.add_column("what ran", overflow="fold")
    for column in ("time", "over auto", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        ratio = row.seconds / rows[0].seconds
        table.add_row(row.asked, row.ran, f"{1000 * row.seconds:.1f} ms", f"{ratio:.2f}x", f"{row.difference:.1e}")
    console = Console()
    console.print(table)
    console.print(Text("difference: of the scores to auto's, norm over norm", "dim"))


def _token_count(tokenizer: Any, prompt: Any) -> int:
    """How many tokens a prompt has."""
    from gim.prompts import encode

    return len(encode(prompt, tokenizer).ids)


def _bytes(text: str) -> int:
    """Bytes from text such as 80GiB, 80GB, 512 MiB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    count = 0.0
    if found is not None:
        count = float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2].lower() or " ")
    if count < 1:
        raise UserError(f"--gpu-memory must be a size such as 80GiB or 80GB, got {text!r}")
    return int(count)


def _twin(name: str, rules: Rules, device: Any, dtype: Dtype, trust_remote_code: bool) -> Any:
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


def _device(name: str) -> Any:
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


# ------------------------------------------------------------------------------------------------- errors, progress


@contextmanager
def _handled(debug: bool) -> Iterator[None]:
    """Inside, an error of the user's becomes one line and exit code 2, and warnings one line each at the end."""
    err = Console(stderr=True)
    failure: UserError | None = None
    with warnings.catch_warnings(record=not debug) as caught:
        try:
            yield
        except UserError as error:
            failure = error
            if debug:
                traceback.print_exc()
    for message in dict.fromkeys(str(warning.message) for warning in caught or []):
        _line(err, "warning:", "yellow", message)
    if failure is not None:
        _line(err, "error:", "bold red", str(failure))
        raise typer.Exit(2)


@contextmanager
def _refused() -> Iterator[None]:
    """Inside, what the library refuses is the user's to put right; any other error is not."""
    import torch

    from gim.applied import UnsupportedModelError

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(str(error)) from error
    except (ValueError, FloatingPointError, NotImplementedError, UnsupportedModelError) as error:
        raise UserError(str(error)) from error


def _line(console: Console, word: str, style: str, message: str) -> None:
    """One line, however the message was laid out, with nothing in it that a terminal would obey."""
    from gim.render import one_line

    text = Text.assemble((word, style), " ", one_line(" ".join(message.split())))
    console.print(text, soft_wrap=True)


@contextmanager
def _progress(tokens: int) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar for each stage on standard error, with its tokens per second; nothing where that is not a terminal."""
    err = Console(stderr=True)
    if not err.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, console=err, transient=True) as bars:
        tasks: dict[str, Any] = {}
        started: dict[str, float] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, rate="")
                started[stage] = time.perf_counter()
            seconds = time.perf_counter() - started[stage]
            rate = f"{tokens * done / total / seconds:,.0f} tokens/s" if done and total and seconds > 0 else ""
            bars.update(tasks[stage], completed=done, total=total, rate=rate)

        yield report


# -------------------------------------------------------------------------------------------------- what was found


def _show(attribution: Attribution, top: int) -> None:
    from gim import render

    Console().print(render.terminal(attribution, top=top))


def _write(attribution: Attribution, outputs: dict[str, Path], top: int) -> None:
    """Write every file that was asked for, and say so."""
    writers: dict[str, Callable[[Path], object]] = {
        "--html": lambda path: attribution.to_html(path, top=max(top, 20)),
        "--json": attribution.to_json,
        "--png": lambda path: attribution.to_png(path, top=max(top, 15)),
    }
    console = Console()
    for name, path in outputs.items():
        try:
            writers[name](path)
        except OSError as error:
            raise UserError(f"{name}: cannot write {path}: {error.strerror or error}") from error
        console.print(Text.assemble(("wrote ", "dim"), str(path)), soft_wrap=True)


def _show_report(model: str, rules: Rules, report: AppliedReport, prompt: str) -> None:
    """What each rule would be applied to, modules that differ in their numbers only in one row."""
    from gim.applied import PARTS
    from gim.render import visible

    console = Console()
    console.print(Text.assemble((visible(model), "bold"), "\n", (rules.describe(), "dim")))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("modules", overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("what their backward does", overflow="fold")
    for part in PARTS:
        rows: dict[tuple[str, str, str, str], list[str]] = {}
        for found in report.of(part):
            pattern = re.sub(r"\d+", "#", found.module)
            key = (found.module_class, found.rule, found.recognised, pattern)
            rows.setdefault(key, []).append(found.module)
        for (module_class, rule, recognised, _), modules in rows.items():
            table.add_row(
                Text.assemble(visible(_numbered(modules)), "\n", (visible(module_class), "dim")),
                str(len(modules)),
                Text.assemble(visible(rule), "\n", (f"{part.replace('_', ' ')}; {visible(recognised)}", "dim")),
            )
    console.print(table)
    if report.engines:
        console.print(Text.assemble(("ran: ", "dim"), visible(_ran(report))))
    for note in report.notes:
        console.print(Text.assemble(("note: ", "dim"), visible(note)))
    for module, reason in report.unsupported:
        console.print(Text.assemble(("not covered: ", "bold red"), visible(f"{module}: {reason}")))
    watched = f"watched, every operator of a forward over {prompt!r}" if report.watched else "not watched"
    console.print(Text.assemble((visible(watched), "dim")))
    verdict = (
        ("every rule can be applied", "green") if report.complete else ("NOT every rule can be applied", "bold red")
    )
    console.print(Text.assemble(verdict))


def _show_plans(model: str, twin: Any, tokens: int, memory: int | None, is_given: bool, rows: list[PlanRow]) -> None:
    """Every plan's predicted memory and cost, the one that `auto` would take marked."""
    from gim.memory import AUTO_SHARE, size
    from gim.parts import anatomy
    from gim.render import visible

    console = Console()
    where = "GPU" if twin.device == "cuda" else "CPU"
    has = "unknown" if memory is None else f"{size(memory)} {'given' if is_given else 'free'}"
    console.print(Text.assemble((visible(model), "bold"), f", {tokens:,} tokens on a {where}: memory {has}"))
    console.print(Text.assemble(("weights ", "dim"), size(twin.weights), ("; predicted, not measured", "dim")))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    # By part only where there is room for it.
    parts = ("checkpoints", "attention", "layer") if console.width >= 120 else ()
    table.add_column("", min_width=1)
    table.add_column("plan", overflow="fold")
    for column in ("memory", *parts, "host", "cost", "longest"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        found = row.estimate
        mark = Text("*", "bold green") if row.chosen else Text("")
        if found is None:
            table.add_row(mark, row.plan.name, Text(visible(row.reason), "dim"))
            continue
        style = "bold" if row.chosen else "" if row.fits else "dim"
        table.add_row(
            mark,
            Text(row.plan.name, style),
            Text(size(found.peak), style if row.fits else "red"),
            *(size(found.parts[part]) for part in parts),
            size(found.host) if found.host else "",
            f"{found.relative_cost:.2f}x",
            "" if row.longest is None else f"{row.longest:,}",
        )
    console.print(table)
    if any(row.chosen for row in rows):
        console.print(
            Text.assemble(("*", "bold green"), (" the fastest plan that fits: --memory auto takes it", "dim"))
        )
    else:
        console.print(Text("no plan fits", "bold red"))
    console.print(
        Text(
            "cost: operations of matrix products and attention, over those of the plan none. longest: the prompt, "
            f"in tokens, that fits in the weights and {AUTO_SHARE:.0%} of the rest",
            "dim",
        )
    )
    limit = anatomy.of(twin.model).position_limit
    if limit is not None and tokens > limit:
        console.print(Text(f"the model has {limit:,} positions: more needs --allow-extrapolation", "yellow"))


def _numbered(modules: list[str]) -> str:
    """Names that differ in their numbers only, as one: layers.0.mlp, layers.1.mlp -> layers.{0-1}.mlp."""
    columns = zip(*(re.findall(r"\d+", module) for module in modules), strict=True)
    ranges = []
    for column in columns:
        numbers = sorted({int(number) for number in column})
        if len(numbers) == 1:
            ranges.append(str(numbers[0]))
        elif numbers == list(range(numbers[0], numbers[-1] + 1)):
            ranges.append(f"{{{numbers[0]}-{numbers[-1]}}}")
        else:
            ranges.append("{" + ",".join(str(number) for number in numbers) + "}")
    parts = iter(ranges)
    return re.sub(r"\d+", lambda _: next(parts), modules[0])


def _show_demo(attribution: Attribution, prompt: Any) -> None:
    """The question, the model's answer, and where the statements of the asked fact rank."""
    from gim.render import number, one_line

    console = Console()
    answer = "".join(attribution.target.tokens)
    is_right = answer.strip() == prompt.answer.strip()
    question = prompt.text.rstrip().splitlines()[-2]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    grid.add_row("Asked", Text(one_line(question)))
    verdict = (" (right)", "green") if is_right else (f" (wrong, it is {prompt.answer.strip()!r})", "red")
    grid.add_row("Answered", Text.assemble((one_line(answer.strip()), "bold"), verdict))
    console.print(grid)
    console.print()

    sentences = sorted(attribution.to_sentences(), key=lambda span: -abs(span.score))
    table = Table(
        title=f"The {len(prompt.statements)} statements of the asked fact",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("statement")
    table.add_column("best token")
    table.add_column("at", justify="right")
    table.add_column("score", justify="right")
    table.add_column("rank", justify="right")
    table.add_column("sentence rank", justify="right")
    tokens = sum(not special for special in attribution.special)
    for statement in prompt.statements:
        start, end = statement.sentence
        best = attribution.best_in(start, end, by="abs")
        of_sentences = next(
            rank for rank, span in enumerate(sentences, start=1) if span.start < end and span.end > start
        )
        table.add_row(
            Text(one_line(attribution.text[start:end])),
            Text(one_line(best.token)),
            f"{best.position:,}",
            number(best.score),
            f"{best.rank:,} of {tokens:,}",
            f"{of_sentences:,} of {len(sentences):,}",
        )
    console.print(table)


cli_evaluate.add_to(
    app,
    cli_evaluate.Tools(
        load=lambda name, device, dtype, trust: _load(name, device, Dtype(dtype), trust),
        handled=_handled,
        refused=_refused,
        check_outputs=_check_outputs,
        error=UserError,
    ),
)

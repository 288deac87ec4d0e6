"""`gim explain`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gim.cli.attributions import progress_bar, show, writers
from gim.cli.errors import UserError, check_outputs, check_texts, handled, refused
from gim.cli.models import load, refuse_engine, rules_named, token_count
from gim.cli.options import (
    Debug,
    DeviceName,
    Dtype,
    DtypeOption,
    EngineName,
    EngineOption,
    Extrapolate,
    HtmlFile,
    JsonFile,
    Measure,
    MemoryOption,
    ModelName,
    Per,
    PngFile,
    RulesName,
    Top,
    Trust,
)
from gim.cli.output import deliver

if TYPE_CHECKING:
    from gim.targets import Target

#: Tokens of a chat's answer that are explained where nothing else is asked for.
CHAT_TOKENS = 32


def command(
    model: ModelName,
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
    answer: Annotated[
        str | None, typer.Option("--answer", "-a", help="Explain every token of this answer, and the whole of it.")
    ] = None,
    generate: Annotated[
        int | None,
        typer.Option("--generate", "-g", help="The same of what the model itself answers, at most this many tokens."),
    ] = None,
    measure: Annotated[
        Measure | None,
        typer.Option(
            help="Score to explain; by default the logit, of a continuation the log-probability, of a whole answer the "
            "log-odds."
        ),
    ] = None,
    per: Annotated[
        Per,
        typer.Option(
            help="Beside the tokens, score the stream that each layer reads, or each attention head's output."
        ),
    ] = Per.TOKEN,
    baseline: Annotated[
        str | None, typer.Option(help="The token that stands for nothing; by default a space, padding or unknown.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="The prompt is what a user says: put it into the model's chat template, and explain the answer, 32 "
            "tokens of it unless a target or an answer is given, or --next, or --per.",
        ),
    ] = False,
    segment: Annotated[
        list[str] | None,
        typer.Option(
            "--segment",
            help="A part of the prompt with a name, such as a passage: NAME=TEXT, or NAME=@FILE; what it says occurs "
            "in the prompt once. May be given several times.",
        ),
    ] = None,
    next_token: Annotated[bool, typer.Option("--next", help="Explain the next token, in a chat too.")] = False,
    rules: RulesName = "GIM",
    temperature: Annotated[
        float | None, typer.Option(help="Temperature of the softmax backward, in place of the preset's.")
    ] = None,
    html: HtmlFile = None,
    json: JsonFile = None,
    png: PngFile = None,
    top: Top = 10,
    device: DeviceName = "auto",
    dtype: DtypeOption = Dtype.AUTO,
    memory: MemoryOption = "auto",
    allow_extrapolation: Extrapolate = False,
    trust_remote_code: Trust = False,
    debug: Debug = False,
    engine: EngineOption = EngineName.AUTO,
) -> None:
    """Attribute what a model says next to the tokens of its prompt.

    The prompt comes from --prompt, from --prompt-file, or, given a single dash, from standard input. Ctrl-C while an
    answer is explained keeps its first tokens, those that are finished.
    """
    with handled(debug):
        chosen = rules_named(rules, temperature)
        text = _read_prompt(source, prompt, prompt_file)
        check_texts({"--target": target, "--contrast": contrast, "--answer": answer, "--baseline": baseline})
        outputs = check_outputs({"--html": html, "--json": json, "--png": png}, [("--prompt-file", prompt_file)])
        named = {"--target": target, "--contrast": contrast, "--answer": answer, "--generate": generate}
        inside = None if per is Per.TOKEN else per.value
        if chat and not next_token and not inside and all(given is None for given in named.values()):
            generate = CHAT_TOKENS
        whole = _whole_answer({**named, "--next": next_token or None, "--per": inside}, answer, generate)
        loaded, tokenizer = load(model, device, dtype, trust_remote_code)
        refuse_engine(engine, loaded)
        with refused():
            import gim

            if whole:
                wanted = {**whole, "measure": None if measure is None else measure.value}
            else:
                wanted = {"target": _target(target, contrast, measure, tokenizer, loaded), "per": per.value}
            asked = [{"role": "user", "content": text}] if chat else text
            parts = _segments(segment, asked, tokenizer) if segment else None
            cut = ""
            before = "" if generate is None else "The model writes its answer"
            with progress_bar(token_count(tokenizer, asked), before) as progress:
                try:
                    attribution = gim.attribute(
                        loaded,
                        tokenizer,
                        asked,
                        **wanted,
                        baseline=baseline,
                        rules=chosen,
                        memory=memory,
                        progress=progress,
                        allow_extrapolation=allow_extrapolation,
                        engine=engine.value,
                        segments=parts,
                    )
                except gim.AnswerInterrupted as error:
                    attribution, cut = error.attribution, str(error)
        if cut:
            typer.echo(cut, err=True)
        deliver(outputs, writers(attribution, top), lambda: show(attribution, top))
    if cut:
        raise typer.Exit(130)


def _whole_answer(named: dict[str, Any], answer: str | None, generate: int | None) -> dict[str, Any]:
    """The arguments for a whole answer; none where a single number is to be explained."""
    if answer is None and generate is None:
        return {}
    given = [name for name, value in named.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} cannot both be given: each says what is explained")
    return {"answer": answer} if generate is None else {"generate": generate}


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
        text = _content(name, prompt_file)
    if not text:
        raise UserError(f"{name}: the prompt must not be empty")
    return text


def _segments(given: list[str], asked: Any, tokenizer: Any) -> dict[str, tuple[int, int]]:
    """Named parts of what the model reads, by what they say."""
    from gim import prompts

    whole = prompts.encode(asked, tokenizer).text
    found: dict[str, tuple[int, int]] = {}
    for one in given:
        name, sign, said = one.partition("=")
        if not name or not sign or not said:
            raise UserError(f"--segment must be NAME=TEXT or NAME=@FILE, got {one!r:.80}")
        if name in found:
            raise UserError(f"--segment {name} is given twice")
        said = _content(f"--segment {name}", Path(said[1:])) if said.startswith("@") else said
        times = whole.count(said) if said else 0
        if times != 1:
            raise UserError(f"--segment {name}: what it says must occur in the prompt once, and does {times} times")
        start = whole.index(said)
        found[name] = (start, start + len(said))
    return found


def _content(name: str, path: Path) -> str:
    """The text of a file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}") from error
    return _decode(name, content)


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

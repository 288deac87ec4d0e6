"""Options that several commands have, and what they may be."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Measure(StrEnum):
    """As what a token's score is explained."""

    LOGIT = "logit"
    LOGPROB = "logprob"
    LOGODDS = "logodds"


class Per(StrEnum):
    """What is scored."""

    TOKEN = "token"
    LAYER = "layer"
    HEAD = "head"


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


ModelName = Annotated[
    str, typer.Option("--model", "-m", help="Hub id or folder of a language model or sequence classifier.")
]
RulesName = Annotated[
    str, typer.Option("--rules", "-r", help="Preset: GIM, GIM_CONSTANT, GRADIENT, TRANSFORMER_LRP, ATTNLRP, ...")
]
DeviceName = Annotated[str, typer.Option(help="Where to run, such as cpu or cuda:1; auto is a GPU if there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Type to load the weights in; auto is the checkpoint's own.")]
MemoryOption = Annotated[
    str, typer.Option(help="What is kept for the backward: auto, or a plan as `gim plan` names it, such as layer.")
]
Extrapolate = Annotated[
    bool, typer.Option("--allow-extrapolation", help="Run prompts longer than the model's position limit.")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model. Off by default.")
]
HtmlFile = Annotated[Path | None, typer.Option("--html", help="Write a self-contained page here.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the scores and all about them here.")]
PngFile = Annotated[Path | None, typer.Option("--png", help="Write a picture here (needs the extra report).")]
Top = Annotated[int, typer.Option("--top", "-k", min=1, help="How many of the strongest tokens to list.")]
EngineOption = Annotated[
    EngineName,
    typer.Option("--engine", help="Which code runs the operators; composed and reference check the others, slowly."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of every error, and library warnings.")]

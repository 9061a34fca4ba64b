"""Options that the commands of ``tsqp bench`` share, and what is checked before anything is measured."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from tsqp import config as settings
from tsqp.config import EnclaveConfig
from tsqp.errors import ConfigError, InputError

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="smollm2, a Hugging Face directory or a .gguf file.", show_default="smollm2"),
]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32, float16 or bfloat16.", show_default="float32")
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", help="CPU threads of each process.", show_default="all cores")
]
PoolOption = Annotated[
    str | None,
    typer.Option("--mask-pool", help="For how many tokens masks are ready before a run.", show_default="one prompt"),
]
MemoryOption = Annotated[
    int | None, typer.Option("--mask-memory", help="Bytes that the mask pool may take.", show_default="1 GiB")
]
MicroBatchesOption = Annotated[
    int | None,
    typer.Option("--micro-batches", help="Parts of a prompt that take turns.", show_default="by the prompt's length"),
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where workers and dealers compute: cpu or cuda:N.")]
TraceOption = Annotated[
    Path | None,
    typer.Option("--trace", help="Also write a timeline of one prefill per level, for ui.perfetto.dev, to this file."),
]
HtmlOption = Annotated[Path | None, typer.Option("--html", help="Also write a page for people to this file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

_LONGEST_MS = 1000.0


def load(flags: Mapping[str, object], tokens: int, rounds: int) -> EnclaveConfig:
    """Build the settings and check what every measurement of a model needs.

    Raises:
        ConfigError: a setting is wrong.
        InputError: no tokens.
    """
    if tokens < 1:
        raise InputError(f"--tokens {tokens}: at least 1 is needed.")
    check_rounds(rounds)
    return settings.load(EnclaveConfig, flags)


def check_rounds(rounds: int) -> None:
    """Refuse to measure nothing.

    Raises:
        ConfigError: fewer than one round.
    """
    if rounds < 1:
        raise ConfigError(f"--rounds {rounds}: at least 1 is needed.")


def check_writable(path: Path | None, option: str) -> None:
    """Refuse a file that cannot be written before minutes are spent on what it would hold.

    Raises:
        InputError: there is no such directory, or it or the file is not ours to write.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no directory {path.parent}.")
    if path.is_dir():
        raise InputError(f"{option} {path}: that is a directory; give the name of a file.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{option} {path}: it cannot be written here.")


def whole_numbers(text: str, option: str, least: int = 1) -> tuple[int, ...]:
    """Read numbers between commas.

    Raises:
        ConfigError: something else, or a number that is too small.
    """
    found = []
    for word in text.split(","):
        if not (word.strip().isascii() and word.strip().isdecimal()) or int(word) < least:
            raise ConfigError(f"{option} {text}: expected whole numbers from {least} between commas, as in 16,64,256.")
        found.append(int(word))
    return tuple(dict.fromkeys(found))


def milliseconds(text: str, option: str) -> tuple[float, ...]:
    """Read times between commas.

    Raises:
        ConfigError: something else, or a time that is negative or longer than a second.
    """
    try:
        found = tuple(dict.fromkeys(float(word) for word in text.split(",")))
    except ValueError:
        found = ()
    if not found or not all(0.0 <= value <= _LONGEST_MS for value in found):
        raise ConfigError(f"{option} {text}: expected milliseconds from 0 to 1000 between commas, as in 0,1,3.")
    return found

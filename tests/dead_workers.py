"""Workers that die without a word: what they leave behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_BEGIN = """
import os, sys
from tsqp.transport.named import NamedRegion
from tsqp.transport.server import Server
from tsqp.transport.urls import Endpoint, parse
"""


def leave_socket(url: str) -> None:
    """Let another process listen there, and die at once."""
    _die("server = Server([parse(sys.argv[1])], 1 << 16)", url)


def leave_region(path: Path, max_message_bytes: int) -> None:
    """Let another process make a named region, and die at once."""
    _die("region = NamedRegion(Endpoint('shm', path=sys.argv[1]), int(sys.argv[2]))", str(path), str(max_message_bytes))


def _die(body: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-c", f"{_BEGIN}{body}\nos._exit(0)", *arguments], check=True)

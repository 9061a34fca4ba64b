"""A worker that watches the shared memory all the time: at `masked` it sees there nothing but what it is sent.

Tensors may be made in memory that the worker sees before they are sent. A process of its own, as the host could run,
samples the whole region while prefills run; afterwards every word it saw in the enclave's half must be of a message
that was really sent, and nothing anywhere an activation. A variant that quantises into a slot must be found.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from attacks.slots import IDS, LIMIT_BYTES, Journal, unchanged, worker
from attacks.traffic import Plaintext
from hostile import Material
from torch import Tensor

from tsqp.config import EnclaveConfig
from tsqp.levels import Model, runnable
from tsqp.transport import named, region, shm
from tsqp.transport.base import Buffer, ClientTransport
from tsqp.transport.link import PAGE
from tsqp.transport.urls import Endpoint, parse
from tsqp.wire import codec

PREFILLS = 3
LINE = 64

Lines = npt.NDArray[np.uint32]

# Notes each distinct 64-byte line that ever lies in a seat: of the enclave's half to one file, of the rest to another.
# The half's first part, where everything lies while it is small, is looked at more often.
SAMPLER = """
import mmap, sys
import numpy as np
path, start, length, half_at, half = sys.argv[1], *map(int, sys.argv[2:6])
with open(path, "rb") as file:
    seat = np.frombuffer(mmap.mmap(file.fileno(), length, prot=mmap.PROT_READ, offset=start), "V64")
parts = {"half": slice(half_at // 64, (half_at + half) // 64), "all": slice(0, len(seat))}
hot = slice(parts["half"].start, parts["half"].start + 4096)
seen = {name: set() for name in parts}
last = {}
def look(name, place):
    now = seat[place].copy()
    lines = now.view(np.uint64).reshape(-1, 8)
    before = last.get((name, place.start, place.stop))
    changed = np.ones(len(lines), bool) if before is None else (lines != before).any(axis=1)
    seen[name].update(line.tobytes() for line in lines[changed])
    last[name, place.start, place.stop] = lines
import threading
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
print("ready", flush=True)
while not ended.is_set():
    for _ in range(20):
        look("half", hot)
    for name, place in parts.items():
        look(name, place)
for name, lines in seen.items():
    with open(f"{sys.argv[6]}/{name}", "wb") as out:
        out.write(b"".join(sorted(lines)))
"""


class Sampled:
    """What the sampler saw."""

    def __init__(self, directory: Path) -> None:
        self.half = np.frombuffer((directory / "half").read_bytes(), np.uint32).reshape(-1, LINE // 4)
        self.everything = (directory / "all").read_bytes() + self.half.tobytes()


@pytest.fixture
def plaintext(monkeypatch: pytest.MonkeyPatch) -> Plaintext:
    return Plaintext(monkeypatch, (torch.float32,))


@dataclass(frozen=True)
class Place:
    """Where the memory that a client shares lies: a file, from where, how long, and in it the enclave's half."""

    path: str
    start: int
    length: int
    half_at: int
    half: int


def seat_of(endpoint: Endpoint) -> Place:
    """Return the first client's seat in a named region."""
    shape = named.shape_for(LIMIT_BYTES)
    return Place(endpoint.path, shape.seat_at(0), shape.seat_bytes, shape.data_at, shape.half)


@contextmanager
def handed_over() -> Iterator[Place]:
    """Let the next client through a socket hand over a region that a third process can open too."""
    made, descriptor = region.make_region(LIMIT_BYTES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shm, "make_region", lambda _limit: (made, os.dup(descriptor)))
        try:
            yield Place(f"/proc/{os.getpid()}/fd/{descriptor}", 0, len(made), PAGE, LIMIT_BYTES)
        finally:
            os.close(descriptor)


@contextmanager
def sampling(place: Place, directory: Path) -> Iterator[None]:
    """Watch it."""
    numbers = map(str, (place.start, place.length, place.half_at, place.half))
    words = [sys.executable, "-c", SAMPLER, place.path, *numbers, str(directory)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdin
        assert process.stdout.readline() == b"ready\n"
        yield
        process.stdin.close()
        assert process.wait() == 0


def watched(
    material: Material,
    directory: Path,
    before: Callable[[ClientTransport, list[Buffer]], list[Buffer]] = unchanged,
    retries: int = 0,
    over: str = "named",
) -> tuple[Sampled, list[bytes]]:
    """Run masked prefills under the sampler's eyes; return what it saw and what was sent.

    Masked words are written straight into slots, but for those that may be sent again in a named region: once the link
    is lost, its memory may be another client's.
    """
    named_url = f"shm:///dev/shm/tsqp-test-{os.getpid()}-watched"
    endpoint = parse(named_url if over == "named" else f"shm://{directory}/worker")
    model = Model(material.directory, material.packed.config, None, material.packed)
    config = EnclaveConfig(worker=endpoint.url, max_message_bytes=LIMIT_BYTES, mask_pool=0, retries=retries)
    journals: list[Journal] = []

    def wrap(_peer: str) -> Callable[[ClientTransport], ClientTransport]:
        def wrapped(link: ClientTransport) -> ClientTransport:
            journals.append(Journal(link, before))
            return journals[-1]

        return wrapped

    with (
        worker(material, endpoint),
        nullcontext(seat_of(endpoint)) if over == "named" else handed_over() as place,
        sampling(place, directory),
        runnable("masked", model, config, wrap=wrap) as loaded,
    ):
        assert loaded.predict_all is not None
        for _ in range(PREFILLS):
            loaded.predict_all(IDS)
            time.sleep(0.02)
    (journal,) = journals
    assert (journal.slots > 0) == (retries == 0 or over == "socket")
    return Sampled(directory), journal.sent


def lines_of(frames: Sequence[bytes]) -> Lines:
    """Return the lines that frames fill when they are written at multiples of 64 bytes; the rest of the last is 0."""
    padded = b"".join(frame + bytes(-len(frame) % LINE) for frame in frames)
    return np.frombuffer(padded, np.uint32).reshape(-1, LINE // 4)


def strangers(sampled: Sampled, sent: Sequence[bytes]) -> int:
    """Count the lines in the enclave's half that hold a word which was never sent at that place of a line.

    A line seen while it was written has words of two messages, and a frame's last line keeps old words behind it; by
    words both are found to be sent. A word that is not zero and was not sent passes with the chance that one of the
    words sent equals it: below 2^-10 for the words of these prefills, and a stranger's line has sixteen.
    """
    known = lines_of(sent)
    foreign = np.zeros(len(sampled.half), dtype=np.bool_)
    for place in range(LINE // 4):
        words = sampled.half[:, place]
        foreign |= (words != 0) & ~np.isin(words, known[:, place])
    return int(foreign.sum())


def common(sampled: Sampled, sent: Sequence[bytes]) -> int:
    """Count the distinct lines that were both sent and seen."""
    known = {line.tobytes() for line in lines_of(sent)}
    return sum(line.tobytes() in known for line in sampled.half)


@pytest.mark.parametrize("over", ["named", "socket"])
@pytest.mark.parametrize("retries", [0, 1])
def test_the_enclaves_half_holds_nothing_but_what_is_sent(
    material: Material, plaintext: Plaintext, tmp_path: Path, retries: int, over: str
) -> None:
    sampled, sent = watched(material, tmp_path, retries=retries, over=over)
    assert plaintext.integers
    assert common(sampled, sent) > 100  # the sampler looks at the right place, and often
    assert strangers(sampled, sent) == 0
    assert plaintext.found_in([sampled.everything]) == 0
    assert plaintext.scales_found_in([sampled.everything]) == 0


def test_an_enclave_that_quantises_into_a_slot_is_found(
    material: Material, plaintext: Plaintext, tmp_path: Path
) -> None:
    """The control: integers are written to the slot, and masked there, before it is sent."""

    def in_slot(link: ClientTransport, frames: list[Buffer]) -> list[Buffer]:
        integers = next((xq for xq in reversed(plaintext.integers) if _is_of(xq, frames)), None)
        slot = link.allocate(len(frames[1])) if integers is not None else None
        if integers is None or slot is None:
            return frames
        slot[:] = codec.frame_of(integers)
        time.sleep(0.005)
        slot[:] = frames[1]
        if isinstance(frames[1], memoryview):
            link.discard(frames[1])  # it may be a slot of the enclave's own
        return [frames[0], slot]

    sampled, sent = watched(material, tmp_path, in_slot)
    assert common(sampled, sent) > 0
    assert strangers(sampled, sent) > 0
    assert plaintext.found_in([sampled.everything]) > 0


def _is_of(xq_MK: Tensor, frames: Sequence[Buffer]) -> bool:
    return len(frames) > 1 and xq_MK.numel() * xq_MK.itemsize == len(frames[1])


def test_a_slot_that_was_abandoned_with_words_of_its_own_is_found(
    material: Material, plaintext: Plaintext, tmp_path: Path
) -> None:
    """The other control: words that look uniform but are not sent, such as a mask alone, are strangers."""
    random = np.random.default_rng(7)

    def with_mask(link: ClientTransport, frames: list[Buffer]) -> list[Buffer]:
        slot = link.allocate(20_000)
        if slot is not None:
            slot[:] = random.bytes(20_000)
            time.sleep(0.002)
            link.discard(slot)
        return frames

    sampled, sent = watched(material, tmp_path, with_mask)
    assert strangers(sampled, sent) > 0
    assert plaintext.found_in([sampled.everything]) == 0

"""Named regions, ``shm:///dev/shm/NAME``: made by a worker for some clients, with nothing but open and mmap.

One file: a page about the region, then for each seat a page of 64-bit words, two rings and two halves. Room for all of
it is taken when the file is made, so that a full /dev/shm is an error then and does not kill a process later.
docs/protocol.md has the layout.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tsqp.errors import AbsentPeerError, SetupError
from tsqp.transport.link import PAGE
from tsqp.transport.liveness import Identity, own_identity
from tsqp.transport.rings import RING_BYTES, Ring
from tsqp.transport.urls import Endpoint

SEATS = 4
_MAX_SEATS = 64
_MAGIC = int.from_bytes(b"tsqpring", "little")
_LAYOUT = 2
# Words of the first page. The generation is 0 once the worker has closed.
_MAGIC_WORD, _LAYOUT_WORD, _SEATS_WORD, _HALF_WORD = 0, 1, 2, 3
GENERATION, IDENTITY, BEAT = 4, 5, 16
# Words of a seat's page, beside the counters 0 and 8 of link.py. A client that wants the seat writes a ticket to CLAIM,
# the worker one of the tickets to GRANT; whose it is writes it to READY, and 0 to leave.
CLAIM, GRANT, READY, SEAT_IDENTITY, SEAT_BEAT = 16, 24, 32, 33, 40
_REQUEST_HEAD, _REQUEST_TAIL, _REPLY_HEAD, _REPLY_TAIL = 48, 56, 64, 72
_SEAT_WORDS = 80


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a region's parts are: seats, and bytes of each half."""

    seats: int
    half: int

    @property
    def data_at(self) -> int:
        """Where in a seat the halves begin."""
        return PAGE + 2 * RING_BYTES

    @property
    def seat_bytes(self) -> int:
        """Size of one seat."""
        return self.data_at + 2 * self.half

    @property
    def total(self) -> int:
        """Size of the file."""
        return PAGE + self.seats * self.seat_bytes

    def seat_at(self, seat: int) -> int:
        """Where a seat begins in the file."""
        return PAGE + seat * self.seat_bytes


def shape_for(max_message_bytes: int) -> Shape:
    """Return the shape of a region for messages of this size."""
    return Shape(SEATS, -(-max_message_bytes // PAGE) * PAGE)


class Seat:
    """One client's part of a region, as either side sees it.

    Args:
        memory: the seat.
    """

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        self.words = memory[:PAGE].cast("Q")

    def rings(self) -> tuple[Ring, Ring]:
        """Return the rings of requests and of replies."""
        requests, replies = (self.memory[at : at + RING_BYTES] for at in (PAGE, PAGE + RING_BYTES))
        return (
            Ring(self.words, requests, _REQUEST_HEAD, _REQUEST_TAIL),
            Ring(self.words, replies, _REPLY_HEAD, _REPLY_TAIL),
        )

    def give(self, ticket: int) -> None:
        """Give the seat to the client with a ticket, with all its own words 0."""
        for word in range(_SEAT_WORDS):
            if word not in (CLAIM, GRANT):
                self.words[word] = 0
        self.words[GRANT] = ticket

    def free(self) -> None:
        """Make the seat free. Its words stay as they are: whose it was may still be looking."""
        self.words[CLAIM] = 0
        self.words[GRANT] = 0


def write_identity(words: memoryview, at: int) -> None:
    """Write who this process is to three words."""
    own = own_identity()
    words[at], words[at + 1], words[at + 2] = own.pid, own.start, own.namespace


def read_identity(words: memoryview, at: int) -> Identity:
    """Read who the peer says it is."""
    return Identity(words[at], words[at + 1], words[at + 2])


class NamedRegion:
    """A region that this process made. Locked while it is open; its name is removed when it closes.

    Those that dead processes of this user's left there are removed first.

    Args:
        endpoint: its name.
        max_message_bytes: size of a half.

    Raises:
        SetupError: the name is taken, or /dev/shm is missing or too small.
    """

    def __init__(self, endpoint: Endpoint, max_message_bytes: int) -> None:
        self.path = Path(endpoint.path)
        self.shape = shape_for(max_message_bytes)
        _clear_stale(endpoint)
        for path, _ in left_regions(self.path.parent):
            path.unlink(missing_ok=True)
        _check_space(endpoint, self.shape)
        with _listening(endpoint):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor = os.open(self.path, flags, 0o600)
        try:
            with _listening(endpoint), contextlib.ExitStack() as undo:
                undo.callback(self.path.unlink)
                os.fchmod(self._descriptor, 0o600)
                with contextlib.suppress(OSError):  # where there are no locks, process ids tell
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.posix_fallocate(self._descriptor, 0, self.shape.total)
                self._memory = memoryview(mmap.mmap(self._descriptor, self.shape.total))
                undo.pop_all()
        except BaseException:
            os.close(self._descriptor)
            raise
        self.words = self._memory[:PAGE].cast("Q")
        starts = map(self.shape.seat_at, range(self.shape.seats))
        self.seats = tuple(Seat(self._memory[start : start + self.shape.seat_bytes]) for start in starts)
        write_identity(self.words, IDENTITY)
        self.words[_LAYOUT_WORD], self.words[_SEATS_WORD] = _LAYOUT, self.shape.seats
        self.words[_HALF_WORD] = self.shape.half
        self.words[GENERATION] = secrets.randbits(63) | 1
        self.words[_MAGIC_WORD] = _MAGIC

    def close(self) -> None:
        """Tell clients that this is the end, and remove the name. May be called twice."""
        if self._descriptor < 0:
            return
        self.words[GENERATION] = 0
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat(follow_symlinks=False).st_ino == os.fstat(self._descriptor).st_ino:
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = -1


class OpenedRegion:
    """A region of a worker's, as a client opens it: its first page, and seats one by one.

    Args:
        endpoint: its name.
        max_message_bytes: a region with larger halves is refused.

    Raises:
        AbsentPeerError: there is none, or its worker has ended or is still making it.
        SetupError: it is of another user or open to others, or it is none of this version.
    """

    def __init__(self, endpoint: Endpoint, max_message_bytes: int) -> None:
        self._descriptor = _opened(endpoint, f"cannot connect to {endpoint}")
        try:
            self.words = memoryview(mmap.mmap(self._descriptor, PAGE)).cast("Q")
            self.generation = self.words[GENERATION]
            self.shape = Shape(self.words[_SEATS_WORD], self.words[_HALF_WORD])
            self._check(endpoint, max_message_bytes)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _check(self, endpoint: Endpoint, max_message_bytes: int) -> None:
        known = self.words[_MAGIC_WORD] == _MAGIC and self.words[_LAYOUT_WORD] == _LAYOUT
        size = os.fstat(self._descriptor).st_size
        sound = 0 < self.shape.seats <= _MAX_SEATS and self.shape.half > 0 and self.shape.half % PAGE == 0
        if not known or not sound or size != self.shape.total:
            kind = SetupError if self.words[_MAGIC_WORD] else AbsentPeerError
            raise kind(
                f"cannot connect to {endpoint}: the file there is no region that this version knows. Is the worker "
                "still starting, or of another version?"
            )
        worker = read_identity(self.words, IDENTITY)
        if self.generation == 0 or (worker.is_visible and not worker.is_alive):
            raise AbsentPeerError(f"cannot connect to {endpoint}: the worker there has ended. Start it again.")
        largest = shape_for(max_message_bytes).half
        if self.shape.half > largest:
            raise SetupError(
                f"the worker at {endpoint} has a region for messages of {self.shape.half} bytes, this side allows "
                f"{largest}: give both sides the same TSQP_MAX_MESSAGE_BYTES."
            )

    def front(self, number: int) -> memoryview:
        """Map the words of one seat."""
        return memoryview(mmap.mmap(self._descriptor, PAGE, offset=self.shape.seat_at(number))).cast("Q")

    def seat(self, number: int) -> Seat:
        """Map one seat."""
        region = mmap.mmap(self._descriptor, self.shape.seat_bytes, offset=self.shape.seat_at(number))
        return Seat(memoryview(region))

    def close(self) -> None:
        """Close the file. What is mapped stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


@contextlib.contextmanager
def _listening(endpoint: Endpoint) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise _in_use(endpoint) from None
    except OSError as error:
        raise SetupError(f"cannot listen on {endpoint}: {error.strerror}.") from error


def _in_use(endpoint: Endpoint) -> SetupError:
    return SetupError(f"{endpoint} is already in use by another process. Stop it or listen elsewhere (--listen).")


def _opened(endpoint: Endpoint, failing: str) -> int:
    """Open a region's file; return its descriptor.

    Raises:
        AbsentPeerError: there is none, or an empty one, which a worker fills a moment later.
        SetupError: it is not a private file of this user's.
    """
    try:
        descriptor = os.open(endpoint.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise AbsentPeerError(
            f"{failing}: {error.strerror}. Is the worker running? Start one with 'tsqp worker --listen {endpoint}'."
        ) from error
    except OSError as error:
        reason = "a symbolic link is there" if error.errno == errno.ELOOP else error.strerror
        raise SetupError(f"{failing}: {reason}.") from error
    status = os.fstat(descriptor)
    mode, why = stat.S_IMODE(status.st_mode), ""
    # Gramine shows what it shares with its host as a device; a true device has no size.
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISCHR(status.st_mode)) or status.st_size < PAGE:
        why = "a file that is no region is there"
    elif status.st_uid != os.geteuid():
        why = f"the file there belongs to user {status.st_uid}, and this process runs as {os.geteuid()}"
    elif mode != 0o600:  # noqa: PLR2004  the mode it is made with
        why = f"the file there has mode {mode:04o}, expected 0600, for its owner alone"
    if why:
        os.close(descriptor)
        raise (SetupError if status.st_size else AbsentPeerError)(f"{failing}: {why}.")
    return descriptor


def _clear_stale(endpoint: Endpoint) -> None:
    """Remove a region whose worker is dead.

    Raises:
        SetupError: it lives, or the file is none of ours.
    """
    if not os.path.lexists(endpoint.path):
        return
    descriptor = _opened(endpoint, f"cannot listen on {endpoint}")
    try:
        words = memoryview(os.pread(descriptor, PAGE, 0).ljust(PAGE)).cast("Q")
        if words[_MAGIC_WORD] != _MAGIC:
            raise SetupError(f"cannot listen on {endpoint}: a file that is no region is there.")
        owner, closed = read_identity(words, IDENTITY), words[GENERATION] == 0
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(endpoint) from None
        except OSError:
            pass  # no locks here: the process id below decides
        if not closed and owner.is_visible and owner.is_alive:
            raise _in_use(endpoint)
        if Path(endpoint.path).stat(follow_symlinks=False).st_ino == os.fstat(descriptor).st_ino:
            Path(endpoint.path).unlink()
    except FileNotFoundError:
        return
    finally:
        os.close(descriptor)


def left_regions(directory: Path) -> Iterator[tuple[Path, int]]:
    """Yield regions of this user's that a dead process left, with the bytes that they take.

    Its death must be seen: its lock is free, and its process id is of this namespace and gone. A region that is yielded
    is locked meanwhile, so that no worker can take its name; the caller may remove it.
    """
    for path in sorted(directory.iterdir()) if os.access(directory, os.R_OK) else ():
        try:
            descriptor = _opened(Endpoint("shm", path=str(path)), "")
        except SetupError:  # it is none, or not this user's
            continue
        try:
            if _was_left(descriptor, path):
                yield path, os.fstat(descriptor).st_blocks * 512
        finally:
            os.close(descriptor)


def _was_left(descriptor: int, path: Path) -> bool:
    words = memoryview(os.pread(descriptor, PAGE, 0).ljust(PAGE)).cast("Q")
    if (words[_MAGIC_WORD], words[_LAYOUT_WORD]) != (_MAGIC, _LAYOUT):
        return False
    owner = read_identity(words, IDENTITY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = path.stat(follow_symlinks=False).st_ino == os.fstat(descriptor).st_ino
    except OSError:  # it is locked, cannot be, or has gone
        return False
    return same and owner.is_visible and not owner.is_alive


def _check_space(endpoint: Endpoint, shape: Shape) -> None:
    """Refuse a region that does not fit.

    Raises:
        SetupError: /dev/shm is missing, or has no room for it.
    """
    directory = Path(endpoint.path).parent
    if not directory.is_dir():
        raise SetupError(f"cannot listen on {endpoint}: there is no {directory} here. Mount a tmpfs there, or use tcp.")
    system = os.statvfs(directory)
    free = min(system.f_bavail * system.f_frsize, psutil.virtual_memory().available)
    if shape.total > free:
        raise SetupError(
            f"cannot listen on {endpoint}: a region for {shape.seats} clients and messages of {shape.half >> 10} KB "
            f"takes {-(-shape.total // 1000**2)} MB, {directory} has {free // 1000**2} MB free. Lower "
            f"TSQP_MAX_MESSAGE_BYTES on both sides, enlarge {directory} (docker run --shm-size), or use tcp."
        )

"""Rank 0's side: starts or meets the other ranks, has them load, and multiplies together with them."""

from __future__ import annotations

import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, distributed

from tsqp.errors import InternalError, RankLostError, SetupError, TsqpError
from tsqp.model.linears import is_out_of_memory
from tsqp.paths import private_socket_directory
from tsqp.worker.devices import device_failed
from tsqp.worker.ranks.life import Listening, end
from tsqp.worker.ranks.links import (
    BEATS,
    CLOSED,
    COMMANDS,
    Channel,
    Command,
    Connect,
    Failed,
    Load,
    Multiply,
    Reply,
    SendCodes,
    Stop,
)
from tsqp.worker.ranks.meeting import JOIN_S, bytes_of, meet_by_torchrun, meet_in
from tsqp.worker.ranks.placement import Placement

_STOP_TIMEOUT_S = 5.0
# The end of a connection is heard before the end of the process.
_DYING_S = 1.0
_LOOK_S = 0.25
_SIGNALS = {each.value: each.name for each in signal.Signals}
_ADVICE = "The worker cannot go on without it: start it again. What the rank said last stands above."


class Leader:
    """The other ranks, as rank 0 has them. Starts them if torchrun does not.

    Args:
        place: rank 0's.

    Raises:
        SetupError: no process can be started, or nobody meets.
    """

    def __init__(self, place: Placement) -> None:
        self.share = place.share
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._channels: dict[int, Channel] = {}
        self._listening: Listening | None = None
        self._ending = threading.Lock()
        self._lost: RankLostError | None = None
        self._serving = False
        self._stack = ExitStack()
        self._stack.callback(self._stop_children)
        try:
            directory = self._directory = self._stack.enter_context(private_socket_directory())
            if place.launched:
                self._meeting = meet_by_torchrun(one_machine=place.one_machine)
            else:
                self._meeting = meet_in(directory, self.share.ranks)
            self._welcoming = self._meeting.welcome(directory)
            self._stack.callback(self._welcoming.close)
            if not place.launched:
                for rank in range(1, self.share.ranks):
                    self._children[rank] = self._started(directory, rank)
        except BaseException:
            self._stack.close()
            raise

    def _started(self, directory: Path, rank: int) -> subprocess.Popen[bytes]:
        """Start a follower: a new interpreter in a session of its own, as ``launch.py`` starts workers."""
        words = [sys.executable, "-m", "tsqp.worker.ranks", str(directory), str(rank), str(self.share.ranks)]
        try:
            return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            raise SetupError(f"rank {rank} cannot be started here ({error.strerror}).") from error

    def load(self, order: Load) -> None:
        """Have all followers load their rows. They do so while the leader loads its own.

        Raises:
            SetupError: one does not come.
            RankLostError: one ended.
        """
        self._welcoming.take(self.share.ranks, JOIN_S, self._check_children)
        links = self._welcoming.found
        for rank in range(1, self.share.ranks):
            if (rank, COMMANDS) not in links or (rank, BEATS) not in links:
                raise SetupError(
                    f"rank {rank} of {self.share.ranks} did not come within {JOIN_S:.0f} s: start all ranks, with the "
                    "same command."
                )
            self._channels[rank] = Channel(links[rank, COMMANDS])
        self._listening = Listening({rank: links[rank, BEATS] for rank in self._channels}, self._on_lost)
        self._command(order)

    def join(self, device: torch.device) -> None:
        """Wait until all ranks have loaded, and connect them. From then on a rank that is lost ends this process.

        Args:
            device: this rank's.

        Raises:
            TsqpError: a rank's own, if it cannot load.
            RankLostError: one ended.
        """
        failure = self._replies()
        if failure:
            raise failure
        self._command(Connect())
        self._serving = True
        self.check()
        self._carry(lambda: self._meeting.connect(self.share, device))

    def check(self) -> None:
        """Look whether a rank was lost while all load.

        Raises:
            RankLostError: one was.
        """
        if self._lost:
            raise self._lost

    def multiply(self, group: str, x_MK: Tensor, out_MN: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        """Multiply rows by all ranks' rows of a group.

        Args:
            group: its name.
            x_MK: on the device, contiguous.
            out_MN: where the columns go; rows perhaps of wider ones.
            own: multiplies by this rank's rows.

        Returns:
            ``out_MN``.

        Raises:
            TsqpError: a rank's own, such as that its device has no memory. All ranks can go on.
        """
        count, columns = out_MN.shape
        if not count:
            return out_MN
        self._command(Multiply(group, count))
        self._carry(lambda: distributed.broadcast(bytes_of(x_MK), src=0))
        own_failure: Exception | None = None
        try:
            rows = self.share.of(columns)
            out_MN[:, rows.start : rows.stop].copy_(own(x_MK))
        except Exception as error:  # noqa: BLE001  the others' results are on their way
            own_failure = error
            if x_MK.is_cuda and not isinstance(error, TsqpError) and not is_out_of_memory(error):
                self._end(device_failed(x_MK.device, error))
        failure = self._replies(lambda rank: self._columns(rank, out_MN)) or own_failure
        if failure:
            raise failure
        return out_MN

    def _columns(self, rank: int, out_MN: Tensor) -> None:
        rows = self.share.of(out_MN.shape[1], rank)
        part_MN = torch.empty(len(out_MN), len(rows), dtype=out_MN.dtype, device=out_MN.device)
        self._receive(part_MN, rank)
        out_MN[:, rows.start : rows.stop].copy_(part_MN)

    def _receive(self, part: Tensor, rank: int) -> None:
        self._carry(lambda: distributed.recv(bytes_of(part), src=rank))

    def codes(self, group: str, wanted: range, total: int, out_RK: Tensor, own: Callable[[range], Tensor]) -> Tensor:
        """Collect rows of a group's codes from the ranks that hold them.

        Args:
            group: its name.
            wanted: which rows, of ``total``.
            total: how many the group has.
            out_RK: int8 on the device, contiguous, where they go.
            own: gives this rank's, counted among its own.
        """
        for rank in range(self.share.ranks):
            held = self.share.of(total, rank)
            rows = range(max(held.start, wanted.start), min(held.stop, wanted.stop))
            if not rows:
                continue
            part_RK = out_RK[rows.start - wanted.start : rows.stop - wanted.start]
            if rank == 0:
                part_RK.copy_(own(rows))
            else:
                self._command(SendCodes(group, rows.start - held.start, len(rows)), rank)
                self._reply(rank)
                self._receive(part_RK, rank)
        return out_RK

    def _command(self, command: Command, only: int | None = None) -> None:
        for rank, channel in self._channels.items():
            if only in (None, rank):
                try:
                    channel.send(command)
                except OSError:
                    self._gone(rank, CLOSED)

    def _replies(self, then: Callable[[int], None] = lambda _rank: None) -> TsqpError | None:
        """Hear all followers, do what comes ``then`` for those that did what they were told; return a failure."""
        failure: TsqpError | None = None
        for rank in self._channels:
            reply = self._reply(rank)
            if isinstance(reply, Failed):
                failure = failure or reply.error(rank)
            else:
                then(rank)
        return failure

    def _reply(self, rank: int) -> Reply:
        channel = self._channels[rank]
        waiting = select.poll()
        waiting.register(channel, select.POLLIN)
        while not waiting.poll(_LOOK_S * 1000):
            self.check()
        try:
            return channel.reply()
        except EOFError:
            self._gone(rank, CLOSED)

    def _carry(self, work: Callable[[], object]) -> None:
        """Do what the process group does. Where it fails, a rank is lost, and who listens knows which."""
        try:
            work()
        except RuntimeError as error:
            time.sleep(2 * _DYING_S)
            words = str(error).partition("\n")[0]
            self._end(RankLostError(f"the link between ranks failed ({words}). {_ADVICE}"))

    def _check_children(self) -> None:
        for rank, child in self._children.items():
            if child.poll() is not None:
                self._gone(rank, CLOSED)

    def _gone(self, rank: int, how: str) -> NoReturn:
        self._on_lost(rank, how)
        raise self._lost or InternalError(f"rank {rank} was lost and nobody said so.")

    def _on_lost(self, rank: int, how: str) -> None:
        """Note the loss of a rank, which any thread may find; end this process if it is past loading."""
        child = self._children.get(rank)
        if child and how == CLOSED:
            with suppress(subprocess.TimeoutExpired):
                code = child.wait(_DYING_S)
                how = (
                    f"it was killed by {_SIGNALS.get(-code, -code)}" if code < 0 else f"it ended with exit code {code}"
                )
        error = RankLostError(f"rank {rank} of {self.share.ranks} is lost: {how}. {_ADVICE}")
        self._lost = self._lost or error
        if self._serving:
            self._end(error)

    def _end(self, error: TsqpError) -> NoReturn:
        self._ending.acquire()  # for good: only the first speaks
        self._kill_children()
        shutil.rmtree(self._directory, ignore_errors=True)
        end(error)

    def _kill_children(self) -> None:
        for child in self._children.values():
            child.kill()  # also where it is stopped

    def close(self) -> None:
        """End all ranks: by a word once they serve, else as if this process had ended. May be called twice."""
        if self._listening:
            self._listening.over()
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for channel in self._channels.values() if self._serving else ():
            with suppress(OSError):
                channel.send(Stop())
        for channel in self._channels.values():
            if self._serving:
                channel.await_end(max(0.0, deadline - time.monotonic()))
            channel.close()
        self._channels.clear()
        if self._listening:
            self._listening.close()
            self._listening = None
        if distributed.is_initialized():
            distributed.destroy_process_group()
        self._stack.close()

    def _stop_children(self) -> None:
        self._kill_children()
        for child in self._children.values():
            child.wait()

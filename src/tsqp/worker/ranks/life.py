"""Who is still there: followers beat, the leader listens, and each side ends when the other is gone.

Threads do this, so that a process that waits in the middle of a product finds out too.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

from tsqp.errors import RankLostError, TsqpError
from tsqp.worker.ranks.links import BEAT_S, CLOSED, SILENT_BEATS

_BEAT = b"."
_GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL | getattr(select, "POLLRDHUP", 0)


def end(error: TsqpError) -> NoReturn:
    """Say why, and end this process at once: its main thread may wait for a rank that never answers.

    Clients find their link closed, and not an answer that blames their request.
    """
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"error: {error}\n".encode())
    os._exit(error.exit_code)


class Listening:
    """The leader's thread that hears followers' beats.

    Args:
        followers: their sockets by rank.
        on_lost: called with a rank and what is known of its end, once.
    """

    def __init__(self, followers: Mapping[int, socket.socket], on_lost: Callable[[int, str], None]) -> None:
        self._followers = dict(followers)
        self._on_lost = on_lost
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="ranks", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        """Count silent beats instead of time: where this process was stopped itself, nobody else has been silent."""
        silent = dict.fromkeys(self._followers, 0)
        while not self._over.is_set():
            heard = self._heard()
            if self._over.is_set():
                return
            for rank in silent:
                silent[rank] = 0 if rank in heard else silent[rank] + 1
                if silent[rank] >= SILENT_BEATS:
                    self._on_lost(rank, f"it said nothing for {SILENT_BEATS * BEAT_S:.0f} s")
                    return
                if heard.get(rank) is False:
                    self._on_lost(rank, CLOSED)
                    return

    def _heard(self) -> dict[int, bool]:
        """Listen for the time of a beat; return who was heard, and whether it is still there."""
        poll = select.poll()
        ranks = {connection.fileno(): rank for rank, connection in self._followers.items()}
        for number in ranks:
            poll.register(number, select.POLLIN)
        heard: dict[int, bool] = {}
        left, deadline = BEAT_S, time.monotonic() + BEAT_S
        while left > 0 and not self._over.is_set():
            for number, _ in poll.poll(left * 1000):
                try:
                    there = bool(self._followers[ranks[number]].recv(64))
                except OSError:
                    there = False
                heard[ranks[number]] = there
                if not there:
                    return heard
            left = deadline - time.monotonic()
        return heard

    def over(self) -> None:
        """Take note that the followers may end."""
        self._over.set()

    def close(self) -> None:
        """Close the sockets, at which followers that are still there end."""
        self._over.set()
        self._thread.join()
        for connection in self._followers.values():
            connection.close()


class Beating:
    """The follower's thread that beats, and ends this process when the leader is gone.

    Args:
        leader: the socket to beat on.
        rank: which this is.
    """

    def __init__(self, leader: socket.socket, rank: int) -> None:
        self._leader = leader
        self._rank = rank
        self._leaving = False
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def leaving(self) -> None:
        """Take note that this process ends anyhow."""
        self._leaving = True

    def _beat(self) -> None:
        poll = select.poll()
        poll.register(self._leader, _GONE)
        try:
            while not poll.poll(BEAT_S * 1000):
                self._leader.sendall(_BEAT)
        except OSError:
            pass
        if not self._leaving:
            end(RankLostError(f"rank {self._rank}: rank 0 is gone, so this one ends."))

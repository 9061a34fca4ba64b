"""``python -m tsqp.worker.ranks DIRECTORY RANK RANKS``: a follower that the leader started itself, on its machine."""

from __future__ import annotations

import sys
from pathlib import Path

from tsqp.errors import TsqpError
from tsqp.model.share import Share
from tsqp.threads import share_cores


def main(directory: str, rank: str, ranks: str) -> None:
    """Follow the leader whose private directory this is."""
    share_cores()
    from tsqp.worker.ranks.follower import follow  # noqa: PLC0415  torch must load after share_cores()
    from tsqp.worker.ranks.meeting import meet_in  # noqa: PLC0415

    share = Share(int(rank), int(ranks))
    try:
        follow(meet_in(Path(directory), share.ranks), share, share)
    except TsqpError as error:
        sys.exit(f"error: rank {rank}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])

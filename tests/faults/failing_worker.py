"""``tsqp worker`` on a device that may be told to have no memory left: at each SIGUSR1 the next product fails.

It takes no GPU: what torch raises there is raised in the middle of a product here. All that follows is the worker's.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

from tsqp.threads import share_cores

share_cores()

import torch  # noqa: E402

from tsqp.cli import main  # noqa: E402
from tsqp.worker.services import ExactService, OpenService  # noqa: E402

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."
_full = threading.Event()


def _may_fail(multiply: Callable[..., Any]) -> Callable[..., Any]:
    def failing(*arguments: Any) -> Any:
        if _full.is_set():
            _full.clear()
            raise torch.OutOfMemoryError(FULL)
        return multiply(*arguments)

    return failing


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, lambda *_: _full.set())
    for service in (OpenService, ExactService):
        service.multiply = _may_fail(service.multiply)  # type: ignore[method-assign]
    main()

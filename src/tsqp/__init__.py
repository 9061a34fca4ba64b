"""TSQP: confidential inference for LLaMA-family models across a trust boundary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tsqp.decoder.api import attach as attach
    from tsqp.decoder.api import detach as detach
    from tsqp.decoder.api import export as export

__version__ = "3.0.0a1"


def __getattr__(name: str) -> Any:  # noqa: ANN401  any of them
    """Load what needs torch when it is first asked for: importing ``tsqp`` alone must stay light."""
    if name in ("attach", "detach", "export"):
        from tsqp.decoder import api  # noqa: PLC0415

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

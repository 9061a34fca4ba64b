"""What links in memory have in common: no shared memory."""

from __future__ import annotations


class PlainLink:
    """Base of ``ClientTransport`` doubles: no slots to hand out."""

    def allocate(self, size: int, *, kept: bool = False) -> memoryview | None:
        assert size >= 0 or kept
        return None

    def discard(self, slot: memoryview) -> None:
        """What is no slot is let be."""

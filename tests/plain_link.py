"""What links in memory have in common: no shared memory."""

from __future__ import annotations


class PlainLink:
    """Base of ``ClientTransport`` doubles: no slots to hand out."""

    def allocate(self, size: int) -> memoryview | None:
        assert size >= 0
        return None

    def discard(self, slot: memoryview) -> None:
        """What is no slot is let be."""

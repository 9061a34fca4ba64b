"""What the steps of an engine have computed, and how long each part of them took."""

from __future__ import annotations

from tsqp.meter import Meter

_PARTS = ("quantise", "mask", "check", "ahead", "mask_wait")


class Costs:
    """Of all steps since the start. The engine's lock guards it.

    Args:
        meter: what has been metered before the first step.

    Attributes:
        steps: how many.
        prompt, completion, reused: tokens that were computed, generated, and found in the prefix cache.
        rows: of the last step.
    """

    def __init__(self, meter: Meter) -> None:
        self.steps = self.prompt = self.completion = self.reused = self.rows = 0
        self._step_s = self._sampling_s = 0.0
        # As of the last step's end: in the middle of one, its waiting is metered and its time is not.
        self._before, self._settled = meter, Meter()

    def add(self, rows: int, step_s: float, sampling_s: float, meter: Meter) -> None:
        """Take note of a step that has ended, and of all that has been metered by then."""
        self.steps += 1
        self.rows = rows
        self._step_s += step_s
        self._sampling_s += sampling_s
        self._settled = meter.since(self._before)

    def leave_out(self, meter: Meter) -> None:
        """Take note that what was metered since the last step is no step's."""
        self._before = meter.since(self._settled)

    def seconds(self, attention_s: float, filling_s: float) -> dict[str, float]:
        """Return ``EngineStats.seconds``; what attention and filling the mask pool took is counted elsewhere."""
        waited, worker = self._settled.waited_ns / 1e9, self._settled.compute_ns / 1e9
        return {
            "worker": min(worker, waited),
            "wire": max(0.0, waited - worker),
            "enclave": max(0.0, self._step_s - waited),
            "attention": attention_s,
            "sampling": self._sampling_s,
            **{name: getattr(self._settled, f"{name}_ns") / 1e9 for name in _PARTS},
            "mask_fill": filling_s,
        }

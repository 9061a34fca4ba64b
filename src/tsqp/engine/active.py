"""A request from ``submit`` to its last event."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from tsqp.engine.api import Event, Generation, OnEvent, TokenLogprobs
from tsqp.engine.sampling import Sampler
from tsqp.engine.text import TextStream
from tsqp.errors import TransportError, TsqpError, bare

_log = logging.getLogger(__name__)

# How often in a row a request's step is computed again.
MOST_REPEATS = 3


@dataclass(slots=True, repr=False)
class Active:
    """What an engine knows of a request besides its place in the schedule.

    Attributes:
        number, generation, on_event: as they were submitted.
        text, sampler: make its text, choose its tokens.
        generated: how many tokens it has had.
        prompt_logprobs: of the part of its prompt that has been read, if they were asked for.
        losses: how often in a row the link to a worker failed in its step.
        lost: the error of the last time.
    """

    number: int
    generation: Generation
    on_event: OnEvent
    text: TextStream
    sampler: Sampler
    generated: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=lambda: [TokenLogprobs(None)])
    losses: int = 0
    lost: TsqpError | None = None

    def may_repeat(self, error: TransportError) -> bool:
        """Take note that its step was lost with a link, and tell whether it may be computed again.

        Nothing of the step was used: no token chosen, no random number drawn. Keys and values of the tokens before it
        are in the enclave, checked where the level checks; those of the step itself are written again.
        """
        self.losses += 1
        self.lost = bare(error)
        return self.losses <= MOST_REPEATS

    def tell(self, event: Event) -> None:
        """Give whoever asked an event."""
        try:
            self.on_event(event)
        except Exception as error:  # noqa: BLE001  of a caller that has gone; others must not suffer
            _log.warning("a listener failed (%s)", type(error).__name__)

"""What came of a soak, and what a server must not hold any more when nothing runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec import Struct
from soak.holdings import Holdings

# By how much a worker's memory may have grown at `open`. oneDNN, which computes the head there, keeps code for each
# number of rows that it has seen, up to 1024, and logits of a scored prompt, 30 MB with the bundled model, leave
# holes in the heap. Both level off; at packed levels, whose workers do all the rest too, nothing is allowed for.
OPEN_WORKER_BYTES = 128 << 20


class Diverged(Struct, frozen=True):
    """An answer at `open` that is another than the request's alone, from some token on.

    Attributes:
        position: of the first other token.
        gap: by how much the lone run's likeliest token there was likelier than the second, as logarithms.
        drawn: whether tokens were drawn, so that no gap tells how sure one was.
    """

    position: int
    gap: float
    drawn: bool


class Report(Struct, frozen=True, kw_only=True):
    """What came of a soak.

    Attributes:
        requests, clients: how many.
        completed, streamed, left, refused: what became of them.
        kinds_refused: how many kinds of invalid requests were among them.
        alone: how many answers were computed alone before, to compare with.
        alone_s, together_s: how long those and the others took.
        completion_tokens: of requests that completed.
        tokens_per_s: the same by time.
        choices: that were compared; all but those that ``diverged``, or that ``problems`` name, are as alone.
        diverged: where that is allowed.
        gap_allowed: where the two largest logits are further apart, the same token must come; 0: everywhere.
        logprob_off: the largest difference of two log-probabilities; at packed levels none is allowed.
        most_sequences, rows_per_step: the most in one step of the engine; the mean.
        before, halfway, after: what the server held.
        statuses: how many of its answers had which.
        problems: what must not be.
    """

    requests: int
    clients: int
    completed: int
    streamed: int
    left: int
    refused: int
    kinds_refused: int
    alone: int
    alone_s: float
    together_s: float
    completion_tokens: int
    tokens_per_s: float
    choices: int
    diverged: list[Diverged]
    gap_allowed: float
    logprob_off: float
    most_sequences: int
    rows_per_step: float
    before: Holdings
    halfway: Holdings
    after: Holdings
    statuses: dict[str, int]
    problems: list[str]


def leaks(halfway: Holdings, after: Holdings, slack: Mapping[str, int]) -> list[str]:
    """Say what a server in which nothing runs still holds, or holds more of than before.

    Args:
        halfway: the first look at it.
        after: the last one.
        slack: by how many bytes memory may have grown, by its name.
    """
    found = []
    for when, held in (("halfway", halfway), ("at the end", after)):
        stats = held.stats
        if stats["running"] or stats["queued"] or held.objects:
            found.append(f"{when} {stats['running']} run, {stats['queued']} wait; objects of requests: {held.objects}")
        if stats["blocks_free"] + held.cached_blocks != stats["blocks_total"]:
            blocks = f"{stats['blocks_free']} blocks are free and {held.cached_blocks} cached"
            found.append(f"{when} {blocks}, of {stats['blocks_total']}")
        if held.masks is not None:
            found += [f"{when} {each}" for each in _mask_leaks(held)]
    for name in ("threads", "files"):
        if getattr(after, name) > getattr(halfway, name):
            found.append(f"{name} grew from {getattr(halfway, name)} to {getattr(after, name)}")
    for name, most in slack.items():
        grown = getattr(after, name) - getattr(halfway, name)
        if grown > most:
            found.append(f"{name} grew by {grown / 1e6:.1f} MB")
    return found


def _mask_leaks(held: Holdings) -> Iterator[str]:
    masks = held.masks
    assert masks is not None
    if masks.again:
        yield f"{masks.again} mask rows were handed out a second time"
    if masks.taken != masks.used:
        yield f"{masks.taken} mask rows were handed out and {masks.used} used"
    if masks.drawn != masks.taken + masks.held:
        yield f"{masks.drawn} mask rows were drawn, {masks.taken} handed out, {masks.held} are held"
    if masks.of_layers != held.rows:
        yield f"{held.rows} rows were computed with {masks.of_layers} mask rows of the first product"

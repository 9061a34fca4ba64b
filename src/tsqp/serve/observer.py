"""Keeps what a worker is sent, and tries to read it: what a curious worker would do, and nothing it could not.

The worker's loop only notes; histograms and guesses are made on the thread that publishes. Shapes: M rows, K inputs.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tsqp.audit.attacks.nearest import nearest_tokens
from tsqp.audit.public import FIRST_GROUP, TokenTable
from tsqp.model.architecture import chain_name
from tsqp.model.tokenizer import Tokenizer
from tsqp.serve.view import BINS, MAX_REQUESTS_SHOWN, MAX_TEXT, MAX_WORDS, Histogram, Reading, SeenRequest, Snapshot
from tsqp.transport.base import Incoming
from tsqp.wire import messages
from tsqp.wire.messages import AnyRequest, Service
from tsqp.worker.batching import Waiting
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.services import WorkerService

_SAMPLED_VALUES = 4096
_SAMPLED_WORDS = 6
_WAITING = 4096
_MAX_TOKENS = 4096
# A prompt that comes after so long is another one, even if nothing was generated from the last.
_PAUSE_S = 2.0
# A true row, rounded to integers, has a cosine of 0.99 with its token's; uniform words, over 50 000 tokens and 576
# inputs, about sqrt(2 ln 50000 / 576) = 0.19 with the luckiest.
_SURE_COSINE = 0.6
# Larger integers are words of the ring, better read as hexadecimal.
_LARGEST_DECIMAL = 1 << 24
_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Noted:
    """What is kept of one request until the next snapshot: no more than the loop has time for.

    Attributes:
        rows_MK: the whole tensor, for the first linear layer only.
        ids: of an embedding request.
        sample: some values of others; None where enough were kept already.
    """

    operation: str
    group: str
    rows: int
    dtype: str
    size_bytes: int
    at_s: float
    sample: Tensor | None = None
    rows_MK: Tensor | None = None
    ids: tuple[int, ...] = ()


@dataclass(slots=True)
class Transcript:
    """Token ids put in order: several rows at once are a prompt or a part of one, single rows its answer.

    It takes one conversation at a time apart; rows of several that are generated together count as one prompt.
    """

    run: int = 0
    prompt: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    sure: int = 0
    _last_s: float = 0.0

    def begins(self, count: int, at_s: float) -> bool:
        """Tell whether so many rows are the beginning of another prompt."""
        paused = at_s - self._last_s > _PAUSE_S
        return not self.prompt or (count > 1 and (bool(self.answer) or paused))

    def add(self, ids: Sequence[int], sure: int, at_s: float) -> None:
        """Take in one step's ids, of which so many are sure."""
        if self.begins(len(ids), at_s):
            self.run += 1
            self.prompt, self.answer, self.sure = [], [], 0
        if len(ids) > 1 or not self.prompt:
            self.prompt = (self.prompt + list(ids))[-_MAX_TOKENS:]
        else:
            self.answer = (self.answer + list(ids))[-_MAX_TOKENS:]
        self.sure += sure
        self._last_s = at_s


class Observer:
    """What the demonstration worker remembers.

    Args:
        serves: what the worker computes.
        tokenizer: turns ids into text; without one there is no reading.
        table: the public embedding table behind layer 0's norm, to guess tokens from rows; None where ids are sent.
        clock: tells the time, in seconds.
    """

    def __init__(
        self,
        serves: Service,
        tokenizer: Tokenizer | None,
        table: TokenTable | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._serves: Service = serves
        self._tokenizer, self._table, self._clock = tokenizer, table, clock
        self._noted: deque[Noted] = deque(maxlen=_WAITING)
        self._sampled = 0
        self._transcript = Transcript()
        self._requests = self._size_bytes = 0
        self._histogram: Histogram | None = None
        self._words: tuple[str, ...] = ()
        self._last: deque[SeenRequest] = deque(maxlen=MAX_REQUESTS_SHOWN)

    def note(self, header: AnyRequest, tensors: Sequence[Tensor]) -> None:
        """Keep what is needed of a request; its tensors may change once it is answered. On the worker's thread."""
        if not tensors:
            return
        x = tensors[0]
        group = getattr(header, "group", "")
        if isinstance(header, messages.LinearChain):
            group = chain_name(header.groups)
        ids = tuple(x.tolist()) if isinstance(header, messages.Embedding) else ()
        sample = None
        if group != FIRST_GROUP and not ids and self._sampled < MAX_REQUESTS_SHOWN:
            self._sampled += 1
            sample = spread(x).clone()
        self._noted.append(
            Noted(
                operation=type(header).__name__,
                group=group,
                rows=len(x) if x.ndim else 1,
                dtype=str(x.dtype).removeprefix("torch."),
                size_bytes=sum(each.numel() * each.itemsize for each in tensors),
                at_s=self._clock(),
                sample=sample,
                rows_MK=x.clone() if group == FIRST_GROUP else None,
                ids=ids,
            )
        )

    def snapshot(self) -> Snapshot:
        """Work off what was noted and return all there is to show. On the publishing thread."""
        noted = [self._noted.popleft() for _ in range(len(self._noted))]
        self._sampled = 0
        guesses = self._guesses(noted)
        for each in noted:
            self._take(each, guesses)
        for each in [one for one in noted if one.sample is not None or one.ids or one.rows_MK is not None][
            -MAX_REQUESTS_SHOWN:
        ]:
            self._last.appendleft(_shown(each))
        return Snapshot(
            run=self._transcript.run,
            serves=self._serves,
            requests=self._requests,
            size_bytes=self._size_bytes,
            words=self._words,
            reading=self._reading(),
            histogram=self._histogram,
            last=tuple(self._last),
        )

    def _guesses(self, noted: Sequence[Noted]) -> deque[tuple[int, bool]]:
        """Guess the tokens of all new rows together: the table is read once for all of them."""
        rows = [each.rows_MK for each in noted if each.rows_MK is not None]
        if self._table is None or not rows:
            return deque()
        x_MK = torch.cat(rows)
        ids_M = nearest_tokens(x_MK, self._table).ids_T
        cosine_M = torch.cosine_similarity(x_MK.double(), self._table.directions_VD[ids_M].double(), dim=1)
        return deque(zip(ids_M.tolist(), (cosine_M > _SURE_COSINE).tolist(), strict=True))

    def _take(self, noted: Noted, guesses: deque[tuple[int, bool]]) -> None:
        """Count one request; rows for the first layer, or ids, also continue the transcript or begin another."""
        reads_ids = self._serves == "open"
        counts = bool(noted.ids) if reads_ids else noted.rows_MK is not None
        if counts:
            found = [guesses.popleft() for _ in range(noted.rows)] if guesses else [(-1, False)] * noted.rows
            ids = noted.ids or tuple(token for token, _ in found)
            if self._transcript.begins(noted.rows, noted.at_s):
                self._requests = self._size_bytes = 0
                self._histogram = None
            sure = noted.rows if noted.ids else sum(certain for _, certain in found)
            self._transcript.add(ids, sure, noted.at_s)
        if noted.rows_MK is not None:
            self._histogram = merged(self._histogram, noted.rows_MK)
            limit = self._histogram.limit if self._histogram else 1.0
            self._words = words_of(noted.rows_MK.reshape(-1)[-noted.rows_MK.shape[-1] :][:MAX_WORDS], limit)
        self._requests += 1
        self._size_bytes += noted.size_bytes

    def _reading(self) -> Reading | None:
        seen, by_ids = self._transcript, self._serves == "open"
        if self._tokenizer is None or not seen.prompt or not (by_ids or self._table):
            return None
        return Reading(
            by="ids" if by_ids else "nearest",
            prompt=self._tokenizer.decode(seen.prompt)[-MAX_TEXT:],
            answer=self._tokenizer.decode(seen.answer)[-MAX_TEXT:] if seen.answer else "",
            sure=min(1.0, seen.sure / max(1, len(seen.prompt) + len(seen.answer))),
        )


class ObservedDispatcher(Dispatcher):
    """An ordinary dispatcher that shows each request for a product to an observer before it is computed.

    Args:
        service, model, digest: as ``Dispatcher`` takes them.
        observer: is shown requests.
    """

    def __init__(self, service: WorkerService, model: str, digest: str, observer: Observer) -> None:
        super().__init__(service, model, digest)
        self._observer = observer

    def admit(self, incoming: Incoming) -> Waiting | None:
        """See ``Dispatcher.admit``."""
        waiting = super().admit(incoming)
        if waiting is not None:
            self._observer.note(waiting.header, waiting.tensors)
        return waiting


def spread(x: Tensor) -> Tensor:
    """Return at most some thousand values, from all over a tensor."""
    values = x.reshape(-1)
    return values[:: math.ceil(values.numel() / _SAMPLED_VALUES) or 1]


def limit_of(values: Tensor) -> float:
    """Return the power of two within which values lie; of floats, all but the outermost hundredth."""
    magnitudes = values.double().abs()
    whole = not values.is_floating_point()
    largest = float(magnitudes.max() if whole else magnitudes.quantile(0.99)) if len(values) else 0.0
    if not math.isfinite(largest) or largest <= 0:
        return 1.0
    return min(2.0 ** math.ceil(math.log2(largest)), 2.0**62)


def counted(values: Tensor, limit: float) -> tuple[int, ...]:
    """Count values in equal bins over [-limit, limit]; those outside are left out."""
    counts = torch.histc(values.double(), BINS, -limit, limit)
    return tuple(int(count) for count in counts.tolist())


def merged(histogram: Histogram | None, rows_MK: Tensor) -> Histogram | None:
    """Add rows to a histogram; where they reach further, its bins are joined in pairs, which loses nothing."""
    values = spread(rows_MK)
    values = values[torch.isfinite(values)] if values.is_floating_point() else values
    if not len(values):
        return histogram
    limit = limit_of(values)
    if histogram is None:
        return Histogram(counts=counted(values, limit), limit=limit)
    old, reach = histogram.counts, histogram.limit
    while reach < limit:
        quarter = (0,) * (BINS // 4)
        old = (*quarter, *(old[index] + old[index + 1] for index in range(0, BINS, 2)), *quarter)
        reach *= 2
    new = counted(values, reach)
    return Histogram(counts=tuple(a + b for a, b in zip(old, new, strict=True)), limit=reach)


def words_of(values: Tensor, limit: float) -> tuple[str, ...]:
    """Write values as a person would want to see them: floats, small integers, or words in hexadecimal."""
    if values.is_floating_point():
        return tuple(f"{value:+.3f}" for value in values.float().tolist())
    if limit > _LARGEST_DECIMAL:
        return tuple(f"{value % (1 << _WORD_BITS):08x}" for value in values.tolist())
    return tuple(str(value) for value in values.tolist())


def _shown(noted: Noted) -> SeenRequest:
    values = noted.sample if noted.sample is not None else noted.rows_MK
    histogram = merged(None, values) if values is not None else None
    words: tuple[str, ...] = tuple(str(token) for token in noted.ids[:_SAMPLED_WORDS])
    if values is not None and histogram is not None:
        words = words_of(values.reshape(-1)[:_SAMPLED_WORDS], histogram.limit)
    return SeenRequest(
        operation=noted.operation,
        group=noted.group[:256],
        rows=noted.rows,
        dtype=noted.dtype,
        size_bytes=noted.size_bytes,
        words=words,
        histogram=histogram,
    )

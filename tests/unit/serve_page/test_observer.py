"""The demonstration worker's memory: what it keeps, how it orders tokens, and what it can and cannot read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as PlainTokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from tsqp.audit.public import FIRST_GROUP, TokenTable
from tsqp.model.tokenizer import Tokenizer
from tsqp.serve.observer import Observer, Transcript, counted, limit_of, merged, words_of
from tsqp.serve.view import BINS, Histogram
from tsqp.wire import codec, messages

WORDS, INPUTS = 1000, 576
IDS = [17, 3, 999, 3]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    vocabulary = {f"w{index}": index for index in range(WORDS)}
    plain = PlainTokenizer(WordLevel(vocabulary, unk_token="w0"))  # noqa: S106  not a password
    return Tokenizer(plain.to_str().encode())


@pytest.fixture(scope="module")
def table() -> TokenTable:
    return TokenTable(torch.randn(WORDS, INPUTS, generator=torch.Generator().manual_seed(1)))


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


numbers: Iterator[int] = count(1)


def embedding(observer: Observer, ids: list[int]) -> None:
    x = torch.tensor(ids)
    observer.note(messages.Embedding(id=next(numbers), ids=codec.spec_of(x), dtype="float32"), (x,))


def linear(observer: Observer, x_MK: Tensor, group: str = FIRST_GROUP) -> None:
    kind = messages.Linear if x_MK.is_floating_point() else messages.LinearExact
    observer.note(kind(id=next(numbers), group=group, x=codec.spec_of(x_MK)), (x_MK,))


def in_clear(table: TokenTable, ids: list[int]) -> Tensor:
    """Return the rows that `verified` sends for tokens: rounded to integers, one scale per row."""
    x_MK = table.vectors_VD[ids]
    return (x_MK / x_MK.abs().amax(dim=1, keepdim=True) * 127).round().to(torch.int32)


def test_ids_that_are_sent_are_read(tokenizer: Tokenizer) -> None:
    observer = Observer("open", tokenizer, None)
    embedding(observer, IDS)
    linear(observer, torch.randn(4, INPUTS))
    embedding(observer, [5])
    embedding(observer, [6])
    reading = observer.snapshot().reading
    assert reading is not None
    assert (reading.by, reading.prompt, reading.answer, reading.sure) == ("ids", "w17 w3 w999 w3", "w5 w6", 1.0)


def test_a_chain_is_named(tokenizer: Tokenizer) -> None:
    observer, x_MC = Observer("open", tokenizer, None), torch.randn(2, 2 * INPUTS)
    groups = ("layers.0.o", "layers.0.gate_up", "layers.0.down", "layers.1.qkv")
    header = messages.LinearChain(id=1, groups=groups, x=codec.spec_of(x_MC))
    observer.note(header, (x_MC,))
    (shown,) = observer.snapshot().last
    assert (shown.group, shown.rows) == ("layers.0.o to layers.1.qkv", 2)


def test_integers_in_clear_are_read(tokenizer: Tokenizer, table: TokenTable) -> None:
    observer = Observer("exact", tokenizer, table)
    linear(observer, in_clear(table, IDS))
    linear(observer, in_clear(table, [5]))
    snapshot = observer.snapshot()
    reading = snapshot.reading
    assert reading is not None
    assert (reading.by, reading.prompt, reading.answer, reading.sure) == ("nearest", "w17 w3 w999 w3", "w5", 1.0)
    assert snapshot.histogram is not None
    assert snapshot.histogram.limit == 128.0
    assert all(-127 <= int(word) <= 127 for word in snapshot.words)


def test_uniform_words_are_not_read(tokenizer: Tokenizer, table: TokenTable) -> None:
    observer = Observer("exact", tokenizer, table)
    words = torch.randint(-(2**31), 2**31, (40, INPUTS), generator=torch.Generator().manual_seed(2)).to(torch.int32)
    linear(observer, words)
    snapshot = observer.snapshot()
    assert snapshot.reading is not None
    assert snapshot.reading.sure == 0.0
    assert snapshot.histogram is not None
    assert snapshot.histogram.limit == 2.0**31
    assert min(snapshot.histogram.counts) > 0
    assert all(len(word) == 8 and int(word, 16) < 2**32 for word in snapshot.words)


def test_what_was_noted_does_not_change_with_the_clients_memory(tokenizer: Tokenizer, table: TokenTable) -> None:
    observer = Observer("exact", tokenizer, table)
    x_MK, other = in_clear(table, IDS), torch.ones(1, 8, dtype=torch.int32)
    linear(observer, x_MK)
    linear(observer, other, "layers.3.down")
    x_MK.zero_()
    other.zero_()
    snapshot = observer.snapshot()
    assert snapshot.reading is not None
    assert snapshot.reading.prompt == "w17 w3 w999 w3"
    assert snapshot.last[0].group == "layers.3.down"
    assert snapshot.last[0].words == ("1",) * 6


def test_counts_begin_anew_with_a_prompt(tokenizer: Tokenizer) -> None:
    observer = Observer("open", tokenizer, None)
    for _ in range(2):
        embedding(observer, IDS)
        linear(observer, torch.ones(4, INPUTS))
        linear(observer, torch.ones(4, INPUTS), "layers.0.o")
        embedding(observer, [5])
    snapshot = observer.snapshot()
    assert (snapshot.run, snapshot.requests) == (2, 4)
    assert snapshot.size_bytes == 5 * 8 + 2 * 4 * INPUTS * 4
    assert snapshot.histogram is not None
    assert sum(snapshot.histogram.counts) == 4 * INPUTS


def test_only_the_latest_requests_are_shown_newest_first() -> None:
    observer = Observer("exact", None, None)
    for index in range(30):
        linear(observer, torch.ones(1, 8, dtype=torch.int32), f"layers.{index}.o")
        if index % 3 == 2:
            observer.snapshot()
    assert [each.group for each in observer.snapshot().last] == [f"layers.{index}.o" for index in range(29, 21, -1)]


def test_without_a_tokenizer_there_is_no_reading(table: TokenTable) -> None:
    observer = Observer("exact", None, table)
    linear(observer, in_clear(table, IDS))
    assert observer.snapshot().reading is None


def test_nothing_yet_is_a_snapshot_too() -> None:
    snapshot = Observer("exact", None, None).snapshot()
    assert (snapshot.run, snapshot.requests, snapshot.histogram, snapshot.last) == (0, 0, None, ())


def test_chunks_of_a_prompt_are_one_prompt() -> None:
    transcript = Transcript()
    transcript.add([1, 2, 3], 3, 100.0)
    transcript.add([4, 5], 2, 100.5)
    transcript.add([6], 1, 101.0)
    transcript.add([7], 1, 200.0)  # a slow answer stays one
    assert (transcript.run, transcript.prompt, transcript.answer) == (1, [1, 2, 3, 4, 5], [6, 7])


def test_another_prompt_comes_after_an_answer_or_a_pause() -> None:
    transcript = Transcript()
    transcript.add([1, 2], 2, 100.0)
    transcript.add([3, 4], 2, 110.0)
    assert (transcript.run, transcript.prompt) == (2, [3, 4])
    transcript.add([5], 1, 110.1)
    transcript.add([6, 7], 0, 110.2)
    assert (transcript.run, transcript.prompt, transcript.answer, transcript.sure) == (3, [6, 7], [], 0)


@given(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50),
)
def test_joining_histograms_counts_every_value_where_it_lies(first: list[int], second: list[int]) -> None:
    a, b = (torch.tensor(values, dtype=torch.int32)[None] for values in (first, second))
    joined = merged(merged(None, a), b)
    assert joined is not None
    assert joined.limit == max(limit_of(a[0]), limit_of(b[0]))
    both = [*first, *second]
    width = 2 * joined.limit / BINS
    # -limit + i * width is exact: the limit is a power of two. The largest value of all is in the last bin.
    expected = [0] * BINS
    for value in both:
        expected[min(BINS - 1, int((value + joined.limit) // width))] += 1
    # A value on the upper limit of a narrower histogram was counted just below it.
    assert sum(joined.counts) == len(both)
    assert sum(abs(x - y) for x, y in zip(joined.counts, expected, strict=True)) <= 2 * sum(
        value == limit_of(x[0]) for x in (a, b) for value in x[0].tolist()
    )


def test_values_that_are_no_numbers_are_left_out() -> None:
    x = torch.tensor([[float("nan"), float("inf"), 1.0, -1.0]])
    histogram = merged(None, x)
    assert histogram is not None
    assert sum(histogram.counts) == 2
    assert merged(None, x[:, :2]) is None
    assert merged(None, torch.zeros(0, 8)) is None


def test_zeros_have_a_histogram() -> None:
    histogram = merged(None, torch.zeros(2, 8, dtype=torch.int32))
    assert histogram == Histogram(counts=counted(torch.zeros(16), 1.0), limit=1.0)


def test_words_are_written_as_they_are_best_read() -> None:
    assert words_of(torch.tensor([1.5, -0.25], dtype=torch.bfloat16), 2.0) == ("+1.500", "-0.250")
    assert words_of(torch.tensor([-3, 7], dtype=torch.int32), 8.0) == ("-3", "7")
    assert words_of(torch.tensor([-1, 2**31 - 1], dtype=torch.int32), 2.0**31) == ("ffffffff", "7fffffff")

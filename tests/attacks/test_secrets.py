"""Whoever reads error messages, tracebacks and logs: no key, mask, product, check or activation stands there."""

from __future__ import annotations

import base64
import copy
import logging
import os
import pickle
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from attacks.lies import LIES
from attacks.test_malformed import MALFORMED, UNMATCHED, sending
from hostile import PROMPT, SETUPS, Exchange, Material, Message, Rig, Tamper, adding, build, claiming, honest, on
from torch import Tensor

from tsqp.enclave.mask_sources import DealerMasks, EnclaveMasks, SummedMasks
from tsqp.enclave.masks import MaskKey, MaskRows
from tsqp.errors import InternalError, TransportClosedError, TsqpError
from tsqp.wire import messages
from tsqp.wire.codec import Claim

# Shorter numbers stand in texts by chance: shapes, ports, rows.
_SMALLEST = 10**6


class Secrets:
    """What a rig must not show, as texts and as numbers.

    Args:
        rig: after it has run.
    """

    def __init__(self, rig: Rig) -> None:
        tensors: list[Tensor] = [xq_MK for _, xq_MK in rig.inputs]
        for checker in rig.checks.checkers.values():
            tensors += [checker._s._values_N, checker._c._values_N]
        self.texts: list[str] = []
        if rig.source is not None:
            tensors += rig.source.words + rig.source.products
            self.texts = [text for key in keys_of(rig) for text in forms_of(key)]
        values = torch.cat([tensor.flatten().long() for tensor in tensors])
        self.numbers = {abs(value) for value in values.tolist()}
        self.numbers |= {value % (1 << 32) for value in values.tolist()}

    def shown_in(self, text: str) -> list[str]:
        """Return the secrets that a text shows."""
        found = [secret for secret in self.texts if secret.lower() in text.lower()]
        # Digests are hexadecimal and hold runs of digits; no secret is printed inside one.
        plain = re.sub(r"\b[0-9a-f]{64}\b", "", text)
        # Nor in an object's address, whose decimal digits would be taken for a number of their own.
        hexadecimal = re.compile(r"0x([0-9a-fA-F]+)")
        numbers = {int(run) for run in re.findall(r"\d+", hexadecimal.sub("", plain))}
        numbers |= {int(run, 16) for run in hexadecimal.findall(plain)}
        found += [str(number) for number in numbers & self.numbers if number >= _SMALLEST]
        return found + re.findall(r"tensor\(|FieldVector\(\[", plain)


def forms_of(key: bytes) -> list[str]:
    """Write bytes as people and programs do; halves too, for a text that is cut."""
    forms = [key.hex(), base64.b64encode(key).decode(), repr(key)[2:-1], str(list(key))[1:-1]]
    return [*forms, key.hex()[:32], key.hex()[32:], base64.b64encode(key).decode()[:20], str(list(key[:8]))[1:-1]]


def keys_of(rig: Rig) -> list[bytes]:
    assert rig.source is not None
    source = rig.source.source
    sources = source._sources if isinstance(source, SummedMasks) else [source]
    keys = []
    for each in sources:
        assert isinstance(each, (EnclaveMasks, DealerMasks))
        keys.append(each._key.seed())
    return keys


def lose_link(exchange: Exchange) -> list[Message | TransportClosedError]:
    return [TransportClosedError(f"the worker at {exchange.peer.address} closed the connection or died.")]


def fail(exchange: Exchange) -> list[Message]:
    return [[messages.encode(messages.Failure(id=exchange.request.id, code="internal", message="out of order"))]]


PROVOCATIONS: dict[str, Tamper] = {
    **{f"lie: {name}": claiming(lie) for name, lie in LIES.items() if name != "an earlier result"},
    **{f"form: {name}": sending(change) for name, change in {**MALFORMED, **UNMATCHED}.items()},
    "a lost link": lose_link,
    "silence": lambda _exchange: [],
    "a failure": fail,
}


def every_text(error: BaseException) -> str:
    """Return all that could be printed of an exception: its message, its causes', its traceback."""
    texts = ["".join(traceback.format_exception(error))]
    while error:
        texts += [str(error), repr(error), f"{error}", repr(error.args), repr(getattr(error, "__notes__", ""))]
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return "\n".join(texts)


@pytest.mark.parametrize(
    ("setup", "by"),
    [("verified", "worker"), ("enclave-masks", "worker"), ("one-dealer", "dealer"), ("two-dealers", "dealer")],
)
def test_no_error_shows_a_secret(material: Material, setup: str, by: str, caplog: pytest.LogCaptureFixture) -> None:
    """Every provocation of this folder, one after another: messages, tracebacks and logs."""
    caplog.set_level(logging.DEBUG)
    for name, tamper in PROVOCATIONS.items():
        caplog.clear()
        rig = build(material, SETUPS[setup], pool_rows=2, retries=1)
        liar = rig.peers[-1] if by == "dealer" else rig.worker
        liar.tamper = on("layers.1.down", tamper)
        with pytest.raises(TsqpError) as raised:
            rig.prefill(PROMPT)
        secrets = Secrets(rig)
        assert len(secrets.numbers) > 1000
        assert secrets.shown_in(every_text(raised.value)) == [], name
        assert secrets.shown_in(caplog.text) == [], name


def objects_of(rig: Rig) -> Iterable[object]:
    """List the objects that hold secrets, and those that hold these."""
    yield from (rig.exact, rig.exact.session, rig.products, rig.checks.checkers)
    yield rig.meter.since(rig.meter)  # nanoseconds, as many as it has, are a secret's number by chance now and then
    for checker in rig.checks.checkers.values():
        yield from (checker, checker._s, checker._c)
    yield Claim(rig.inputs[0][1], "worker")
    if rig.pool is None or rig.source is None:
        return
    source = rig.source.source
    sources = source._sources if isinstance(source, SummedMasks) else [source]
    yield from (rig.pool, rig.pool._ledger, rig.pool._ready, rig.pool._pending, source)
    yield from (each._key for each in sources if isinstance(each, (EnclaveMasks, DealerMasks)))
    mask = rig.pool.take("head", 1)
    yield from (mask, mask._rows, *mask._rows, mask._words)
    rig.pool._ask("layers.2.down", 20)
    yield from (rig.pool._pending, *rig.pool._pending["layers.2.down"])
    for sent in rig.journal:
        if isinstance(sent.header, messages.MaskProduct):
            yield from (sent.header, [sent.header], {"header": sent.header})


@pytest.mark.parametrize("show", [repr, str, format, ascii], ids=lambda show: show.__name__)
def test_no_object_shows_a_secret(rig: Rig, show: Callable[[object], str]) -> None:
    rig.prefill(PROMPT)
    things = list(objects_of(rig))
    secrets = Secrets(rig)
    for thing in things:
        assert secrets.shown_in(show(thing)) == [], type(thing).__name__


def test_logs_of_an_honest_run_show_nothing(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    rig.prefill(PROMPT)
    assert Secrets(rig).shown_in(caplog.text) == []


@pytest.mark.parametrize("dealers", [1, 2])
def test_a_dealers_own_log_shows_no_seed(
    material: Material, dealers: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in a dealer is logged with its traceback, and what the enclave hears of it says nothing."""

    def broken(*_args: object) -> Tensor:
        raise RuntimeError("a bug")

    caplog.set_level(logging.DEBUG)
    rig = build(material, dealers)
    monkeypatch.setattr(type(rig.dealers[0].dispatcher.service), "multiply", broken)
    with pytest.raises(InternalError) as raised:
        rig.prefill(PROMPT)
    assert "a bug" in caplog.text
    assert Secrets(rig).shown_in(caplog.text + every_text(raised.value)) == []


@pytest.mark.parametrize("secret", ["key", "a row", "a mask word", "s", "a tensor"])
def test_the_search_finds_secrets(material: Material, secret: str) -> None:
    """The control: what the tests above look for is found where it stands."""
    rig = build(material, 0, pool_rows=2)
    rig.prefill(PROMPT)
    secrets = Secrets(rig)
    assert rig.source is not None
    texts = {
        "key": [*forms_of(keys_of(rig)[0]), keys_of(rig)[0].hex().upper()],
        "a row": [str(rig.inputs[3][1]), str(rig.inputs[3][1].tolist())],
        "a mask word": [str(rig.source.words[0][0]), hex(int(rig.source.words[0][0, 1]) % (1 << 32))],
        "s": [str(rig.checks.checkers["head"]._s._values_N.tolist()[5])],
        "a tensor": [repr(torch.zeros(3))],
    }
    assert all(secrets.shown_in(f"linear head: {text}.") for text in texts[secret])


def secret_objects(rig: Rig) -> dict[str, object]:
    assert rig.pool is not None
    assert rig.source is not None
    rows = MaskRows(0, torch.zeros(1, 1, dtype=torch.int32))
    return {
        "key": MaskKey(),
        "pool": rig.pool,
        "mask": rig.pool.take("head", 1),
        "rows": rows,
        "checker": rig.checks.checkers["head"],
        "source": rig.source.source,
        "products": rig.products,
        "checks": rig.checks,
        "list of rows": [rows],
    }


NAMES = ("key", "pool", "mask", "rows", "checker", "source", "products", "checks", "list of rows")
# What pickle raises of its own: some of these also hold locks, sockets or functions.
REFUSALS = (InternalError, TypeError, AttributeError, pickle.PicklingError)
COPIES: dict[str, Callable[[object], object]] = {
    "pickle": pickle.dumps,
    "old pickle": lambda thing: pickle.dumps(thing, protocol=0),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("by", COPIES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dealers", [0, 1, 2])
def test_secrets_cannot_be_stored_or_copied(material: Material, dealers: int, name: str, by: str) -> None:
    thing = secret_objects(build(material, dealers, pool_rows=2))[name]
    with pytest.raises(REFUSALS):
        COPIES[by](thing)


@pytest.mark.parametrize("name", ["key", "pool", "mask", "rows", "checker"])
@pytest.mark.parametrize("by", [*COPIES, "copy"])
def test_secrets_refuse_by_themselves(material: Material, name: str, by: str) -> None:
    """Not because of a lock among their attributes: with an error that says why."""
    thing = secret_objects(build(material, 0, pool_rows=2))[name]
    with pytest.raises(InternalError, match=r"must not leave|cannot be stored"):
        {**COPIES, "copy": copy.copy}[by](thing)


def test_the_secret_vector_of_a_check_cannot_be_stored(material: Material) -> None:
    checker = build(material, None).checks.checkers["head"]
    with pytest.raises(InternalError):
        pickle.dumps(checker._s)


@pytest.fixture(scope="module")
def writes() -> Iterator[list[str]]:
    """Every file that this process opens for writing while the list is in use; an audit hook stays for ever."""
    opened: list[str] = []
    watching = [True]
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and watching[0] and isinstance(args[2], int) and args[2] & flags:
            opened.append(str(args[0]))

    sys.addaudithook(audit)
    yield opened
    watching[0] = False


def test_nothing_is_written_to_disk_during_a_run(material: Material, writes: list[str]) -> None:
    """Masks, keys and activations live in memory only: a run opens no file for writing."""
    writes.clear()
    for dealers in SETUPS.values():
        rig = build(material, dealers, pool_rows=2)
        rig.prefill(PROMPT)
        rig.worker.tamper = claiming(adding(1)) if dealers else honest
        with suppress(TsqpError):
            rig.prefill(PROMPT)
    assert writes == []


def test_a_file_written_would_be_seen(tmp_path: Path, writes: list[str]) -> None:
    (tmp_path / "masks").write_bytes(b"")
    assert str(tmp_path / "masks") in writes

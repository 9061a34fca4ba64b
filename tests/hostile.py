"""Peers that lie, in this process: an honest worker or dealer behind a link that may change whatever it answers.

``Rig`` is an enclave of the levels `verified` and `masked` over such peers, put together as ``tsqp.levels`` does.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch
from plain_link import PlainLink
from torch import Tensor

from tsqp.arith.native import Scaling
from tsqp.arith.ring import Codes, lay_out
from tsqp.enclave.codes import Checks, StreamedCodes, read_codes
from tsqp.enclave.mask_pool import MaskPool
from tsqp.enclave.mask_sources import DealerMasks, EnclaveMasks, MaskSource, SummedMasks
from tsqp.enclave.masks import MaskLedger
from tsqp.enclave.products import CheckedProducts, ExactWorker
from tsqp.enclave.session import Expected, Session, check_peer
from tsqp.errors import TransportTimeoutError, TsqpError
from tsqp.meter import Meter
from tsqp.model.architecture import LinearGroup, linear_groups
from tsqp.model.exact import ExactOps, LocalProducts
from tsqp.model.llama import Llama
from tsqp.model.overlap import Pending
from tsqp.model.packed import PackedEnclave, open_codes, open_enclave
from tsqp.transport.base import Buffer, Delivery
from tsqp.wire import codec, messages
from tsqp.wire.messages import AnyReply, AnyRequest, Service
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.services import DealerService, ExactService

# How products are made: None is `verified`; else `masked` by that many dealers, by the enclave itself where none.
SETUPS: dict[str, int | None] = {"verified": None, "enclave-masks": 0, "one-dealer": 1, "two-dealers": 2}
MASKED = {name: dealers for name, dealers in SETUPS.items() if dealers is not None}
# The first product, one in the middle, the last.
TARGETS = ("layers.0.qkv", "layers.1.down", "head")
WORKER_ADDRESS = "10.6.6.6:50051"
DEALER_ADDRESSES = ("10.7.7.1:50052", "10.7.7.2:50052")
# Distinct tokens, so that distinct rows; and another prompt of the same length.
PROMPT = torch.tensor([[3, 17, 42, 58, 77, 99]])
OTHER_PROMPT = torch.tensor([[5, 9, 88, 31, 64, 2]])
TOKENS = PROMPT.shape[1]
POOL_BYTES = 1 << 30

Message = list[Buffer]
decode_reply = msgspec.msgpack.Decoder(AnyReply).decode


@dataclass(frozen=True, slots=True)
class Sent:
    """A request as its peer received it: every byte."""

    peer: str
    frames: tuple[bytes, ...]

    @property
    def header(self) -> AnyRequest:
        return codec.decode_request(self.frames).header

    @property
    def group(self) -> str:
        return str(getattr(self.header, "group", ""))


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request, who answers it, and what an honest peer answers."""

    peer: HostilePeer
    request: AnyRequest
    tensors: Sequence[Tensor]
    reply: Message

    @property
    def group(self) -> str:
        return str(getattr(self.request, "group", ""))

    @property
    def is_product(self) -> bool:
        return isinstance(self.request, (messages.LinearExact, messages.MaskProduct))

    @property
    def result(self) -> Tensor:
        """A copy of the tensor in the honest reply."""
        header = decode_reply(self.reply[0])
        assert isinstance(header, messages.Result)
        return codec.tensor_of(header.y, bytes(self.reply[1]))


# What a peer does with an exchange: the messages to send back, an exception standing for a failure of the link.
Tamper = Callable[[Exchange], Sequence[Message | TsqpError]]
Lie = Callable[[Exchange], Tensor]


def honest(exchange: Exchange) -> list[Message | TsqpError]:
    return [exchange.reply]


def on(group: str, tamper: Tamper) -> Tamper:
    """Tamper with products of one linear group only."""
    return lambda exchange: tamper(exchange) if exchange.is_product and exchange.group == group else honest(exchange)


def claiming(lie: Lie) -> Tamper:
    """Answer with a valid result that holds another tensor."""
    return lambda exchange: [result_message(exchange, lie(exchange))]


def result_message(exchange: Exchange, y: Tensor) -> Message:
    """Encode a result for the request of an exchange."""
    return [
        messages.encode(messages.Result(id=exchange.request.id, y=codec.spec_of(y), compute_ns=1)),
        bytes(codec.frame_of(y.contiguous())),
    ]


def adding(delta: int, row: int = 0, column: int = 0) -> Lie:
    """Add to one word modulo 2^32; where there are fewer rows, to one of the last row."""

    def lie(exchange: Exchange) -> Tensor:
        y = exchange.result
        at = min(row, len(y) - 1)
        y[at, column] = wrapped(int(y[at, column]) + delta)
        return y

    return lie


def wrapped(value: int) -> int:
    """Return the int32 that an integer is modulo 2^32."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


class HostilePeer:
    """A worker or dealer at an address; every link to it answers through ``tamper``.

    Args:
        address: what messages should name.
        dispatcher: the honest peer behind it.
        journal: what every peer of a rig was sent, in order.

    Attributes:
        before: called with a request before it leaves; may raise as a link does.
        answered: honest results of products so far, with the group's name.
    """

    def __init__(self, address: str, dispatcher: Dispatcher, journal: list[Sent] | None = None) -> None:
        self.address = address
        self.dispatcher = dispatcher
        self.journal: list[Sent] = [] if journal is None else journal
        self.tamper: Tamper = honest
        self.before: Callable[[AnyRequest], None] = lambda _request: None
        self.answered: list[tuple[str, Tensor]] = []
        self.links = 0

    def link(self) -> HostileTransport:
        self.links += 1
        return HostileTransport(self)

    @property
    def received(self) -> list[Sent]:
        return [sent for sent in self.journal if sent.peer == self.address]

    @property
    def tensors(self) -> list[tuple[str, Tensor]]:
        """Every tensor that this peer was sent, with the group's name."""
        return [(sent.group, tensor) for sent in self.received for tensor in codec.decode_request(sent.frames).tensors]

    def answer(self, frames: tuple[bytes, ...]) -> Sequence[Message | TsqpError]:
        request = codec.decode_request(frames)
        self.before(request.header)
        self.journal.append(Sent(self.address, frames))
        exchange = Exchange(self, request.header, request.tensors, self.dispatcher.answer(frames))
        replies = self.tamper(exchange)
        if exchange.is_product and isinstance(decode_reply(exchange.reply[0]), messages.Result):
            self.answered.append((exchange.group, exchange.result))
        return replies


class HostileTransport(PlainLink):
    """A link to a hostile peer: ``ClientTransport`` without a socket."""

    def __init__(self, peer: HostilePeer) -> None:
        self._peer = peer
        self._inbox: deque[Message | TsqpError] = deque()
        self.closed = False

    @property
    def peer(self) -> str:
        return self._peer.address

    def send(self, frames: Sequence[Buffer]) -> None:
        assert not self.closed
        self._inbox.extend(self._peer.answer(tuple(bytes(frame) for frame in frames)))

    def receive(self, timeout_s: float) -> Delivery:
        if not self._inbox:
            raise TransportTimeoutError(f"{self.peer} did not answer within {timeout_s:g} s.")
        reply = self._inbox.popleft()
        if isinstance(reply, TsqpError):
            raise reply
        return Delivery(reply)

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class Material:
    """A packed model, both sides of it."""

    directory: Path
    packed: PackedEnclave
    groups: tuple[LinearGroup, ...]
    codes: dict[str, Tensor]

    @classmethod
    def read(cls, directory: Path) -> Material:
        packed, worker = open_enclave(directory), open_codes(directory)
        codes = {group.name: worker.read(group.name) for group in worker.groups}
        return cls(directory, packed, linear_groups(packed.config), codes)

    @property
    def digest(self) -> str:
        return self.packed.manifest.codes_digest

    def dispatcher(self, serves: Service = "exact", codes: dict[str, Tensor] | None = None) -> Dispatcher:
        """Return an honest worker (``exact``) or dealer (``masks``); codes of its own make it wrong."""
        service = (DealerService if serves == "masks" else ExactService)(
            self.groups, laid_out(codes or self.codes), torch.device("cpu")
        )
        return Dispatcher(service, "tiny", self.digest)

    def expected(self, serves: Service) -> Expected:
        return Expected(serves=serves, digest=self.digest, dtype="int8", groups=self.groups)

    def local_logits(self, ids_BT: Tensor = PROMPT) -> Tensor:
        """Return logits at every position, computed here."""
        products = LocalProducts(laid_out(self.codes), 1)
        return Llama(self.packed.config, ExactOps(self.packed, products, Meter())).prefill(ids_BT, all_logits=True)


def laid_out(codes: dict[str, Tensor]) -> dict[str, Codes]:
    """Lay a model's codes out."""
    return {name: lay_out(codes_NK) for name, codes_NK in codes.items()}


class SpyingSource:
    """A mask source that notes which rows were used to hide something: (group, row)."""

    def __init__(self, source: MaskSource) -> None:
        self.source = source
        self.used: list[tuple[str, int]] = []
        self.words: list[Tensor] = []
        self.products: list[Tensor] = []
        self._lock = threading.Lock()

    @property
    def peers(self) -> tuple[str, ...]:
        return self.source.peers

    @peers.setter
    def peers(self, _peers: tuple[str, ...]) -> None:  # the protocol has a plain attribute
        raise AttributeError

    def rows(self, group: str, first: int, count: int) -> Tensor:
        words = self.source.rows(group, first, count)
        with self._lock:
            self.used += [(group, first + row) for row in range(count)]
            self.words.append(words)
        return words

    def start(self, group: str, first: int, count: int) -> Callable[[], Tensor]:
        collect = self.source.start(group, first, count)

        def noted() -> Tensor:
            products = collect()
            self.products.append(products)
            return products

        return noted


@dataclass
class Rig:
    """An enclave over hostile peers.

    Attributes:
        journal: what was sent to whom, in order, from the first hello on.
        inputs: what products were asked for: group and integers.
        outputs: what came out of the check.
    """

    material: Material
    worker: HostilePeer
    dealers: tuple[HostilePeer, ...]
    journal: list[Sent]
    exact: ExactWorker
    checks: Checks
    source: SpyingSource | None
    pool: MaskPool | None
    products: CheckedProducts
    meter: Meter
    inputs: list[tuple[str, Tensor]] = field(default_factory=list)
    outputs: list[tuple[str, Tensor]] = field(default_factory=list)

    def observed_products(self, group: str, xq_MK: Tensor) -> Tensor:
        """Multiply as the level does, and note what went in and what came out."""
        return self.start(group, xq_MK)()

    def start(self, group: str, xq_MK: Tensor, scaling: Scaling | None = None) -> Pending:
        """Do the same as ``Products.start``."""
        self.inputs.append((group, xq_MK.clone()))
        pending = self.products.start(group, xq_MK, scaling)

        def collect() -> Tensor:
            y_MN = pending()
            self.outputs.append((group, y_MN.clone()))
            return y_MN

        return collect

    def abandon(self) -> None:
        """See ``Products.abandon``."""
        self.products.abandon()

    def prefill(self, ids_BT: Tensor = PROMPT, *, all_logits: bool = True) -> Tensor:
        ops = ExactOps(self.material.packed, self, self.meter)
        return Llama(self.material.packed.config, ops).prefill(ids_BT, all_logits=all_logits)

    @property
    def peers(self) -> tuple[HostilePeer, ...]:
        return (self.worker, *self.dealers)

    @property
    def contributors(self) -> tuple[str, ...]:
        """How an integrity error must name everyone who had a part in a product."""
        return (f"worker {self.worker.address}", *(f"dealer {dealer.address}" for dealer in self.dealers))

    def second_enclave(self) -> Rig:
        """Return one more connection, to a worker of its own, over the same checks and pool."""
        worker = HostilePeer(self.worker.address, self.worker.dispatcher)
        exact = connected_worker(self.material, worker, Meter(), retries=1)
        products = CheckedProducts(exact, self.checks.checkers, self.pool, Meter())
        return Rig(
            self.material, worker, self.dealers, worker.journal, exact, self.checks, self.source, self.pool, products,
            Meter(),
        )  # fmt: skip


def met(material: Material, peer: HostilePeer, serves: Service, meter: Meter | None = None) -> Session:
    """Connect to a peer as ``tsqp.enclave.connect.meet`` does."""
    session = Session(peer.link(), 1.0, meter)
    check_peer(session.hello(1.0), material.expected(serves), session.peer)
    return session


def connected_worker(material: Material, worker: HostilePeer, meter: Meter, retries: int) -> ExactWorker:
    groups: Mapping[str, LinearGroup] = {group.name: group for group in material.groups}
    return ExactWorker(lambda: met(material, worker, "exact", meter), groups, retries)


def build(
    material: Material,
    dealers: int | None,
    *,
    pool_rows: int = 0,
    retries: int = 0,
    checks: Checks | None = None,
) -> Rig:
    """Put an enclave together; its mask pool is full. All peers are honest until told otherwise.

    Args:
        material: the model.
        dealers: None for `verified`; how many dealers mask, 0 for the enclave's own masks.
        pool_rows: for how many tokens masks are kept ready.
        retries: as ``ExactWorker`` takes it.
        checks: made before, from the same codes; by default the codes are streamed from the worker.
    """
    meter, journal = Meter(), list[Sent]()
    worker = HostilePeer(WORKER_ADDRESS, material.dispatcher(), journal)
    exact = connected_worker(material, worker, meter, retries)
    checks = checks or read_codes(material.packed.manifest, StreamedCodes(exact.session), {} if dealers == 0 else None)
    helpers = tuple(
        HostilePeer(address, material.dispatcher("masks"), journal) for address in DEALER_ADDRESSES[: dealers or 0]
    )
    source = None if dealers is None else SpyingSource(_mask_source(material, helpers, checks))
    pool = None
    if source is not None:
        pool = MaskPool(material.groups, source, MaskLedger(), pool_rows, POOL_BYTES, meter)
        fill(pool)
    products = CheckedProducts(exact, checks.checkers, pool, meter)
    return Rig(material, worker, helpers, journal, exact, checks, source, pool, products, meter)


def _mask_source(material: Material, dealers: Sequence[HostilePeer], checks: Checks) -> MaskSource:
    if not dealers:
        return EnclaveMasks(material.groups, checks.codes, 1)
    sources = [DealerMasks(material.groups, met(material, dealer, "masks")) for dealer in dealers]
    return sources[0] if len(sources) == 1 else SummedMasks(sources)


def fill(pool: MaskPool) -> None:
    """Fill a pool as its idle thread does."""
    while not pool.is_full:
        pool.fill_step()

"""Meets the dealers of a `masked` run, and refuses those that would see both a mask and what it hides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from tsqp.config import EnclaveConfig
from tsqp.enclave.connect import Peer, meet
from tsqp.enclave.mask_sources import DealerMasks, MaskSource, SummedMasks
from tsqp.enclave.session import Expected
from tsqp.errors import ConfigError
from tsqp.model.architecture import LinearGroup
from tsqp.tee import tee_name
from tsqp.transport.keys import KeyPair
from tsqp.transport.urls import parse


def check_dealers(worker: Peer, dealers: tuple[Peer, ...], notice: Callable[[str], None]) -> None:
    """Refuse dealers that are the worker or each other, and links that would show their seeds.

    Args:
        worker: the online worker.
        dealers: at least one.
        notice: told where a link in clear is let pass, which is only outside of a TEE.

    Raises:
        ConfigError: two of them have one address or one key, or a seed would travel in clear.
    """
    addresses = {parse(worker.address).url: "the worker"}
    keys = {worker.key.decode(): "the worker"} if worker.key else {}
    for dealer in dealers:
        endpoint = parse(dealer.address)
        if endpoint.scheme == "shm":
            raise ConfigError(f"dealer {endpoint}: seeds must not lie in shared memory; use tcp or ipc.")
        _claim(addresses, endpoint.url, dealer.address, "address")
        if dealer.key is not None:
            _claim(keys, dealer.key.decode(), dealer.address, "key")
        elif not endpoint.stays_on_this_machine:
            raise ConfigError(f"dealer {dealer.address} is not on this machine and has no key: give --dealer-key.")
        elif name := tee_name():
            raise ConfigError(
                f"dealer {dealer.address} has no key: inside {name} seeds travel encrypted only. Give --dealer-key."
            )
        else:
            notice(
                f"dealer {dealer.address} has no key: its seeds travel in clear, and whoever reads them and the "
                "worker's traffic can unmask it. For development only; give --dealer-key."
            )


def _claim(taken: dict[str, str], value: str, dealer: str, what: str) -> None:
    """Note who has a value; refuse a second one."""
    if holder := taken.get(value):
        raise ConfigError(
            f"dealer {dealer} has the same {what} as {holder}: it would see both a mask and what it hides. "
            "Dealers must be run by others than the worker, and than each other."
        )
    taken[value] = f"dealer {dealer}"


def dealer_peers(
    config: EnclaveConfig, load_key: Callable[[str], bytes], own: KeyPair | None = None
) -> tuple[Peer, ...]:
    """Pair the dealers' addresses with their keys.

    Args:
        config: the settings.
        load_key: reads a public key from a file or a text.
        own: this process's pair.

    Raises:
        ConfigError: another number of keys than of dealers.
    """
    if config.dealer_keys and len(config.dealer_keys) != len(config.dealers):
        raise ConfigError(
            f"{len(config.dealers)} dealers and {len(config.dealer_keys)} dealer keys: give one key for each, in order."
        )
    keys: list[bytes | None] = [load_key(key) for key in config.dealer_keys] or [None] * len(config.dealers)
    return tuple(Peer(address=address, key=key, own=own) for address, key in zip(config.dealers, keys, strict=True))


@contextmanager
def met_dealers(
    dealers: tuple[Peer, ...],
    config: EnclaveConfig,
    groups: tuple[LinearGroup, ...],
    digest: str,
    seen: Mapping[str, str],
) -> Iterator[MaskSource]:
    """Connect to dealers for the time of a ``with`` block; masks are the sums of theirs.

    Args:
        dealers: at least one; ``check_dealers`` has passed.
        config: timeouts.
        groups: the model's linear groups, in order.
        digest: of its codes.
        seen: instances of other peers, with what they are called.

    Raises:
        ConfigError: two of the addresses lead to one process.
        TsqpError: as ``meet``.
    """
    expected = Expected(serves="masks", digest=digest, dtype="int8", groups=groups)
    instances = dict(seen)
    sources = []
    with ExitStack() as stack:
        for dealer in dealers:
            session, welcome = meet(dealer, config, expected)
            stack.callback(session.close)
            _claim(instances, welcome.instance, dealer.address, "process")
            sources.append(DealerMasks(groups, session))
        yield sources[0] if len(sources) == 1 else SummedMasks(sources)

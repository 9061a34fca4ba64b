"""What users and callers are told about an engine's workers, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from tsqp.engine.replica import Replica
from tsqp.errors import TransportError, TsqpError


def serving(replicas: Sequence[Replica]) -> str:
    """Say who serves now, and of all others why not."""
    names = [replica.name for replica in replicas if replica.state == "serving"]
    return f"serving with worker{'s' * (len(names) > 1)} {', '.join(names)}. {reasons(replicas)}".strip()


def nobody(replicas: Sequence[Replica], kind: type[TsqpError] = TransportError) -> TsqpError:
    """Return the error for no worker at all: of a kind that may pass, or, where all have lied, of a lie."""
    usable = any(replica.state != "lied" for replica in replicas)
    kind = kind if usable else next(type(replica.error) for replica in replicas if replica.error)
    return kind(f"no usable worker is left{', for now' if usable else ''}. {reasons(replicas)}")


def for_now(replicas: Sequence[Replica]) -> TsqpError:
    """Return the error for whoever asks while a worker is being opened."""
    return TransportError(f"no worker is in use for now; one is being opened. {reasons(replicas)}".strip())


def reasons(replicas: Sequence[Replica]) -> str:
    """Say of each worker that is not used why, those with the same reason together."""
    names: dict[str, list[str]] = {}
    for replica in replicas:
        if replica.error:
            names.setdefault(str(replica.error), []).append(replica.name)
    return " ".join(f"With worker {', '.join(each)}: {reason}" for reason, each in names.items())

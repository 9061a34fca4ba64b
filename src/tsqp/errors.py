"""Every error TSQP raises on purpose, grouped by what the operator must do about it.

Messages are sentences for people: what was expected, what came, what to do. They never carry a tensor value.
"""

from __future__ import annotations

_MAX_SHOWN = 512


class TsqpError(Exception):
    """Root of all errors raised on purpose. ``exit_code`` is what the command line ends with."""

    exit_code = 1


def bare(error: TsqpError) -> TsqpError:
    """Return the same error, not from anywhere: frames hold prompts, and an error that is raised again keeps more."""
    return type(error)(*error.args)


class AuditError(TsqpError):
    """The audit found something else than it must: an attack that succeeds where it must fail, or the reverse."""


class SetupError(TsqpError):
    """Something on this machine must be put right before trying again."""

    exit_code = 3


class ConfigError(SetupError):
    """A setting is unknown, unparsable or out of range."""


class WeightsError(SetupError):
    """A model is missing, incomplete or malformed."""


class UnsupportedModelError(SetupError):
    """A model is well-formed but of a kind TSQP does not run."""


class DeviceMemoryError(SetupError):
    """The device that computes has no memory left for the request."""


class DeviceError(SetupError):
    """The device that computes has failed, and this process cannot use it any more."""


class InputError(SetupError):
    """A prompt or a shape does not fit the model."""


class ModelMismatchError(SetupError):
    """A worker serves another model, or in another dtype, than this process expects."""


class KeyRefusedError(SetupError):
    """A peer lets only clients in whose keys it was told, and this process holds none of them. Nothing was sent."""


class PlacementError(SetupError):
    """A worker or dealer of a pool has no node, or is on one where it must not be. It was not started."""


class AbsentPeerError(SetupError):
    """Nobody listens at an address of shared memory. Where somebody did before, it may be starting again."""


class TransportError(TsqpError):
    """The link to a peer failed; trying again may succeed."""

    exit_code = 4


class TransportTimeoutError(TransportError):
    """A peer did not answer within the stated time."""


class TransportClosedError(TransportError):
    """A peer that had answered is gone."""


class RankLostError(TransportClosedError):
    """One of the processes that multiply together is gone or silent; the worker that they are cannot go on."""


class BusyError(TransportError):
    """A worker holds as much of this client as it may, or has as many clients; later it may not."""


class HostileError(TsqpError):
    """A peer sent something it must not send: stop using it."""

    exit_code = 5


class ProtocolError(HostileError):
    """Bytes from a peer are not a valid message of this protocol."""


class PeerKeyError(HostileError):
    """A peer cannot prove that it holds the key it was said to hold. Nothing was sent to it."""


class IntegrityError(HostileError):
    """A peer's result is wrong: it cheats or is broken. Nothing that depends on the result was used."""


class AttestationError(HostileError):
    """A server does not prove that it is what a policy asks for. Nothing of a prompt was sent to it."""


class NoTeeError(AttestationError):
    """It runs in no trusted execution environment, or in one of another kind."""


class EvidenceError(AttestationError):
    """What it sent is no evidence."""


class QuoteError(AttestationError):
    """Its quote is malformed, or not signed by a genuine, unrevoked processor."""


class TcbStatusError(AttestationError):
    """Its processor's firmware has a status that the policy does not allow."""


class DebugEnclaveError(AttestationError):
    """Its memory can be read by a debugger."""


class MeasurementError(AttestationError):
    """Other code runs there."""


class ReportDataError(AttestationError):
    """The quote is not of this connection's key, not fresh, or of other claims."""


class ClaimsError(AttestationError):
    """It runs the right code with settings that the policy does not accept."""


class CollateralError(SetupError):
    """What a quote is verified with is missing, malformed or expired."""


class InternalError(TsqpError):
    """A bug of ours."""

    exit_code = 70


class ExactnessError(InternalError):
    """Exact arithmetic would not be exact: operands beyond a bound, or a kernel that errs."""


class MaskReuseError(InternalError):
    """A mask row would be used twice."""


def printable(text: str) -> str:
    """Make text that may come from a peer fit for a terminal: short, and without control characters."""
    shown = "".join(character if character.isprintable() else "?" for character in text[:_MAX_SHOWN])
    return shown if len(text) <= _MAX_SHOWN else f"{shown}..."

"""What every rank but the first does: load its rows, and multiply by them what rank 0 broadcasts."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from tsqp import logs
from tsqp.config import WorkerConfig
from tsqp.errors import ModelMismatchError, ProtocolError, RankLostError, TsqpError
from tsqp.model.architecture import LinearGroup
from tsqp.model.digest import model_digest
from tsqp.model.linears import Linears
from tsqp.model.locate import locate_packed
from tsqp.model.packed import open_codes
from tsqp.model.share import Share
from tsqp.threads import set_threads
from tsqp.wire import codec
from tsqp.worker.loading import open_checkpoint, read_codes
from tsqp.worker.ranks.life import Beating
from tsqp.worker.ranks.links import Channel, Connect, Done, Failed, Load, Multiply, SendCodes, Stop
from tsqp.worker.ranks.meeting import Meeting, bytes_of, meet_by_torchrun
from tsqp.worker.ranks.placement import placement, rank_device
from tsqp.worker.services import ExactService


@dataclass(frozen=True, slots=True)
class _Part:
    """A rank's rows of a model.

    Attributes:
        groups: the whole model's.
        device: where the rows are.
        rows_dtype: of operands and results.
        multiply: multiplies by a group's rows.
        codes: gives some of a group's codes, counted among this rank's.
    """

    groups: dict[str, LinearGroup]
    device: torch.device
    rows_dtype: torch.dtype
    multiply: Callable[[str, Tensor], Tensor]
    codes: Callable[[str, int, int], Tensor]


def follow_torchrun(config: WorkerConfig) -> bool:
    """Follow rank 0 until the end if torchrun started this process as another rank; tell whether it did.

    Raises:
        ConfigError: the settings contradict torchrun or each other.
        TsqpError: as ``follow`` does.
    """
    place = placement(config, os.environ)
    if place.share.rank:
        follow(meet_by_torchrun(one_machine=place.one_machine), place.share, place.local)
    return place.share.rank > 0


def follow(meeting: Meeting, share: Share, local: Share) -> None:
    """Do what rank 0 says until it says stop. A lost rank 0 ends the process.

    Args:
        meeting: where ranks find each other.
        share: this rank's place among all.
        local: its place among those of its machine.

    Raises:
        SetupError: rank 0 is not there.
        RankLostError: it is gone.
        TsqpError: the rows cannot be loaded; rank 0 has been told.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # all ranks may get them; rank 0 answers what it has taken in, first
        signal.signal(number, signal.SIG_IGN)
    channel, beats = meeting.join(share.rank)
    beating = Beating(beats, share.rank)
    try:
        part = _told_to_load(channel, share, local)
        if not isinstance(channel.command(), Connect):
            raise ProtocolError(f"rank {share.rank}: rank 0 said something else than to connect.")
        meeting.connect(share, part.device)
        _Follower(channel, part).serve()
    except EOFError as error:
        raise RankLostError("rank 0 is gone, so this one ends.") from error
    finally:
        beating.leaving()
        if distributed.is_initialized():
            distributed.destroy_process_group()
        channel.close()


def _told_to_load(channel: Channel, share: Share, local: Share) -> _Part:
    order = channel.command()
    if not isinstance(order, Load):
        raise ProtocolError(f"rank {share.rank}: rank 0 said something else than to load.")
    logs.set_up(order.log_level, order.log_format)
    set_threads(order.threads)
    try:
        part = _load(order, share, rank_device(order.device, local, lambda _sentence: None))
    except TsqpError as error:
        channel.send(Failed(type(error).__name__, str(error)))
        raise
    channel.send(Done())
    return part


def _load(order: Load, share: Share, device: torch.device) -> _Part:
    """Load this rank's rows of the model that rank 0 has.

    Raises:
        ModelMismatchError: this machine has another by that name.
    """
    if order.exact:
        packed = open_codes(locate_packed(order.model))
        _compare(packed.codes_digest, order)
        codes = read_codes(packed, device, share, lambda _done: None)
        service = ExactService(packed.groups, codes, device)
        return _Part(
            service.groups,
            device,
            service.rows_dtype,
            service.multiply,
            lambda group, first, rows: codes[group].plain(first, rows),
        )
    architecture, checkpoint = open_checkpoint(order.model)
    _compare(model_digest(architecture, checkpoint), order)
    dtype = codec.TORCH_DTYPES[order.dtype]
    linears = Linears(architecture, checkpoint, dtype, device, share=share)
    return _Part(linears.groups, device, dtype, linears.multiply, _no_codes)


def _no_codes(group: str, _first: int, _rows: int) -> Tensor:
    raise ProtocolError(f"rank 0 asked for codes of {group}; this rank holds floats.")


def _compare(digest: str, order: Load) -> None:
    if digest != order.digest:
        raise ModelMismatchError(
            f"{order.model} is another model here (digest {digest}) than on rank 0 ({order.digest}): give all machines "
            "the same files."
        )


class _Follower:
    """Multiplies by a part of the weights.

    Args:
        channel: where commands come.
        part: the rows.
    """

    def __init__(self, channel: Channel, part: _Part) -> None:
        self._channel, self._part = channel, part

    @torch.inference_mode()
    def serve(self) -> None:
        """Do what rank 0 says until it says stop.

        Raises:
            EOFError: rank 0 is gone.
        """
        while not isinstance(command := self._channel.command(), Stop):
            if isinstance(command, Multiply):
                self._multiply(command)
            elif isinstance(command, SendCodes):
                codes_RK = self._part.codes(command.group, command.first, command.rows)
                self._channel.send(Done())
                self._give(codes_RK)

    def _multiply(self, command: Multiply) -> None:
        part = self._part
        shape = (command.rows, part.groups[command.group].in_features)
        x_MK = torch.empty(shape, dtype=part.rows_dtype, device=part.device)
        distributed.broadcast(bytes_of(x_MK), src=0)
        try:
            y_MN = part.multiply(command.group, x_MK)
        except TsqpError as error:
            self._channel.send(Failed(type(error).__name__, str(error)))
            return
        self._channel.send(Done())
        self._give(y_MN)

    def _give(self, y: Tensor) -> None:
        distributed.send(bytes_of(y.contiguous()), dst=0)

"""Ranks without processes: which there are, who is taken in, what a lost or failing one becomes, and what is split."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from tiny_models import load_linears, tiny_checkpoint
from torch import Tensor
from workers import packed_tiny

from tsqp.config import WorkerConfig
from tsqp.errors import (
    ConfigError,
    DeviceMemoryError,
    InputError,
    ModelMismatchError,
    RankLostError,
    SetupError,
    WeightsError,
)
from tsqp.model.architecture import read_config
from tsqp.model.digest import model_digest
from tsqp.model.linears import Linears
from tsqp.model.ops import read_state
from tsqp.model.packed import open_codes
from tsqp.model.share import Share
from tsqp.model.weights import Checkpoint
from tsqp.worker.products import CpuEngine
from tsqp.worker.ranks import follower as follower_module
from tsqp.worker.ranks import leader as leader_module
from tsqp.worker.ranks import life, links
from tsqp.worker.ranks.follower import _Follower, _load, _Part
from tsqp.worker.ranks.leader import Leader
from tsqp.worker.ranks.life import Beating
from tsqp.worker.ranks.links import BEATS, COMMANDS, Channel, Done, Failed, Load, Multiply, Stop, Welcoming
from tsqp.worker.ranks.meeting import Meeting, meet_in
from tsqp.worker.ranks.placement import Placement, placement, rank_device
from tsqp.worker.ranks.split import SplitLinears
from tsqp.worker.server import engine_for
from tsqp.worker.services import OpenService
from tsqp.worker.startup import Progress, open_worker

CPU = torch.device("cpu")
PATIENCE_S = 60
TWO = Placement(Share(0, 2), Share(0, 2), launched=False)
ORDER = Load(
    model="m", digest="d", exact=True, dtype="float32", device="cpu", threads=1, log_level="info", log_format="text"
)


def torchrun(rank: int, ranks: int, **more: str) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "host", "MASTER_PORT": "1", **more}


LOCAL = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_which_rank_this_is() -> None:
    alone = placement(WorkerConfig(), {"RANK": "3"})
    assert (alone.share, alone.launched) == (Share(0, 1), False)
    own = placement(WorkerConfig(tensor_parallel=4), {})
    assert (own.share, own.local, own.launched, own.one_machine) == (Share(0, 4), Share(0, 4), False, True)
    for asked in (None, 4):
        by = placement(WorkerConfig(tensor_parallel=asked), torchrun(1, 4, **LOCAL))
        assert (by.share, by.local, by.launched, by.one_machine) == (Share(1, 4), Share(1, 4), True, True)
    far = placement(WorkerConfig(insecure="on"), torchrun(5, 8, **LOCAL))
    assert (far.share, far.local, far.one_machine) == (Share(5, 8), Share(1, 4), False)
    assert placement(WorkerConfig(), torchrun(1, 2, MASTER_ADDR="127.0.0.1")).one_machine
    assert placement(
        WorkerConfig(serves="masks"), torchrun(0, 1, **{**LOCAL, "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    )


@pytest.mark.parametrize(
    ("config", "environment", "sentence"),
    [
        ({"tensor_parallel": 2}, torchrun(1, 4, **LOCAL), r"--tensor-parallel 2, but torchrun started 4 ranks"),
        ({"tensor_parallel": 1}, torchrun(1, 4, **LOCAL), r"--tensor-parallel 1, but torchrun started 4 ranks"),
        ({}, torchrun(4, 4, **LOCAL), r"rank 4 of 4, on this machine 1 of 4: .* do not go together"),
        ({}, torchrun(1, 2, **LOCAL), r"rank 1 of 2, on this machine 1 of 4: .* do not go together"),
        ({}, torchrun(0, 2) | {"WORLD_SIZE": "-2"}, r"variable WORLD_SIZE: expected a number .* got '-2'"),
        ({}, torchrun(5, 8, **LOCAL), r"4 of 8 ranks are on this machine: .* in clear"),
        ({}, torchrun(0, 2), r"1 of 2 ranks are on this machine: .* in clear"),
        ({"serves": "masks", "tensor_parallel": 2}, {}, r"a dealer is one process"),
        ({"serves": "masks", "insecure": "on"}, torchrun(1, 4, **LOCAL), r"a dealer is one process"),
    ],
)
def test_ranks_that_cannot_be(config: dict[str, Any], environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        placement(WorkerConfig(**config), environment)


def test_ranks_of_a_machine_share_its_threads_and_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Placement(Share(6, 8), Share(2, 4), launched=True)
    assert [place.threads(asked) for asked in (16, 7, 4, 1)] == [4, 1, 1, 1]
    assert rank_device("cpu", place.local, print) == CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    assert rank_device("cuda:1", place.local, print) == torch.device("cuda:3")
    with pytest.raises(
        SetupError, match=r"4 ranks need cuda:2 to cuda:5, .* finds 5 CUDA devices: at most 3 ranks fit"
    ):
        rank_device("cuda:2", place.local, print)


def test_too_many_ranks_are_refused_before_any_is_started(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Leader, "_started")
    config = WorkerConfig(model=str(tiny_llama), device="cpu", tensor_parallel=49, listen=("ipc:///tmp/never",))
    with pytest.raises(ConfigError, match=r"layers\.0\.o has 48: at most 48 ranks fit"):
        open_worker(config, Progress(print, lambda _name, _done: None))


def test_another_rank_is_no_worker_of_its_own(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in torchrun(1, 2, MASTER_ADDR="localhost").items():
        monkeypatch.setenv(name, value)
    config = WorkerConfig(model=str(tiny_llama), device="cpu", listen=("ipc:///tmp/never",))
    with pytest.raises(ConfigError, match="torchrun started this process as rank 1 of 2: it can do so with"):
        open_worker(config, Progress(print, lambda _name, _done: None))


def test_only_who_knows_the_token_is_taken_in(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    welcoming = Welcoming(listener)
    with ExitStack() as stack:
        stack.callback(welcoming.close)

        def caller(token: bytes, purpose: Any, rank: int) -> socket.socket:
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(path)
            links.introduce(connection, token, purpose, rank)
            return connection

        strangers = [
            caller(bytes(16), COMMANDS, 1),
            caller(welcoming.token, COMMANDS, 2),
            caller(welcoming.token, BEATS, 0),
        ]
        with socket.socket(socket.AF_UNIX) as hasty:
            hasty.connect(path)
        right = [caller(welcoming.token, purpose, 1) for purpose in (COMMANDS, BEATS)]
        welcoming.take(2, PATIENCE_S, lambda: None)
        found = welcoming.found
        assert found.keys() == {(1, COMMANDS), (1, BEATS)}
        for ours, theirs in zip(found.values(), right, strict=True):
            ours.sendall(b"x")
            assert theirs.recv(1) == b"x"
            ours.close()
        for stranger in strangers:
            assert stranger.recv(1) == b""


class FakeChild:
    """Stands for a process that a leader started: a thread, or nothing."""

    def __init__(self, code: int | None) -> None:
        self.code = code

    def poll(self) -> int | None:
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        if self.code is None and timeout is not None:
            raise subprocess.TimeoutExpired("rank", timeout)
        return self.code or 0

    def kill(self) -> None:
        pass


Behaviour = Callable[[Channel, socket.socket], None]


@pytest.fixture
def led(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Behaviour | int], Leader]]:
    """Make a leader whose only follower is a thread that does this, or a process that has ended with this code."""
    threads: list[threading.Thread] = []
    leaders: list[Leader] = []
    monkeypatch.setattr(leader_module, "_DYING_S", 0.01)

    def make(behaviour: Behaviour | int) -> Leader:
        def started(_leader: Leader, directory: Path, rank: int) -> FakeChild:
            if isinstance(behaviour, int):
                return FakeChild(behaviour)

            def run() -> None:
                channel, beats = meet_in(directory, 2).join(rank)
                behaviour(channel, beats)
                channel.close()
                beats.close()

            threads.append(threading.Thread(target=run))
            threads[-1].start()
            return FakeChild(None)

        monkeypatch.setattr(Leader, "_started", started)
        leaders.append(Leader(TWO))
        return leaders[-1]

    yield make
    for each in leaders:
        each.close()
    for thread in threads:
        thread.join()


def until_stop(channel: Channel) -> None:
    try:
        while not isinstance(channel.command(), Stop):
            pass
    except EOFError:
        pass


def test_a_rank_that_ends_before_it_comes_is_named(led: Callable[..., Leader]) -> None:
    with pytest.raises(
        RankLostError, match=r"rank 1 of 2 is lost: it ended with exit code 3\. The worker cannot go on"
    ):
        led(3).load(ORDER)
    with pytest.raises(RankLostError, match=r"rank 1 of 2 is lost: it was killed by SIGKILL"):
        led(-9).load(ORDER)


def test_a_rank_that_cannot_load_says_why(led: Callable[..., Leader]) -> None:
    def fail(channel: Channel, beats: socket.socket) -> None:
        Beating(beats, 1).leaving()
        assert channel.command() == ORDER
        channel.send(Failed("WeightsError", "no such file."))
        until_stop(channel)

    leader = led(fail)
    leader.load(ORDER)
    with pytest.raises(WeightsError, match=r"rank 1: no such file\."):
        leader.join(CPU)


def test_a_rank_that_goes_while_it_loads_is_noticed(led: Callable[..., Leader]) -> None:
    leader = led(lambda channel, _beats: channel.command())
    leader.load(ORDER)
    with pytest.raises(RankLostError, match=r"rank 1 of 2 is lost: its connection closed"):
        leader.join(CPU)


def test_a_rank_that_goes_while_nothing_is_asked_of_it_is_noticed_at_once(led: Callable[..., Leader]) -> None:
    """By the end of its beats, and not by their absence."""

    def go(channel: Channel, beats: socket.socket) -> None:
        channel.command()
        beats.close()
        until_stop(channel)

    leader = led(go)
    leader.load(ORDER)
    with pytest.raises(RankLostError, match=r"rank 1 of 2 is lost: its connection closed"):
        leader.join(CPU)


def test_a_rank_that_is_silent_while_it_loads_is_noticed(
    led: Callable[..., Leader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life, "BEAT_S", 0.01)
    leader = led(lambda channel, _beats: until_stop(channel))
    leader.load(ORDER)
    with pytest.raises(RankLostError, match=r"rank 1 of 2 is lost: it said nothing for"):
        leader.join(CPU)


def test_a_rank_that_beats_is_not_lost(led: Callable[..., Leader], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: as many beats as a silent one is given, each longer than a beat takes to come."""
    heard = []
    listen = life.Listening._heard

    def watched(listening: life.Listening) -> dict[int, bool]:
        heard.append(listen(listening))
        return heard[-1]

    monkeypatch.setattr(life, "BEAT_S", 0.05)
    monkeypatch.setattr(life.Listening, "_heard", watched)

    def late(channel: Channel, beats: socket.socket) -> None:
        Beating(beats, 1).leaving()
        channel.command()
        while len(heard) < 2 * links.SILENT_BEATS:
            threading.Event().wait(0.01)
        channel.send(Failed("WeightsError", "at last."))
        until_stop(channel)

    leader = led(late)
    leader.load(ORDER)
    with pytest.raises(WeightsError, match="at last"):
        leader.join(CPU)


def test_a_rank_without_memory_for_one_product_fails_that_request_alone(
    led: Callable[..., Leader], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = SimpleNamespace(broadcast=lambda _x, src: src, recv=lambda part, src: part.fill_(src), is_initialized=bool)
    monkeypatch.setattr(leader_module, "distributed", group)
    monkeypatch.setattr(Meeting, "connect", lambda *_: None)

    def once(channel: Channel, beats: socket.socket) -> None:
        Beating(beats, 1).leaving()
        channel.command()
        channel.send(Done())
        channel.command()
        for reply in (Failed("DeviceMemoryError", "cuda:1 is full."), Done(), Done()):
            assert channel.command() == Multiply("g", 3)
            channel.send(reply)
        until_stop(channel)

    leader = led(once)
    leader.load(ORDER)
    leader.join(CPU)
    x_MK, out_MN = torch.ones(3, 4), torch.zeros(3, 5)

    def own(_x: Tensor) -> Tensor:
        return torch.full((3, 2), 5.0)

    def full(_x: Tensor) -> Tensor:
        raise DeviceMemoryError("cuda:0 is full.")

    with pytest.raises(DeviceMemoryError, match="rank 1: cuda:1 is full"):
        leader.multiply("g", x_MK, out_MN, own)
    with pytest.raises(DeviceMemoryError, match="cuda:0 is full"):
        leader.multiply("g", x_MK, out_MN, full)
    assert torch.equal(leader.multiply("g", x_MK, out_MN, own)[:, :2], torch.full((3, 2), 5.0))
    assert out_MN[:, 2:].view(torch.uint8).eq(1).all()
    assert leader.multiply("g", x_MK[:0], out_MN[:0], full).shape == (0, 5)


def test_a_follower_tells_that_it_has_no_memory_and_goes_on(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    sent: list[Tensor] = []
    group = SimpleNamespace(broadcast=lambda x, src: x.fill_(src), send=lambda y, dst: sent.append(y[dst:]))
    monkeypatch.setattr(follower_module, "distributed", group)
    results: list[Tensor | Exception] = [DeviceMemoryError("cuda:1 is full."), torch.ones(2, 3)]

    def multiply(_group: str, _x: Tensor) -> Tensor:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    groups = load_linears(tiny_llama).groups
    part = _Part(groups, CPU, torch.float32, multiply, lambda _group, _first, _rows: torch.empty(0))
    ours, theirs = map(Channel, socket.socketpair())
    for command in (Multiply("head", 2), Multiply("head", 2), Stop()):
        ours.send(command)
    _Follower(theirs, part).serve()
    assert [ours.reply(), ours.reply()] == [Failed("DeviceMemoryError", "cuda:1 is full."), Done()]
    assert [each.numel() for each in sent] == [24]
    ours.close()
    theirs.close()


@pytest.mark.parametrize("exact", [False, True])
def test_a_follower_refuses_another_model_than_the_leaders(tiny_llama: Path, tmp_path: Path, *, exact: bool) -> None:
    model = packed_tiny(tiny_llama, tmp_path / "packed") if exact else tiny_llama
    digest = open_codes(model).codes_digest if exact else model_digest(read_config(model), Checkpoint(model))
    order = msgspec.structs.replace(ORDER, model=str(model), exact=exact, digest=digest)
    assert _load(order, Share(1, 2), CPU).groups["head"].rows == 101
    with pytest.raises(ModelMismatchError, match=r"is another model here \(digest .*\) than on rank 0 \(0+\)"):
        _load(msgspec.structs.replace(order, digest="0" * 64), Share(1, 2), CPU)


class AllRanks:
    """Stands for a leader: has every rank's weights here."""

    def __init__(self, directory: Path, ranks: int) -> None:
        self.share = Share(0, ranks)
        self.others = [
            Linears(read_config(directory), Checkpoint(directory), torch.float32, CPU, share=Share(rank, ranks))
            for rank in range(1, ranks)
        ]

    def multiply(self, group: str, x_MK: Tensor, out_MN: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        assert x_MK.is_contiguous()
        return out_MN.copy_(torch.cat([own(x_MK), *[each.multiply(group, x_MK) for each in self.others]], dim=1))


def test_what_is_above_products_does_not_notice_ranks(tmp_path: Path) -> None:
    """Members of a group, as the first protocol asks for them, and chains, with norms in between."""
    directory = tiny_checkpoint(tmp_path / "model", tie_word_embeddings=True, attention_bias=True)
    checkpoint, whole = Checkpoint(directory), load_linears(directory)
    leader: Any = AllRanks(directory, 3)
    split = SplitLinears(leader, read_config(directory), checkpoint, torch.float32, CPU)
    x_MK = torch.randn(4, 96, generator=torch.Generator().manual_seed(4))
    rows_MK = x_MK[:, ::2]
    for member in range(3):
        ours = split.linear("layers.0.qkv", rows_MK, member)
        torch.testing.assert_close(ours, whole.linear("layers.0.qkv", rows_MK, member))
    with pytest.raises(InputError, match="expects floats of shape"):
        split.linear("layers.0.qkv", x_MK, 1)
    service, plain = (OpenService(each, read_state(each, checkpoint)) for each in (split, whole))
    assert service.ranks == 3
    assert plain.ranks == 1
    assert service.chains == plain.chains
    for name in service.chains:
        torch.testing.assert_close(service.multiply(name, x_MK), plain.multiply(name, x_MK), rtol=1e-4, atol=1e-4)


def test_ranks_on_gpus_compute_one_product_at_a_time() -> None:
    """Lanes and graphs of one process know nothing of the others."""
    service: Any = SimpleNamespace(device=torch.device("cuda"), ranks=2)
    assert isinstance(engine_for(service, cuda_graphs=True), CpuEngine)


def test_gloo_listens_on_loopback_where_all_ranks_are_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "torch.distributed.init_process_group",
        lambda backend, **_: seen.append((backend, os.environ.get("GLOO_SOCKET_IFNAME"))),
    )
    store: Any = None
    for one_machine in (False, True):
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        Meeting(store, one_machine=one_machine).connect(Share(1, 2), CPU)
    assert seen == [("gloo", None), ("gloo", "lo")]

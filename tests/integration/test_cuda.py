"""The worker on a GPU. Skipped, saying so, where there is none; recorded in benchmarks/results when run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import assert_same_logits, load_llama, random_ids, reference_from, reference_logits, tiny_checkpoint
from workers import linked, packed_tiny, running_worker

from tsqp.arith import ring
from tsqp.config import EnclaveConfig
from tsqp.errors import DeviceMemoryError, InputError
from tsqp.levels import open_model, runnable
from tsqp.model.architecture import LinearGroup, read_config
from tsqp.model.linears import Linears
from tsqp.model.llama import Llama
from tsqp.model.packed import open_codes
from tsqp.model.weights import Checkpoint
from tsqp.transport.base import Buffer, Incoming
from tsqp.wire import codec, messages
from tsqp.worker.cuda import LANES, CudaEngine
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.services import ExactService

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.filterwarnings("ignore:dealer .* has no key"),
]

CUDA = torch.device("cuda:0")


@pytest.mark.parametrize("scheme", ["shm", "ipc", "tcp"])
def test_float32_logits_are_those_of_transformers(tmp_path: Path, scheme: str) -> None:
    directory = tiny_checkpoint(tmp_path / "model", attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    ids_BT = random_ids(2, 200)
    with running_worker(directory, scheme, device="cuda:0") as url, linked(url, directory) as link:
        assert link.welcome.device == "cuda:0"
        logits_BTV = Llama(read_config(directory), link.ops).prefill(ids_BT, all_logits=True)
        offloaded = Llama(read_config(directory), link.ops, offload_attention=True)
        assert_same_logits(offloaded.prefill(ids_BT, all_logits=True), logits_BTV)
    assert_same_logits(logits_BTV, reference_logits(reference_from(directory), ids_BT))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees_with_the_cpu(tmp_path: Path, dtype: str) -> None:
    """Both round to the same dtype at the same places; sums differ in order, then by a unit in the last place."""
    directory = tiny_checkpoint(tmp_path / "model")
    ids_BT = random_ids(1, 64)
    with (
        running_worker(directory, device="cuda:0", dtype=dtype) as url,
        linked(url, directory, EnclaveConfig(dtype=dtype)) as link,
    ):
        gpu_BTV = Llama(read_config(directory), link.ops).prefill(ids_BT, all_logits=True)
    cpu_BTV = load_llama(directory, codec.TORCH_DTYPES[dtype]).prefill(ids_BT, all_logits=True)
    worst = ((gpu_BTV - cpu_BTV).abs().amax(-1) / cpu_BTV.abs().amax(-1)).max().item()
    assert worst < 16 * torch.finfo(codec.TORCH_DTYPES[dtype]).eps


@contextmanager
def full_gpu() -> Iterator[None]:
    """Leave 64 MB of the GPU's memory to all processes, for the time of a ``with`` block."""
    free, _ = torch.cuda.mem_get_info(CUDA)
    block = torch.empty(free - (64 << 20), dtype=torch.uint8, device=CUDA)
    try:
        yield
    finally:
        del block
        torch.cuda.empty_cache()


def test_a_full_gpu_is_a_clear_error_and_the_worker_goes_on(tmp_path: Path) -> None:
    """2^14 x 2^14 floats are 1 GiB, and fewer than a result may have."""
    directory = tiny_checkpoint(tmp_path / "model")
    with running_worker(directory, device="cuda:0") as url, linked(url, directory) as link:
        # The libraries take their own memory at first use.
        link.ops.matmul(torch.zeros(1, 1), torch.zeros(1, 1))
        link.ops.linear("head", torch.zeros(1, 48))()
        with full_gpu():
            with pytest.raises(DeviceMemoryError, match=r"cuda:0 is out of memory during matmul"):
                link.ops.matmul(torch.zeros(1 << 14, 1), torch.zeros(1, 1 << 14))
            assert link.ops.linear("head", torch.zeros(1, 48))().shape == (1, 101)


def test_loading_onto_a_full_gpu_is_a_clear_error(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "model", vocab_size=1 << 16, hidden_size=480)
    with full_gpu(), pytest.raises(DeviceMemoryError, match="during loading"):
        Linears(read_config(directory), Checkpoint(directory), torch.float32, CUDA)


def test_exact_products_are_those_of_the_cpu() -> None:
    """The kernel must be the int8 one, and agree bit for bit, at sizes that it takes and at sizes that it must pad."""
    assert ring.kernel_for(CUDA).name == "int8 limbs"
    for rows, inputs, outputs in ((1, 576, 960), (128, 1536, 576), (17, 8, 8), (3, 1, 5), (5, 131, 7), (2, 140000, 9)):
        x_MK, w_NK = ring.adversarial(rows, inputs, outputs)
        theirs = ring.multiply(x_MK.to(CUDA), ring.lay_out(w_NK.to(CUDA))).cpu()
        assert torch.equal(theirs, ring.multiply(x_MK, ring.lay_out(w_NK)))


@pytest.mark.parametrize("level", ["verified", "masked"])
def test_the_integer_levels_give_the_bits_of_the_cpu(tmp_path: Path, level: str) -> None:
    packed = packed_tiny(tiny_checkpoint(tmp_path / "model"), tmp_path / "packed")
    ids_BT = random_ids(2, 33)
    with runnable("local", open_model(str(packed), "local"), EnclaveConfig()) as local:
        want = local.predict(ids_BT)
    with (
        running_worker(packed, device="cuda:0") as worker,
        running_worker(packed, "ipc", command="dealer", device="cuda:0") as dealer,
    ):
        dealers = (dealer,) if level == "masked" else ()
        config = EnclaveConfig(worker=worker, dealers=dealers)
        with runnable(level, open_model(str(packed), level), config) as loaded:
            assert torch.equal(loaded.predict(ids_BT), want)


def test_ids_outside_the_vocabulary_do_not_poison_the_gpu(tmp_path: Path) -> None:
    """An index out of range on the GPU would end its context for every client: it is refused on the CPU."""
    directory = tiny_checkpoint(tmp_path / "model")
    with running_worker(directory, device="cuda:0") as url, linked(url, directory) as link:
        with pytest.raises(InputError, match="outside the vocabulary"):
            link.ops.embedding(torch.tensor([10**6]))()
        assert link.ops.embedding(torch.tensor([1]))().shape == (1, 48)


Batch = list[tuple[str, torch.Tensor]]


def in_turn(engine: CudaEngine, batches: list[Batch]) -> list[torch.Tensor]:
    """Run batches of exact products through an engine as the worker's loop does, as many at a time as it takes.

    The first ``LANES`` are started before any is finished, so that each takes another lane.
    """
    replies: dict[int, torch.Tensor] = {}

    def take(frames: Sequence[Buffer]) -> None:
        reply, (frame,) = codec.decode_reply(frames)
        assert isinstance(reply, messages.Result)
        assert 0 < reply.copy_ns < reply.compute_ns
        replies[reply.id] = codec.tensor_of(reply.y, frame)

    dispatcher = Dispatcher(engine.service, "tiny", "digest")
    numbers = itertools.count()
    for batch in batches:
        while not engine.has_room:
            dispatcher.finish(engine.finished())
        requests = []
        for group, x_MK in batch:
            header = messages.LinearExact(id=next(numbers), group=group, x=codec.spec_of(x_MK))
            frames = (messages.encode(header), codec.frame_of(x_MK))
            requests.append(dispatcher.admit(Incoming(frames, legacy=False, reply=take)))
        engine.start([request for request in requests if request])
    while engine.busy:
        dispatcher.finish(engine.finished())
    return [replies[number] for number in sorted(replies)]


@pytest.mark.parametrize("graphs", [True, False])
def test_batches_that_overlap_give_the_bits_of_the_cpu(tmp_path: Path, graphs: bool) -> None:  # noqa: FBT001
    """Each small shape is captured in every lane first; then shapes come between others."""
    packed = open_codes(packed_tiny(tiny_checkpoint(tmp_path / "model"), tmp_path / "packed"))
    codes = {group.name: packed.read(group.name) for group in packed.groups}
    on_gpu = {name: ring.lay_out(w_NK.to(CUDA)) for name, w_NK in codes.items()}
    engine = CudaEngine(ExactService(packed.groups, on_gpu, CUDA), graphs=graphs)
    generator = torch.Generator().manual_seed(0)
    shapes = [(group, counts) for counts in ((1,), (1, 3), (17, 100)) for group in packed.groups[:4]]

    def batch(group: LinearGroup, counts: Sequence[int]) -> Batch:
        return [
            (group.name, torch.randint(-(1 << 31), 1 << 31, (rows, group.in_features), generator=generator).int())
            for rows in counts
        ]

    def run(batches: list[Batch]) -> None:
        results = in_turn(engine, batches)
        for (name, x_MK), y_MN in zip(itertools.chain.from_iterable(batches), results, strict=True):
            assert torch.equal(y_MN, ring.multiply(x_MK, ring.lay_out(codes[name])))

    for group, counts in shapes:
        for _ in range(4):
            run([batch(group, counts) for _ in range(LANES)])
    assert engine.captured == (LANES * 8 if graphs else 0)
    run([batch(*shape) for _ in range(5) for shape in shapes])

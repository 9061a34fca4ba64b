"""What a step costs: busy seconds of each machine, and how long it takes with a worker over a network.

Parts of a step take turns, as ``model/overlap.py`` has them: while the product of one is away, another is in the
enclave. For each request of a step that takes, for n parts,

    max( n e,  e + w,  n g,  n b )

with e the enclave's time for one part's share, w what a part's request is away, g the worker's time for it and b what
its bytes take on the link or of the thread that encrypts them, whichever is longer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tsqp.config import EXACT_LEVELS
from tsqp.model.architecture import LlamaConfig, linear_groups
from tsqp.plan.calls import asked, calls
from tsqp.plan.constants import Constants
from tsqp.plan.machines import Assumed, Gpu
from tsqp.plan.work import Product, Step, of_product, together, work

# An engine with a worker elsewhere cuts a step into so many parts (``loaded.step_groups``).
PARTS = 2
# A product of 32-bit words is four of bytes on a GPU (``worker/products.py``).
_LIMBS = 4
_OPERATIONS = 2
_WORD_BYTES = 4
# Rows of which mask products are made at a time (``mask_pool.py``).
_MASK_ROWS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is planned with.

    Attributes:
        architecture, level, dtype: the model and how it is run; the dtype counts at `open`.
        constants: of the enclave's processor.
        gpu, gpus: of the worker and of each dealer: which, and how many share the weights.
        assumed: which part of a datasheet is reached.
        link_bytes_s: of one link, each way.
        latency_s: of the network, both ways.
        dealers: parties that make masks; 0 where the enclave does, or nothing is masked.
    """

    architecture: LlamaConfig
    level: str
    dtype: str
    constants: Constants
    gpu: Gpu
    gpus: int
    assumed: Assumed
    link_bytes_s: float
    latency_s: float
    dealers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """One step; seconds and bytes.

    Attributes:
        time_s: from its beginning to its end.
        thread_s: what the enclave's engine computes, on one core.
        link_core_s: what its link threads do, over all links; of the worker's alone ``worker_link_core_s``.
        mask_core_s: what making masks takes of the enclave's cores, where it makes them.
        worker_s: how long it keeps a worker busy.
        round_trips: requests to the worker.
        sent, received: bytes to and from the worker.
        masks_received: bytes from all dealers.
    """

    time_s: float
    thread_s: float
    link_core_s: float
    worker_link_core_s: float
    mask_core_s: float
    worker_s: float
    round_trips: int
    sent: float
    received: float
    masks_received: float

    @property
    def core_s(self) -> float:
        """Of all the enclave's cores."""
        return self.thread_s + self.link_core_s + self.mask_core_s


def enclave_s(setup: Setup, step: Step) -> float:
    """Return what the engine computes for a step on one core; sending and receiving is no part of it."""
    counted = together([work(setup.architecture, setup.level, setup.dtype, step)])
    return priced(setup.constants.of(setup.level).enclave, counted)


def priced(seconds: Mapping[str, float], counted: Mapping[str, float]) -> float:
    """Return the sum of units times their seconds."""
    return sum(each * counted[unit] for unit, each in seconds.items())


def gpu_s(setup: Setup, product: Product) -> tuple[float, float]:
    """Return how long a request keeps a worker busy, and how long it takes there; seconds.

    Copies over PCIe, products and the processor's work take turns between requests, so the longest of them counts for
    the first.
    """
    gpu, assumed = setup.gpu, setup.assumed
    if setup.level in EXACT_LEVELS:
        per_s, times = 1e12 * gpu.int8_tops, _OPERATIONS * _LIMBS
    else:
        per_s, times = 1e12 * (gpu.single_tflops if setup.dtype == "float32" else gpu.half_tflops), _OPERATIONS
    computed_s = times * product.macs / (per_s * assumed.products * setup.gpus)
    read_s = product.weight_bytes / (1e9 * gpu.memory_gb_per_s * assumed.memory * setup.gpus)
    copied_s = product.bytes / (1e9 * gpu.pcie_gb_per_s * assumed.pcie)
    asked_s = assumed.request_us / 1e6
    products_s = max(computed_s, read_s)
    return max(products_s, copied_s, asked_s), products_s + copied_s + asked_s


def step_cost(setup: Setup, step: Step) -> StepCost:
    """Return what a step costs whose parts take turns.

    Args:
        setup: what is planned with.
        step: all parts together.
    """
    parts = PARTS if step.rows >= PARTS else 1
    part = Step(step.rows / parts, step.kept / parts, step.sequences / parts, step.context)
    counted, link = work(setup.architecture, setup.level, setup.dtype, part), setup.constants.link
    requests = len(counted.products)
    own_s = enclave_s(setup, part) / requests + link.trip_core_s
    time_s = busy_s = 0.0
    for product in counted.products:
        worker_s, there_s = gpu_s(setup, product)
        wire_s = product.bytes / (2 * setup.link_bytes_s)
        away_s = link.trip_s - link.trip_core_s + setup.latency_s + product.bytes * link.byte_s + 2 * wire_s + there_s
        time_s += max(
            parts * own_s, own_s + away_s, parts * worker_s, parts * max(wire_s, product.bytes * link.byte_core_s)
        )
        busy_s += parts * worker_s
    sent, received = (parts * each for each in moved(setup, part))
    masks = setup.dealers * step.rows * mask_bytes(setup.architecture) if setup.level == "masked" else 0.0
    worker_link_core_s = (sent + received) * link.byte_core_s
    return StepCost(
        time_s=time_s + setup.constants.engine_step_s,
        thread_s=parts * requests * own_s + setup.constants.engine_step_s,
        link_core_s=worker_link_core_s + masks * link.byte_core_s,
        worker_link_core_s=worker_link_core_s,
        mask_core_s=step.rows * own_mask_s(setup),
        worker_s=busy_s,
        round_trips=parts * requests,
        sent=sent,
        received=received,
        masks_received=masks,
    )


def moved(setup: Setup, step: Step) -> tuple[float, float]:
    """Return the bytes that a step sends and receives, headers included; numbers of rows may be averages."""
    sent = received = 0.0
    for call in asked(calls(setup.architecture, setup.level, setup.dtype), math.ceil(step.kept)):
        rows = step.kept if call.is_kept else step.rows
        payload, headers = call.payload(1), call.headers(math.ceil(rows))
        sent += rows * payload[0] + headers[0]
        received += rows * payload[1] + headers[1]
    return sent, received


def mask_bytes(architecture: LlamaConfig) -> int:
    """Return the bytes of the mask products of one row: what each dealer sends for it."""
    return _WORD_BYTES * sum(group.rows for group in linear_groups(architecture))


def mask_words(architecture: LlamaConfig) -> int:
    """Return the words of keystream that one row is hidden by."""
    return sum(group.in_features for group in linear_groups(architecture))


def own_mask_s(setup: Setup) -> float:
    """Return what a row's mask products take of an enclave's core that makes them itself; else 0."""
    if setup.level != "masked" or setup.dealers:
        return 0.0
    constants = setup.constants
    made_s = sum(constants.of("masked").worker.time_s(of_product(each)) for each in _mask_block(setup.architecture))
    return made_s / _MASK_ROWS + constants.mask_word_s * mask_words(setup.architecture)


def dealer_s(setup: Setup) -> float:
    """Return how long a row's mask products keep a dealer busy: its GPU, PCIe, or the processor that makes masks."""
    gpu_bound_s = sum(gpu_s(setup, product)[0] for product in _mask_block(setup.architecture)) / _MASK_ROWS
    return max(gpu_bound_s, mask_words(setup.architecture) * setup.constants.mask_word_s)


def _mask_block(architecture: LlamaConfig) -> list[Product]:
    """Return the products of a block of mask rows."""
    found = []
    for group in linear_groups(architecture):
        weights, words = group.rows * group.in_features, _MASK_ROWS * (group.rows + group.in_features)
        found.append(Product(words, _WORD_BYTES * words, weights, _MASK_ROWS * weights))
    return found

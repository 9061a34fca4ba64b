"""Exact products on the CPU against inexact ones, by shape and number of threads. Prints JSON.

python benchmarks/exact_gemm.py [--rounds 40] [--shape 128x576x3072 ...] > benchmarks/results/exact-gemm-DATE.json

Kernels take turns within each round; medians. Exact kernels multiply int32 words by int8 codes modulo 2^32, the others
float32 by float32. oneDNN multiplies by weights in its own layout, as a worker at `open` does.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tsqp.threads import share_cores, using_threads

share_cores()

import msgspec  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from tsqp.arith import native, ring  # noqa: E402
from tsqp.bench import hardware  # noqa: E402
from tsqp.model import linears  # noqa: E402

# Rows, inputs, outputs. float64 is left out of the largest: it takes seconds.
SHAPES = ((128, 576, 3072), (1, 2048, 8192), (128, 1536, 576), (16, 576, 3072), (1024, 576, 3072))
FLOAT64_MOST = 1 << 28
THREADS = (2, 1)
WARM_UP = 3
FLOAT32 = "torch float32"
Product = Callable[[], Tensor]
Shape = tuple[int, ...]


def kernels() -> list[ring.Kernel]:
    return [
        *(ring.NativeKernel(native.Kernels(name)) for name in reversed(native.available())),
        ring.LimbKernel(),
        ring.Float64Kernel(),
    ]


def products(rows: int, inputs: int, outputs: int) -> dict[str, Product]:
    """Return what is measured; every exact product is compared with the others first."""
    generator = torch.Generator().manual_seed(0)
    x_MK = torch.randint(-(1 << 31), 1 << 31, (rows, inputs), generator=generator).int()
    w_NK = torch.randint(-127, 128, (outputs, inputs), generator=generator).to(torch.int8)
    calls: dict[str, Product] = {}
    for kernel in kernels():
        if kernel.name != "float64" or rows * inputs * outputs <= FLOAT64_MOST:
            calls[kernel.name] = partial(ring.multiply, x_MK, ring.lay_out(w_NK, kernel))
    first, *others = (call() for call in calls.values())
    assert all(torch.equal(first, other) for other in others)
    real_MK, real_NK = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    calls[FLOAT32] = lambda: functional.linear(real_MK, real_NK)
    if linears.onednn_computes(torch.float32):
        packed_NK = linears._onednn_layout(real_NK)  # noqa: SLF001
        calls["oneDNN float32"] = lambda: linears.product(real_MK, packed_NK, None)
    return calls


def written(shape: Shape) -> str:
    return "x".join(map(str, shape))


def read(text: str) -> Shape:
    rows, inputs, outputs = map(int, text.split("x"))
    return rows, inputs, outputs


def measure_shape(calls: dict[str, Product], rounds: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + WARM_UP):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn >= WARM_UP:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(each) for name, each in taken.items()}


def measure(shapes: Sequence[Shape], rounds: int) -> dict[str, Any]:
    """Measure every shape on each number of threads."""
    medians: dict[str, dict[str, float]] = {}
    for threads in THREADS:
        with using_threads(threads):
            for shape in shapes:
                label = f"{written(shape).replace('x', ' x ')}, {threads} thread{'s' if threads > 1 else ''}"
                medians[label] = measure_shape(products(*shape), rounds)
    return {
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "commit": hardware.commit(),
        "command": f"python benchmarks/exact_gemm.py --rounds {rounds} --shape {' '.join(map(written, shapes))}",
        "hardware": msgspec.to_builtins(hardware.describe()),
        "shapes": "rows x inputs x outputs",
        "warm_up": WARM_UP,
        "rounds": rounds,
        "median_us": {
            label: {name: round(each * 1e6, 1) for name, each in row.items()} for label, row in medians.items()
        },
        "times_torch_float32": {
            label: {name: round(each / row[FLOAT32], 2) for name, each in row.items()} for label, row in medians.items()
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--shape", type=read, nargs="+", default=SHAPES, help="rows x inputs x outputs: 128x576x3072")
    asked = parser.parse_args()
    print(json.dumps(measure(asked.shape, asked.rounds), indent=2))

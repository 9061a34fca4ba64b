"""Float32 products as a worker makes them on CPUs: the native kernel, and oneDNN and a copy to the slot. Prints JSON.

python benchmarks/float_gemm.py [--rounds 15] > benchmarks/results/float-gemm-DATE.json

As in a prefill of the bundled model, each product's weights were last read a model ago: layers of four products follow
each other, together larger than the caches. Kernels take turns, one pass over all layers each; medians and minima of a
product's mean in a pass. What is asked for is y in the client's memory. The native kernel writes it there; oneDNN
returns new memory, which is copied.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from tsqp.threads import share_cores, using_threads

share_cores()

import msgspec  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from tsqp.arith import native, panels  # noqa: E402
from tsqp.bench import hardware  # noqa: E402
from tsqp.model import linears  # noqa: E402

# Inputs and outputs of a layer's products; 30 layers are 425 MB.
SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576))
LAYERS = 30
ROWS = (128, 16, 1)
THREADS = (2, 1)
WARM_UP = 1
ALL = "all"
ONEDNN, COPIED = "oneDNN", "oneDNN and copy"
Shape = tuple[int, int]
Multiply = Callable[[Tensor, Tensor, Tensor], object]


def onednn(x_MK: Tensor, packed_NK: Tensor, y_MN: Tensor) -> None:  # noqa: ARG001  of every kernel
    linears.product(x_MK, packed_NK, None)


def onednn_copied(x_MK: Tensor, packed_NK: Tensor, y_MN: Tensor) -> None:
    y_MN.copy_(linears.product(x_MK, packed_NK, None))


def by_native(kernels: native.Kernels) -> Multiply:
    return lambda x_MK, laid_out, y_MN: kernels.multiply_floats(x_MK, laid_out, None, y_MN)


def make_weights() -> tuple[list[tuple[Shape, Tensor]], list[tuple[Shape, Tensor]]]:
    """Return every product's weights in panels, and in oneDNN's layout."""
    generator = torch.Generator().manual_seed(0)
    in_panels, packed = [], []
    for shape in SHAPES * LAYERS:
        w_NK = torch.randn(shape[1], shape[0], generator=generator)
        in_panels.append((shape, panels.lay_out(w_NK)))
        packed.append((shape, linears._onednn_layout(w_NK)))  # noqa: SLF001
    return in_panels, packed


def one_pass(multiply: Multiply, weights: list[tuple[Shape, Tensor]], rows: int) -> dict[str, float]:
    """Multiply through all layers; return microseconds per product, by shape and for all."""
    generator = torch.Generator().manual_seed(rows)
    x = {shape: torch.randn(rows, shape[0], generator=generator) for shape in SHAPES}
    y = {shape: torch.zeros(rows, shape[1]) for shape in SHAPES}
    taken = dict.fromkeys(SHAPES, 0.0)
    for shape, laid_out in weights:
        started = time.perf_counter()
        multiply(x[shape], laid_out, y[shape])
        taken[shape] += time.perf_counter() - started
    by_shape = {f"{inputs} x {outputs}": taken[inputs, outputs] / LAYERS * 1e6 for inputs, outputs in SHAPES}
    return {**by_shape, ALL: sum(taken.values()) * 1e6}


def measure(rounds: int) -> dict[str, Any]:
    """Measure every kernel for each number of rows and threads."""
    in_panels, packed = make_weights()
    calls: dict[str, tuple[Multiply, list[tuple[Shape, Tensor]]]] = {
        f"native {name}": (by_native(native.Kernels(name)), in_panels)
        for name in reversed(native.available())
        if native.Kernels(name).multiplies_floats
    }
    calls |= {ONEDNN: (onednn, packed), COPIED: (onednn_copied, packed)}
    results: dict[str, Any] = {}
    for threads in THREADS:
        for rows in ROWS:
            passes: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
            with using_threads(threads):
                for turn in range(rounds + WARM_UP):
                    for name, (multiply, weights) in calls.items():
                        taken = one_pass(multiply, weights, rows)
                        if turn >= WARM_UP:
                            passes[name].append(taken)
            results[f"{rows} rows, {threads} thread{'s' if threads > 1 else ''}"] = summary(passes)
    return {
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "commit": hardware.commit(),
        "command": f"python benchmarks/float_gemm.py --rounds {rounds}",
        "hardware": msgspec.to_builtins(hardware.describe()),
        "shapes": f"inputs x outputs, one product; {ALL}: {LAYERS} layers of them",
        "warm_up": WARM_UP,
        "rounds": rounds,
        "results": results,
    }


def summary(passes: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return medians, minima, and the median ratio to oneDNN with the copy within a round."""
    return {
        name: {
            "median_us": {label: round(statistics.median(each[label] for each in mine), 1) for label in mine[0]},
            "min_us": {label: round(min(each[label] for each in mine), 1) for label in mine[0]},
            "times_onednn_and_copy": {
                label: round(
                    statistics.median(a[label] / b[label] for a, b in zip(mine, passes[COPIED], strict=True)), 2
                )
                for label in mine[0]
            },
        }
        for name, mine in passes.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    print(json.dumps(measure(parser.parse_args().rounds), indent=2))

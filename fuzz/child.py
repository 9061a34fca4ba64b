"""Fuzzes one target in a process of its own, as libFuzzer's main program: ``python -m fuzz.child TARGET OPTIONS``.

An input that crashes is kept under fuzz/crashes, one for each place that raises, and fuzzing goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import sys
import traceback
from collections.abc import Callable

import atheris

from fuzz import targets

# Half of all mutations are libFuzzer's own.
_STRUCTURED = 0.5


def main() -> None:
    """Run until libFuzzer has had enough; it ends the process."""
    name = sys.argv[1]
    logging.disable()
    with atheris.instrument_imports(include=["tsqp", "gguf"]):
        target = targets.load(name)
    for path in targets.kept_inputs(name):  # what is made once, such as a model, is made before anything is counted
        with contextlib.suppress(Exception):
            target.run(path.read_bytes())
    structured = getattr(target, "mutated", None)
    options = {"custom_mutator": _mutator(structured)} if structured else {}
    atheris.Setup([sys.argv[0], *sys.argv[2:]], _once(name, target.run), **options)
    atheris.Fuzz()


def _mutator(structured: Callable[[bytes, random.Random], bytes]) -> Callable[[bytes, int, int], bytes]:
    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < _STRUCTURED:
            return structured(bytes(data), rng)[:max_size]
        return bytes(atheris.Mutate(data, len(data)))

    return mutate


def _once(name: str, run: Callable[[bytes], None]) -> Callable[[bytes], None]:
    seen: set[tuple[object, ...]] = set()

    def once(data: bytes) -> None:
        try:
            run(data)
        except BaseException as error:  # a panic of a Rust library is none of Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = (type(error).__name__, last.filename, last.lineno)
            if where in seen:
                return
            seen.add(where)
            folder = targets.CRASHES / name
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / hashlib.sha256(data).hexdigest()[:16]
            path.write_bytes(data)
            print(f"CRASH {path.name}: {where}", file=sys.stderr, flush=True)
            traceback.print_exc()

    return once


if __name__ == "__main__":
    main()

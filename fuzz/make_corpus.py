"""Writes the committed corpus anew from valid inputs: ``python -m fuzz.make_corpus [TARGET ...]``."""

from __future__ import annotations

import sys

from fuzz import targets


def main() -> None:
    """Write the seeds of the targets named, or of all."""
    for name in sys.argv[1:] or targets.MODULES:
        folder = targets.CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for seed, data in targets.load(name).seeds().items():
            (folder / seed).write_bytes(data)


if __name__ == "__main__":
    main()

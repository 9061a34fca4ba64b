"""Prints an enclave's size and threads as definitions for gramine-manifest: those given, else what tsqp size says."""

from __future__ import annotations

import argparse

from tsqp.cli.size import report_of
from tsqp.config import EnclaveConfig, EngineConfig

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--level", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--enclave-size", default="")
    parser.add_argument("--max-threads", default="")
    asked = parser.parse_args()
    size, threads = asked.enclave_size, asked.max_threads
    if not size or not threads:
        config = EnclaveConfig(model=asked.model, level=asked.level, threads=asked.threads)
        report = report_of(config, EngineConfig())
        size, threads = size or report.enclave_size, threads or report.max_threads
    print(f"-Denclave_size={size} -Dmax_threads={threads}")

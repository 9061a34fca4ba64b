"""Run the enclave's side of a prefill against the worker that server.py started."""

from tsqp.published import split_runner

PREFILL_TOKEN_LENGTH = 128

if __name__ == "__main__":
    split_runner(PREFILL_TOKEN_LENGTH)

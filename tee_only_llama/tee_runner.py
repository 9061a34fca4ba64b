"""Run the whole model in the enclave process: the baseline for tee_gpu/tee_runner.py."""

from tsqp.published import local_runner

PREFILL_TOKEN_LENGTH = 128

if __name__ == "__main__":
    local_runner(PREFILL_TOKEN_LENGTH)

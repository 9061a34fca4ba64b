"""What is said of a model's file that cannot be read."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tsqp.errors import WeightsError

# Gramine shows it in every enclave, and outside of SGX too.
_GRAMINE_KEYS = Path("/dev/attestation/keys")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system says of a file, or of a directory's, into an error of ours.

    Gramine refuses a file of an encrypted mount with EACCES, already when it is looked for, where its key is missing or
    is not the one that it was encrypted with.

    Raises:
        WeightsError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        why = ""
        if error.errno == errno.EACCES and _GRAMINE_KEYS.is_dir():
            why = (
                " On an encrypted mount that means that the enclave has no key for it, or not the one that it was "
                "encrypted with: compare the key that is provisioned with the one given to gramine-sgx-pf-crypt."
            )
        raise WeightsError(f"cannot read {error.filename or path}: {error.strerror or error}.{why}") from error

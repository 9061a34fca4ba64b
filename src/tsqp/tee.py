"""Whether this process runs inside a trusted execution environment, as far as the system tells."""

from __future__ import annotations

from pathlib import Path

_GRAMINE_TYPE = Path("/dev/attestation/attestation_type")
_TDX_GUEST = Path("/dev/tdx_guest")


def tee_name() -> str | None:
    """Return the environment's name, or None outside of one.

    It only decides what is allowed while developing: inside one, links that carry secrets must be encrypted. Gramine
    shows the first path to SGX enclaves alone; the second is the guest device of a TDX VM.
    """
    if _GRAMINE_TYPE.exists():
        return "SGX"
    return "TDX" if _TDX_GUEST.exists() else None

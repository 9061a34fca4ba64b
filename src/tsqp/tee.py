"""Whether this process runs inside a trusted execution environment, as far as the system tells."""

from __future__ import annotations

from pathlib import Path

_GRAMINE_TYPE = Path("/dev/attestation/attestation_type")
_TDX_GUEST = Path("/dev/tdx_guest")
_CPUINFO = Path("/proc/cpuinfo")
_TDX_FLAG = "tdx_guest"


def tee_name() -> str | None:
    """Return the environment's name, or None outside of one.

    It only decides what is allowed while developing: inside one, links that carry secrets must be encrypted. Gramine
    shows the first path to SGX enclaves alone; the second is the guest device of a TDX
    VM, which containers in it may lack: the processor then still says it.
    """
    if _GRAMINE_TYPE.exists():
        return "SGX"
    return "TDX" if _TDX_GUEST.exists() or _TDX_FLAG in _cpu_flags() else None


def _cpu_flags() -> list[str]:
    try:
        text = _CPUINFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    return next((line.partition(":")[2].split() for line in text.splitlines() if line.startswith("flags")), [])

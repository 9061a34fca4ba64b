"""What a client accepts, in a file of TOML: measurements, TCB status, claims, and where collateral comes from.

docs/attestation.md describes every key. A policy that pins no measurement would accept any code, so it is refused, as
is every key that is not known: a misspelt one would pin nothing.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsqp.attest.claims import Claims
from tsqp.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STATUSES = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
)
_SGX_BYTES, _TDX_BYTES = 32, 48
_MAX_U16 = 0xFFFF
_RTMRS = ("rtmr0", "rtmr1", "rtmr2", "rtmr3")
_CLAIMS = tuple(Claims.__struct_fields__)
_LIST_CLAIMS = ("workers", "dealers")
_SECTIONS = {
    "sgx": ("mrenclave", "mrsigner", "isv_prod_id", "min_isv_svn"),
    "tdx": ("mrtd", *_RTMRS),
    "tcb": ("allowed",),
    "claims": _CLAIMS,
    "collateral": ("file", "pccs", "root_ca"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SgxPolicy:
    """Which SGX enclaves are accepted: one of some builds, or any of one signer's from a version on.

    Attributes:
        mrenclave: hexadecimal; any of them. Empty if the signer decides.
        mrsigner: hexadecimal; empty if the build decides.
        isv_prod_id: the signer's number of the product.
        min_isv_svn: the lowest security version.
    """

    mrenclave: tuple[str, ...] = ()
    mrsigner: str = ""
    isv_prod_id: int = 0
    min_isv_svn: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TdxPolicy:
    """Which TDX guests are accepted: the firmware that was loaded, and what it measured of kernel and system.

    Attributes:
        mrtd: hexadecimal; any of them.
        rtmrs: of each register that is pinned, by name, any of these values.
    """

    mrtd: tuple[str, ...]
    rtmrs: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a client accepts.

    Attributes:
        sgx: None if no SGX enclave is.
        tdx: None if no TDX guest is.
        statuses: of the platform's TCB.
        claims: of each claim that is pinned, by name, any of these values.
        collateral_file: JSON, as PCCS tools store it; None to ask a PCCS.
        pccs: its address; None for a file.
        root_ca: DER certificate to trust instead of Intel's, for tests; None for Intel's.
    """

    sgx: SgxPolicy | None
    tdx: TdxPolicy | None
    statuses: tuple[str, ...] = ("UpToDate",)
    claims: Mapping[str, tuple[object, ...]] = dataclasses.field(default_factory=dict)
    collateral_file: Path | None = None
    pccs: str | None = None
    root_ca: Path | None = None


def read_policy(path: Path) -> Policy:
    """Read a policy.

    Args:
        path: of the file; paths in it are relative to where it lies.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown or malformed, or no measurement is pinned.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the policy {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"the policy {path} is not TOML: {error}.") from error
    return _Reader(str(path), raw).policy(path.parent)


class _Reader:
    """Reads tables and says which key is wrong."""

    def __init__(self, path: str, raw: dict[str, Any]) -> None:
        self._path = path
        self._refuse_unknown(raw, _SECTIONS, "")
        for name, keys in _SECTIONS.items():
            if not isinstance(table := raw.get(name, {}), dict):
                raise self._wrong(name, "a table", table)
            self._refuse_unknown(table, keys, f"{name}.")
        self._raw = raw

    def policy(self, directory: Path) -> Policy:
        sgx, tdx = self._sgx(), self._tdx()
        if sgx is None and tdx is None:
            raise ConfigError(
                f"the policy {self._path} pins no measurement, so any code would be accepted: give sgx.mrenclave, "
                "sgx.mrsigner with its isv_prod_id, or tdx.mrtd with its rtmr registers."
            )
        file, pccs, root = (self._text("collateral", name) for name in _SECTIONS["collateral"])
        if (file is None) == (pccs is None):
            raise ConfigError(f"the policy {self._path}: give collateral.file or collateral.pccs, and not both.")
        return Policy(
            sgx=sgx,
            tdx=tdx,
            statuses=self._statuses(),
            claims=self._claims(),
            collateral_file=None if file is None else directory / file,
            pccs=pccs,
            root_ca=None if root is None else directory / root,
        )

    def _sgx(self) -> SgxPolicy | None:
        if "sgx" not in self._raw:
            return None
        builds = self._measurements("sgx", "mrenclave", _SGX_BYTES)
        signers = self._measurements("sgx", "mrsigner", _SGX_BYTES)
        if bool(builds) == bool(signers) or len(signers) > 1:
            raise ConfigError(f"the policy {self._path}: sgx pins either mrenclave, one or several, or one mrsigner.")
        if builds:
            for name in ("isv_prod_id", "min_isv_svn"):
                if name in self._raw["sgx"]:
                    raise ConfigError(f"the policy {self._path}: sgx.{name} goes with mrsigner, not with mrenclave.")
            return SgxPolicy(mrenclave=builds)
        if "isv_prod_id" not in self._raw["sgx"] or "min_isv_svn" not in self._raw["sgx"]:
            raise ConfigError(
                f"the policy {self._path}: sgx.mrsigner alone accepts all that its owner ever signed: give isv_prod_id "
                "and min_isv_svn too."
            )
        prod_id, svn = (self._number("sgx", name) for name in ("isv_prod_id", "min_isv_svn"))
        return SgxPolicy(mrsigner=signers[0], isv_prod_id=prod_id, min_isv_svn=svn)

    def _tdx(self) -> TdxPolicy | None:
        if "tdx" not in self._raw:
            return None
        rtmrs = {name: self._measurements("tdx", name, _TDX_BYTES) for name in _RTMRS if name in self._raw["tdx"]}
        mrtd = self._measurements("tdx", "mrtd", _TDX_BYTES)
        if not mrtd or not {"rtmr1", "rtmr2"} <= rtmrs.keys():
            raise ConfigError(
                f"the policy {self._path}: tdx needs mrtd, the firmware, and rtmr1 and rtmr2, kernel and system: what "
                "is not pinned may be anything."
            )
        return TdxPolicy(mrtd=mrtd, rtmrs=rtmrs)

    def _statuses(self) -> tuple[str, ...]:
        allowed = self._texts("tcb", "allowed") if "allowed" in self._raw.get("tcb", {}) else ("UpToDate",)
        for status in allowed:
            if status not in STATUSES:
                raise ConfigError(
                    f"the policy {self._path}: tcb.allowed has {status!r}; expected some of {', '.join(STATUSES)}."
                )
        return allowed

    def _claims(self) -> dict[str, tuple[object, ...]]:
        """Read values of claims; of a list of keys, one list."""
        found: dict[str, tuple[object, ...]] = {}
        for name in self._raw.get("claims", {}):
            values = self._texts("claims", name, may_be_empty=name in _LIST_CLAIMS)
            found[name] = (values,) if name in _LIST_CLAIMS else values
        return found

    def _measurements(self, section: str, name: str, size: int) -> tuple[str, ...]:
        if name not in self._raw[section]:
            return ()
        values = self._texts(section, name)
        for value in values:
            if not re.fullmatch(f"[0-9a-fA-F]{{{2 * size}}}", value):
                raise self._wrong(f"{section}.{name}", f"{2 * size} hexadecimal digits", value)
        return tuple(value.lower() for value in values)

    def _texts(self, section: str, name: str, *, may_be_empty: bool = False) -> tuple[str, ...]:
        """Read a text or a list of texts."""
        value = self._raw[section][name]
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(each, str) for each in values) or not (values or may_be_empty):
            raise self._wrong(f"{section}.{name}", "a text or a list of texts", value)
        return tuple(values)

    def _text(self, section: str, name: str) -> str | None:
        value = self._raw.get(section, {}).get(name)
        if value is not None and (not isinstance(value, str) or not value):
            raise self._wrong(f"{section}.{name}", "a text", value)
        return value

    def _number(self, section: str, name: str) -> int:
        value = self._raw[section][name]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_U16:
            raise self._wrong(f"{section}.{name}", f"a number from 0 to {_MAX_U16}", value)
        return value

    def _refuse_unknown(
        self, table: Mapping[str, object], known: Mapping[str, object] | tuple[str, ...], at: str
    ) -> None:
        for key in table:
            if key not in known:
                raise ConfigError(
                    f"the policy {self._path} has an unknown key {at}{key}: known are {', '.join(known)}."
                )

    def _wrong(self, key: str, expected: str, value: object) -> ConfigError:
        return ConfigError(f"the policy {self._path}: {key} is {value!r}; expected {expected}.")

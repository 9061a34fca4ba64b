"""Policies: what they pin, and that nothing which looks like pinning is taken for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tsqp.attest.policy import Policy, SgxPolicy, TdxPolicy, read_policy
from tsqp.errors import ConfigError

ENCLAVE, OTHER, SIGNER = "1a" * 32, "2B" * 32, "33" * 32
MRTD, RTMR1, RTMR2 = "44" * 48, "55" * 48, "66" * 48
FROM_FILE = '[collateral]\nfile = "collateral.json"\n'
BUILD = f'[sgx]\nmrenclave = "{ENCLAVE}"\n'
GUEST = f'[tdx]\nmrtd = ["{MRTD}"]\nrtmr1 = "{RTMR1}"\nrtmr2 = "{RTMR2}"\n'


def policy(directory: Path, text: str) -> Policy:
    file = directory / "policy.toml"
    file.write_text(text, encoding="utf-8")
    return read_policy(file)


def test_builds_of_an_enclave(tmp_path: Path) -> None:
    found = policy(tmp_path, f'[sgx]\nmrenclave = ["{ENCLAVE}", "{OTHER}"]\n{FROM_FILE}')
    assert found.sgx == SgxPolicy(mrenclave=(ENCLAVE, OTHER.lower()))
    assert (found.tdx, found.statuses, found.claims) == (None, ("UpToDate",), {})
    assert (found.collateral_file, found.pccs, found.root_ca) == (tmp_path / "collateral.json", None, None)


def test_a_signers_product_from_a_version_on(tmp_path: Path) -> None:
    text = (
        f'[sgx]\nmrsigner = "{SIGNER}"\nisv_prod_id = 7\nmin_isv_svn = 3\n[collateral]\npccs = "https://pccs.example"\n'
    )
    found = policy(tmp_path, text)
    assert found.sgx == SgxPolicy(mrsigner=SIGNER, isv_prod_id=7, min_isv_svn=3)
    assert (found.collateral_file, found.pccs) == (None, "https://pccs.example")


def test_guests_statuses_claims_and_another_root(tmp_path: Path) -> None:
    text = f"""{GUEST}
[tcb]
allowed = ["UpToDate", "SWHardeningNeeded"]
[claims]
level = ["masked", "verified"]
dealers = ["k1", "k2"]
workers = []
{FROM_FILE}root_ca = "/etc/root.pem"
"""
    found = policy(tmp_path, text)
    assert found.tdx == TdxPolicy(mrtd=(MRTD,), rtmrs={"rtmr1": (RTMR1,), "rtmr2": (RTMR2,)})
    assert found.statuses == ("UpToDate", "SWHardeningNeeded")
    assert found.claims == {"level": ("masked", "verified"), "dealers": (("k1", "k2"),), "workers": ((),)}
    assert found.root_ca == Path("/etc/root.pem")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "pins no measurement, so any code would be accepted"),
        (FROM_FILE, "pins no measurement"),
        (f'[claims]\nlevel = "masked"\n{FROM_FILE}', "pins no measurement"),
        (f"[sgx]\n{FROM_FILE}", "sgx pins either mrenclave, one or several, or one mrsigner"),
        (f"[sgx]\nmrenclave = []\n{FROM_FILE}", r"sgx.mrenclave is \[\]; expected a text or a list of texts"),
        (f'[sgx]\nmrenclave = "{ENCLAVE}"\nmrsigner = "{SIGNER}"\n{FROM_FILE}', "either mrenclave"),
        (f'[sgx]\nmrsigner = "{SIGNER}"\n{FROM_FILE}', "accepts all that its owner ever signed"),
        (f'[sgx]\nmrsigner = "{SIGNER}"\nisv_prod_id = 1\n{FROM_FILE}', "give isv_prod_id and min_isv_svn too"),
        (f'[sgx]\nmrenclave = "{ENCLAVE}"\nmin_isv_svn = 1\n{FROM_FILE}', "min_isv_svn goes with mrsigner"),
        (
            f'[sgx]\nmrsigner = "{SIGNER}"\nisv_prod_id = 65536\nmin_isv_svn = 0\n{FROM_FILE}',
            "isv_prod_id is 65536; expected a number from 0 to 65535",
        ),
        (f'[sgx]\nmrsigner = "{SIGNER}"\nisv_prod_id = true\nmin_isv_svn = 0\n{FROM_FILE}', "isv_prod_id is True"),
        (f'[sgx]\nmrenclave = "{ENCLAVE}00"\n{FROM_FILE}', "expected 64 hexadecimal digits"),
        (f'[sgx]\nmrenclave = "{ENCLAVE[:-1]}g"\n{FROM_FILE}', "expected 64 hexadecimal digits"),
        (f"[sgx]\nmrenclave = 5\n{FROM_FILE}", "mrenclave is 5; expected a text"),
        (f'[tdx]\nmrtd = "{MRTD}"\n{FROM_FILE}', "rtmr1 and rtmr2, kernel and system"),
        (f'[tdx]\nmrtd = "{ENCLAVE}"\nrtmr1 = "{RTMR1}"\nrtmr2 = "{RTMR2}"\n{FROM_FILE}', "96 hexadecimal digits"),
        (f'{BUILD}mrenclav = "x"\n{FROM_FILE}', "unknown key sgx.mrenclav: known are mrenclave"),
        (f'{BUILD}{FROM_FILE}[claim]\nlevel = "masked"\n', "unknown key claim: known are sgx"),
        (f'{BUILD}{FROM_FILE}[claims]\nlvl = "masked"\n', "unknown key claims.lvl"),
        (f"{BUILD}{FROM_FILE}[claims]\nlevel = []\n", "claims.level is"),
        (f"{BUILD}{FROM_FILE}[claims]\nlevel = 5\n", "claims.level is 5"),
        (f'{BUILD}{FROM_FILE}[tcb]\nallowed = ["Revoked"]\n', "tcb.allowed has 'Revoked'; expected some of UpToDate"),
        (f"{BUILD}{FROM_FILE}[tcb]\nallowed = []\n", "tcb.allowed is"),
        (BUILD, "give collateral.file or collateral.pccs, and not both"),
        (f'{BUILD}{FROM_FILE}pccs = "https://x"\n', "and not both"),
        (f"{BUILD}[collateral]\nfile = 5\n", "collateral.file is 5; expected a text"),
        (f'sgx = "{ENCLAVE}"\n{FROM_FILE}', "sgx is .*; expected a table"),
        ("[sgx", "is not TOML"),
    ],
)
def test_what_pins_nothing_or_is_misspelt_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        policy(tmp_path, text)
    assert str(tmp_path / "policy.toml") in str(raised.value)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the policy .*: No such file"):
        read_policy(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_policy(tmp_path / "binary.toml")

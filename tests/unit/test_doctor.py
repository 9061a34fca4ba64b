"""What the doctor says about native kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tsqp import doctor
from tsqp.arith import native


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    native.kernels.cache_clear()
    monkeypatch.delenv(native.VARIABLE, raising=False)
    yield
    monkeypatch.undo()
    native.kernels.cache_clear()


def test_the_instruction_set_is_named() -> None:
    check = doctor._native()
    assert (check.status, check.found) == ("ok", f"built, {native.available()[-1]}")


def test_what_is_not_built_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_extension", None)
    check = doctor._native()
    assert (check.status, check.found) == ("note", "not built")
    assert "install a C compiler" in (check.advice or "")


def test_what_is_switched_off_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "off")
    check = doctor._native()
    assert check.status == "note"
    assert "not used" in check.found
    assert "TSQP_NATIVE=off" in (check.advice or "")


def test_an_instruction_set_that_is_not_there_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "avx9")
    check = doctor._native()
    assert check.status == "fail"
    assert "avx9" in (check.advice or "")

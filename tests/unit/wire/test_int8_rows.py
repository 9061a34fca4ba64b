"""Activations in eight bits: within half a step of what was encoded, whatever the bytes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsqp.errors import ProtocolError
from tsqp.wire import int8_rows


@given(rows=st.integers(1, 5), columns=st.integers(1, 40), exponent=st.integers(-30, 30), seed=st.integers(0, 1 << 30))
def test_decoded_is_within_half_a_step(rows: int, columns: int, exponent: int, seed: int) -> None:
    x_MK = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    coded = int8_rows.encode(x_MK)
    assert (coded.dtype, tuple(coded.shape)) == (torch.int8, (rows, columns + 4))
    step_M1 = x_MK.abs().amax(dim=1, keepdim=True) / 127
    assert ((int8_rows.decode(coded) - x_MK).abs() <= 0.5 * step_M1 * (1 + 1e-5)).all()


def test_each_token_has_a_scale_of_its_own() -> None:
    x_MK = torch.tensor([[1.0, -0.5], [1e6, 1.0]])
    decoded = int8_rows.decode(int8_rows.encode(x_MK))
    assert decoded[0].tolist() == pytest.approx([1.0, -0.5], abs=0.005)
    assert decoded[1].tolist() == pytest.approx([1e6, 0.0], abs=4000)


def test_the_example_of_the_page_is_what_travels() -> None:
    rows = int8_rows.encode(torch.tensor([[1.0, -0.5, 0.0]])).view(torch.uint8).numpy().tobytes().hex(" ")
    page = Path(__file__).parents[3] / "docs/protocol.md"
    assert f"as an example:\n\n    {rows}\n" in page.read_text(encoding="utf-8")


@given(rows=st.integers(0, 4), inputs=st.integers(1, 9), hidden=st.integers(1, 9), shift=st.integers(0, 3))
def test_a_stream_beside_keeps_its_small_values(rows: int, inputs: int, hidden: int, shift: int) -> None:
    generator = torch.Generator().manual_seed(rows + inputs)
    x_MK, stream_MD = torch.randn(rows, inputs, generator=generator), torch.randn(rows, hidden, generator=generator)
    stream_MD[:, 0] *= 1e6
    coded = int8_rows.encode_beside(x_MK, stream_MD)
    assert (coded.dtype, tuple(coded.shape)) == (torch.int8, (rows, inputs + 4 + 2 * hidden))
    anywhere = torch.empty(coded.numel() + shift, dtype=torch.int8)[shift:].view(coded.shape).copy_(coded)
    decoded = int8_rows.decode_beside(anywhere, hidden)
    assert torch.equal(decoded[:, :inputs], int8_rows.decode(int8_rows.encode(x_MK)))
    assert torch.equal(decoded[:, inputs:], stream_MD.bfloat16().float())


def test_parts_have_scales_of_their_own() -> None:
    y_MN = torch.tensor([[1e6, 2.0, 1.0, 1e-6]])
    first, second, third = int8_rows.encode_parts(y_MN, (1, 2, 1)).split((5, 6, 5), dim=1)
    assert int8_rows.decode(first).tolist() == [[pytest.approx(1e6)]]
    assert int8_rows.decode(second).tolist() == [[2.0, pytest.approx(1.0, abs=0.01)]]
    assert int8_rows.decode(third).tolist() == [[pytest.approx(1e-6)]]


def test_no_rows_are_no_rows() -> None:
    coded = int8_rows.encode(torch.zeros(0, 3))
    assert tuple(coded.shape) == (0, 7)
    assert tuple(int8_rows.decode(coded).shape) == (0, 3)


def test_zeros_stay_zeros() -> None:
    assert int8_rows.decode(int8_rows.encode(torch.zeros(2, 3))).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_not_become_a_number(value: float) -> None:
    x_MK = torch.ones(2, 3)
    x_MK[1, 1] = value
    decoded = int8_rows.decode(int8_rows.encode(x_MK))
    assert decoded[0].tolist() == [1.0] * 3
    assert decoded[1].isnan().all()


@given(st.binary(min_size=10, max_size=60).filter(lambda raw: len(raw) % 10 == 0))
def test_any_bytes_decode(raw: bytes) -> None:
    rows = torch.frombuffer(bytearray(raw), dtype=torch.int8).view(-1, 10)
    assert int8_rows.decode(rows).shape == (len(rows), 6)


@pytest.mark.parametrize(
    "rows", [torch.zeros(2, 4, dtype=torch.int8), torch.zeros(2, 9), torch.zeros(9, dtype=torch.int8)]
)
def test_what_are_no_such_rows_is_refused(rows: torch.Tensor) -> None:
    with pytest.raises(ProtocolError, match="codes and 4 bytes of scale"):
        int8_rows.decode(rows)

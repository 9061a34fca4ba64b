"""Finds masks used twice: equal messages for equal prompts, and differences of messages that are too small.

Shapes: M rows, K words per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsqp.audit.attacks.uniformity import byte_p_value


def repeated_rows(first_MK: Tensor, second_MK: Tensor) -> int:
    """Count the rows of the second message that the first one holds too, wherever they stand."""
    known = {row.numpy().tobytes() for row in first_MK.contiguous()}
    return sum(row.numpy().tobytes() in known for row in second_MK.contiguous())


def difference_p_value(first_MK: Tensor, second_MK: Tensor) -> float:
    """Test that differences modulo 2^32 of rows at the same place are uniform, as those of fresh masks are.

    Args:
        first_MK: int32 words.
        second_MK: int32 words of another run at the same group.

    Returns:
        The p-value of a chi-square test on the differences' top byte.
    """
    return byte_p_value(torch.sub(first_MK, second_MK).flatten(), 3)

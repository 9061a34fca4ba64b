"""The worker and dealers pool what they were sent: keys and row ranges give the masks, the masks give the integers.

With all dealers r = r_1 + ... + r_k is known and nothing is left of the protection. With one missing, the sum of the
others is no nearer to r than a guess. A pool filled ahead holds more rows than one run uses, so the colluders try every
place in it and keep the one where the words become small.

Shapes: M rows observed, K words per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tsqp.arith.keystream import keystream_rows
from tsqp.audit.recorder import Dealt, Recording
from tsqp.errors import InputError


def unmask(words_MK: Tensor, group: str, number: int, dealers: Sequence[Recording]) -> Tensor:
    """Remove the colluding dealers' masks from what the worker saw.

    Args:
        words_MK: int32, all the worker saw for one group, in order.
        group: its name.
        number: its number, which the keystream's counter holds.
        dealers: recordings of those who collude.

    Returns:
        int32, shape (M, K): the integers in clear if these are all dealers.

    Raises:
        InputError: no dealer was asked for rows of this group, or for fewer than the worker saw.
    """
    pools = [_pool(dealer, group, number, words_MK.shape[1]) for dealer in dealers]
    rows = min((len(pool) for pool in pools), default=0)
    if rows < len(words_MK):
        raise InputError(f"the dealers were asked for {rows} mask rows of {group}, the worker saw {len(words_MK)}.")
    masks_RK = torch.stack([pool[:rows] for pool in pools]).sum(dim=0, dtype=torch.int32)
    candidates = (words_MK - masks_RK[first : first + len(words_MK)] for first in range(rows - len(words_MK) + 1))
    return min(candidates, key=lambda x_MK: float(x_MK.double().abs().mean()))


def _pool(dealer: Recording, group: str, number: int, inputs: int) -> Tensor:
    """Return the mask rows a dealer was told, in the order of their numbers."""
    orders = sorted((each for each in dealer.dealt if each.group == group), key=_first_row)
    rows = [keystream_rows(each.seed, number, each.first, each.count, inputs) for each in orders]
    return torch.cat(rows) if rows else torch.empty(0, inputs, dtype=torch.int32)


def _first_row(order: Dealt) -> int:
    return order.first

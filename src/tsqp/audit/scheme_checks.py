"""Breaks each published scheme of ``schemes`` on recorded activations, and says what came out.

Shapes: T tokens, N heads, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tsqp.audit import schemes
from tsqp.audit.attacks import permutation, qk_scaling, rank_one, reused_masks
from tsqp.audit.attacks.row_space import member_tokens
from tsqp.audit.evidence import Evidence
from tsqp.audit.findings import Result, members, recovered
from tsqp.audit.public import FIRST_GROUP, PublicModel
from tsqp.errors import InputError

# A Gaussian mask's standard deviation, in those of the activations.
_MASK_SCALE = 10.0

Check = Callable[[Evidence, PublicModel, torch.Generator], list[Result]]


def rank_one_blinding(evidence: Evidence, public: PublicModel, generator: torch.Generator) -> list[Result]:
    """Blind with M = D + a b' and recover every token in order."""
    x_TK = evidence.opened.first(FIRST_GROUP).float()
    sent = schemes.rank_one_secrets(len(x_TK), generator).blind(x_TK).sent
    guessed_T = rank_one.tokens_in_order(sent, public.table)
    return [replace(recovered("rank-one", "one entry per row stands out", guessed_T, evidence.ids), seen=sent)]


def left_mixing(evidence: Evidence, public: PublicModel, generator: torch.Generator) -> list[Result]:
    """Mix with 10 % shield rows by a fresh matrix and recover the set of tokens."""
    sent = schemes.left_mixing(evidence.opened.first(FIRST_GROUP).float(), generator).sent
    found_U = member_tokens(sent, public.table)
    name, vocabulary = "left-mixing", len(public.table)
    result = members(name, "row-space membership", found_U, evidence.ids, must_find=True, vocabulary=vocabulary)
    return [replace(result, seen=sent)]


def permuted(evidence: Evidence, public: PublicModel, generator: torch.Generator) -> list[Result]:
    """Permute the rows, afresh for each group, and recover the prompt in order."""
    x_TK = schemes.permutation(evidence.opened.first(FIRST_GROUP).float(), generator).sent
    attended_TK = schemes.permutation(evidence.opened.first("layers.0.o").float(), generator).sent
    found = torch.tensor(sorted(permutation.tokens_in_any_order(x_TK, public).tolist()))
    sorted_ids = sorted(evidence.ids)
    whole = recovered("permutation", "nearest neighbour, in any order", found, sorted_ids)
    guessed_T = permutation.tokens_in_order(x_TK, attended_TK, public)
    ordered = recovered("permutation", "replay of attention", guessed_T, evidence.ids)
    return [Result(whole.finding), replace(ordered, seen=x_TK)]


def reused_gaussian(evidence: Evidence, public: PublicModel, generator: torch.Generator) -> list[Result]:
    """Send two prompts under one Gaussian mask; recover ours with the other one known, then both with neither known."""
    x_TK = evidence.opened.first(FIRST_GROUP).float()
    other_T = torch.randint(len(public.table), (len(x_TK),), generator=generator)
    other_TK = public.table.vectors_VD[other_T]
    scale = _MASK_SCALE * float(x_TK.std())
    mask = schemes.gaussian_mask(x_TK, scale, generator)
    ours, theirs = (mask.blind(each, public.first_layer.q_weight).sent for each in (x_TK, other_TK))
    known_T = reused_masks.with_known_prompt(ours, theirs, other_T, public.table)
    blind_T, _ = reused_masks.token_pairs(ours, theirs, public.table)
    return [
        Result(recovered("reused-masks", "difference, other prompt known", known_T, evidence.ids).finding),
        replace(recovered("reused-masks", "difference, neither prompt known", blind_T, evidence.ids), seen=ours),
    ]


def scaled_qk(evidence: Evidence, public: PublicModel, generator: torch.Generator) -> list[Result]:
    """Scale queries and keys by secret diagonals and recover the prompt from their products.

    Raises:
        InputError: attention was not recorded.
    """
    q_TNH, k_TNH = recorded_qk(evidence)
    q_TNH, k_TNH = schemes.qk_scaling(q_TNH, k_TNH, generator)
    guessed_T = qk_scaling.tokens_in_order(q_TNH, k_TNH, public)
    return [replace(recovered("qk-scaling", "products of queries and keys", guessed_T, evidence.ids), seen=k_TNH)]


def recorded_qk(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Return layer 0's queries and keys, (T, N, H), from the first attention product that was recorded."""
    operands = evidence.offloaded.operands("matmul") if evidence.offloaded else []
    if not operands:
        raise InputError("no attention products were recorded: run the prompt with attention off-loaded.")
    q_BNTH, k_BNHT = operands[0].float(), operands[1].float()
    return q_BNTH[0].transpose(0, 1) * math.sqrt(q_BNTH.shape[-1]), k_BNHT[0].permute(2, 0, 1)


SCHEMES: dict[str, Check] = {
    "rank-one": rank_one_blinding,
    "left-mixing": left_mixing,
    "permutation": permuted,
    "reused-masks": reused_gaussian,
    "qk-scaling": scaled_qk,
}

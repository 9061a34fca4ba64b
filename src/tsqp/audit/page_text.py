"""What the page and the documentation say of each thing sent and each attack, in plain English."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Subject:
    """A level or scheme as the page presents it.

    Attributes:
        title: its heading.
        kind: ``level``, ``test`` or ``scheme``.
        sent: what the worker is sent.
        verdict: what came of it, if all is as expected.
    """

    title: str
    kind: str
    sent: str
    verdict: str


SUBJECTS: dict[str, Subject] = {
    "open": Subject(
        "Level open",
        "level",
        "The worker is sent the activations themselves, as floating-point numbers.",
        "The first layer's input is a row of a public table, so looking it up gives the prompt back, word for word.",
    ),
    "verified": Subject(
        "Level verified",
        "level",
        "The worker is sent the activations as integers. Its results are checked, so it cannot lie; nothing is hidden.",
        "Rounding to integers changes nothing that matters here: the prompt can be read as at open.",
    ),
    "masked, r = 0": Subject(
        "Level masked, with the mask forced to zero",
        "test",
        "A test of the attacks: this is what masked would send if its random masks were all zero.",
        "The attacks that fail at masked succeed here, so they fail there because of the masks.",
    ),
    "masked": Subject(
        "Level masked",
        "level",
        "To each integer a fresh random word is added. What is sent is uniformly random, whatever the prompt.",
        "The attacks find no more than they find in random numbers that have nothing to do with the prompt.",
    ),
    "rank-one": Subject(
        "Rank-1 blinding",
        "scheme",
        "Tokens are mixed by a secret matrix D + a b', kept for the whole run: cheap to undo.",
        "Each row is a token plus a multiple of one common vector. The entry that breaks the pattern is the token.",
    ),
    "left-mixing": Subject(
        "Left mixing with shield rows",
        "scheme",
        "Tokens and 10 % of random rows are mixed by a fresh random matrix for every message.",
        "Mixing rows leaves the space that they span as it was, and each word of the prompt lies in it. The order is "
        "not recovered by this attack; found words are shown where they stand.",
    ),
    "permutation": Subject(
        "Shuffled tokens",
        "scheme",
        "The rows are sent in a random order, a new one for every message.",
        "Every row still names its token. Causality gives the order: only one token fits next.",
    ),
    "reused-masks": Subject(
        "Gaussian masks used twice",
        "scheme",
        "Large random numbers are added, but the same ones for two prompts.",
        "Subtracting one message from the other removes the mask; what is left names both tokens at each position.",
    ),
    "qk-scaling": Subject(
        "Secret scaling of queries and keys",
        "scheme",
        "Queries are multiplied by a secret diagonal and keys divided by it, so that attention comes out right.",
        "The product of a query and its key is untouched, and at each position it names the token.",
    ),
}

# Looked up by the beginning of an attack's name.
ATTACKS: dict[str, str] = {
    "nearest neighbour, in any order": "Compare each row with the public vocabulary; count tokens without their order.",
    "nearest neighbour": "Compare each row with every row of the public vocabulary and take the closest.",
    "row-space membership": "List the tokens whose vector is a combination of the rows sent. Scaling and "
    "mixing rows leave that as it is.",
    "regression": "Learn, on public text, to map what a deeper layer reads back to the token; then look it up.",
    "repeated rows": "Send the same prompt again and count rows that come out the same: a mask used twice shows.",
    "differences of two messages": "Subtract two messages: if a mask were used twice, the difference would be small "
    "numbers and not uniform.",
    "uniform bytes": "Count how often each of 256 values occurs in each byte of the words (chi-square).",
    "balanced bits": "Count ones and zeros in each of the 32 bit positions.",
    "runs of bits": "Count how often each bit changes from one word to the next.",
    "neighbouring words": "Correlate each word with the next.",
    "spread of all p-values": "Of truly random words, p-values are themselves evenly spread; test that they are "
    "(Kolmogorov-Smirnov).",
    "correlation with the plaintext": "Told the true values, correlate them with the words and with each bit.",
    "worker and all dealers but": "The worker pools what it saw with all dealers but one: the missing one's mask still "
    "covers everything.",
    "worker and all dealers": "The worker pools what it saw with every dealer. Together they know the masks: this "
    "is the limit of what is promised.",
    "one entry per row": "Find the tokens in the span of the rows, write each row in terms of them, and find the entry "
    "that is no multiple of the others.",
    "replay of attention": "Compute, with public weights, the next position's attention for every token left; only the "
    "right one reproduces a row that was seen.",
    "difference, other prompt known": "The attacker is also a client and knows the other prompt: its masks are then "
    "known too.",
    "difference, neither prompt known": "Search the pair of tokens whose difference is the one observed.",
    "products of queries and keys": "Multiply each query by its key: the secret cancels.",
}


def explanation(attack: str) -> str:
    """Return what an attack does, by its name; empty for an unknown one."""
    return next((text for name, text in ATTACKS.items() if attack.startswith(name)), "")


def p_value_text(p_value: float) -> str:
    """Write a p-value: underflow is not zero."""
    return f"p = {p_value:.2g}" if p_value >= 1e-300 else "p < 1e-300"  # noqa: PLR2004  near float64's smallest

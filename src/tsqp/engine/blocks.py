"""Blocks of the key-value cache: who holds which, and which hold a prefix that a later prompt can use again.

Only numbers of blocks are kept here; keys and values are elsewhere. Nothing here is thread-safe or imports torch.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tsqp.engine.api import NO_OWNER, require_positive
from tsqp.errors import InternalError

# The parent of a sequence's first block. Serial numbers of entries start above it.
_ROOT = 0


class BlockPool:
    """Blocks and how many hold each. A block is free when nobody does.

    Args:
        count: how many blocks there are, numbered from 0.
        tokens: how many tokens' keys and values one takes.

    Raises:
        ConfigError: either is below 1.
    """

    def __init__(self, count: int, tokens: int) -> None:
        require_positive("the number of cache blocks", count)
        require_positive("the number of tokens of a cache block", tokens)
        self._tokens = tokens
        self._references = [0] * count
        self._free = list(range(count - 1, -1, -1))

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return len(self._references)

    @property
    def tokens(self) -> int:
        """How many tokens a block takes."""
        return self._tokens

    @property
    def free(self) -> int:
        """How many blocks nobody holds."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Return how many blocks so many tokens take."""
        return -(-tokens // self._tokens)

    def references(self, block: int) -> int:
        """Return how many hold a block."""
        return self._references[block]

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """Take free blocks, each held once from now on; None, and nothing taken, where there are not so many.

        Raises:
            InternalError: a negative number.
        """
        if count < 0:
            raise InternalError(f"{count} cache blocks were asked for; expected 0 or more.")
        if count > len(self._free):
            return None
        taken = tuple(self._free.pop() for _ in range(count))
        for block in taken:
            self._references[block] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Hold blocks once more that are held already.

        Raises:
            InternalError: one is free, unknown or named twice; then nothing has changed.
        """
        self._check_held("shared", blocks)
        for block in blocks:
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of blocks, once each; those that nobody holds any more are free.

        Raises:
            InternalError: one is free already, unknown or named twice; then nothing has changed.
        """
        self._check_held("released", blocks)
        for block in blocks:
            self._references[block] -= 1
            if not self._references[block]:
                self._free.append(block)

    def _check_held(self, action: str, blocks: Sequence[int]) -> None:
        if len(set(blocks)) != len(blocks):
            raise InternalError(f"a cache block would be {action} twice at once; expected each once.")
        for block in blocks:
            if not 0 <= block < self.count:
                raise InternalError(f"cache block {block} would be {action}; there are {self.count}, from 0.")
            if not self._references[block]:
                raise InternalError(f"cache block {block} would be {action}, but nobody holds it.")


@dataclass(slots=True, repr=False, eq=False)
class _Entry:
    """A block of a chain. Its key names its owner, the entry before it, and its tokens."""

    key: tuple[str, int, tuple[int, ...]]
    serial: int
    block: int
    parent: _Entry | None
    children: int = 0


class PrefixCache:
    """Full blocks of sequences, for later prompts of the same owner that begin with the same tokens.

    An entry's key is (owner, entry before it, token ids of the block), so it stands for every token up to its end, of
    one owner: another owner's prompt finds nothing, and takes as long as if nobody had sent it before. ``NO_OWNER``
    leaves nothing and so finds nothing. To switch reuse off wholly, make no cache.

    The cache holds each of its blocks once. It keeps none from somebody who waits: ``make_room`` gives up blocks that
    nobody else holds, least recently used first, the end of a chain before its beginning.

    Args:
        pool: whose blocks they are.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        # Least recently used first. Whoever uses an entry uses all before it in its chain, so an entry always comes
        # before its parent here.
        self._entries: OrderedDict[tuple[str, int, tuple[int, ...]], _Entry] = OrderedDict()
        self._last_serial = _ROOT

    def __repr__(self) -> str:
        return f"PrefixCache({self.held} blocks, not shown)"

    @property
    def held(self) -> int:
        """How many blocks the cache holds, whether others do too or not."""
        return len(self._entries)

    @property
    def idle(self) -> int:
        """How many blocks only the cache holds. Once nothing runs, these and the free ones are all."""
        return sum(self._pool.references(entry.block) == 1 for entry in self._entries.values())

    def match(self, owner: str, ids: Sequence[int]) -> tuple[int, ...]:
        """Return the blocks that hold the longest known prefix of ``ids``, in order, as if just used.

        They are valid until the next ``make_room``: share them first.
        """
        chain = self._chain(owner, ids)
        self._touch(chain)
        return tuple(entry.block for entry in chain)

    def insert(self, owner: str, ids: Sequence[int], blocks: Sequence[int]) -> None:
        """Remember a sequence's first blocks. Where a prefix is known already, the blocks known stay.

        Args:
            owner: whose sequence it is; nothing is remembered for ``NO_OWNER``.
            ids: the tokens whose keys and values are in the blocks.
            blocks: full ones, held by the caller.

        Raises:
            InternalError: the blocks are not full, or nobody holds one.
        """
        if len(ids) != len(blocks) * self._pool.tokens:
            raise InternalError(
                f"{len(blocks)} blocks of {self._pool.tokens} tokens were to be remembered for {len(ids)} tokens; "
                "expected full ones."
            )
        if owner == NO_OWNER:
            return
        chain = self._chain(owner, ids)
        parts = list(self._parts(ids))
        for at in range(len(chain), len(blocks)):
            chain.append(self._add(owner, chain[-1] if chain else None, parts[at], blocks[at]))
        self._touch(chain)

    def make_room(self, count: int) -> bool:
        """Give up blocks until the pool has ``count`` free ones; none at all, and False, where that cannot be."""
        lacking = count - self._pool.free
        victims = self._victims(lacking)
        if len(victims) < lacking:
            return False
        for entry in victims:
            self._drop(entry)
        return True

    def clear(self) -> None:
        """Give up everything."""
        for entry in list(self._entries.values()):
            self._drop(entry)

    def _parts(self, ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
        size = self._pool.tokens
        return (tuple(ids[first : first + size]) for first in range(0, len(ids) - size + 1, size))

    def _chain(self, owner: str, ids: Sequence[int]) -> list[_Entry]:
        chain: list[_Entry] = []
        for part in self._parts(ids):
            entry = self._entries.get((owner, chain[-1].serial if chain else _ROOT, part))
            if entry is None:
                break
            chain.append(entry)
        return chain

    def _touch(self, chain: Iterable[_Entry]) -> None:
        """Make a chain, given from its beginning, the most recently used; its beginning most of all."""
        for entry in reversed(list(chain)):
            self._entries.move_to_end(entry.key)

    def _add(self, owner: str, parent: _Entry | None, part: tuple[int, ...], block: int) -> _Entry:
        self._pool.share((block,))
        # A serial number is never used again, so what hung on an entry that is gone can never be found under another.
        self._last_serial += 1
        entry = _Entry((owner, parent.serial if parent else _ROOT, part), self._last_serial, block, parent)
        self._entries[entry.key] = entry
        if parent:
            parent.children += 1
        return entry

    def _victims(self, count: int) -> list[_Entry]:
        """Return up to ``count`` entries to give up: one pass, as an entry's children come before it.

        An entry stays while one of its children is in use. That would otherwise hang on nothing, and be remembered a
        second time when its sequence goes on; held twice here, it would look in use for ever.
        """
        victims: list[_Entry] = []
        children_gone: Counter[int] = Counter()
        for entry in self._entries.values():
            if len(victims) >= count:
                break
            if self._pool.references(entry.block) == 1 and entry.children == children_gone[entry.serial]:
                victims.append(entry)
                if entry.parent:
                    children_gone[entry.parent.serial] += 1
        return victims

    def _drop(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        if entry.parent:
            entry.parent.children -= 1
        self._pool.release((entry.block,))

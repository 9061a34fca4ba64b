"""Blocks: held by whom, free when by nobody, never twice; prefixes: of one owner, given up in the right order."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp.engine.api import NO_OWNER
from tsqp.engine.blocks import BlockPool, PrefixCache
from tsqp.errors import ConfigError, InternalError

TOKENS = 2


def taken(pool: BlockPool, count: int) -> tuple[int, ...]:
    blocks = pool.allocate(count)
    assert blocks is not None
    return blocks


def remember(cache: PrefixCache, pool: BlockPool, owner: str, ids: tuple[int, ...]) -> tuple[int, ...]:
    """Compute a sequence, remember it, and end it: only the cache holds its blocks then."""
    blocks = taken(pool, len(ids) // TOKENS)
    cache.insert(owner, ids, blocks)
    pool.release(blocks)
    return blocks


@pytest.mark.parametrize(("count", "tokens"), [(0, 1), (1, 0), (-1, 1)])
def test_a_pool_without_room_is_refused(count: int, tokens: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        BlockPool(count, tokens)


def test_needed_blocks_are_rounded_up() -> None:
    pool = BlockPool(4, 16)
    assert [pool.needed(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_what_does_not_fit_takes_nothing() -> None:
    pool = BlockPool(3, TOKENS)
    assert pool.allocate(4) is None
    assert pool.free == 3
    assert sorted(taken(pool, 3)) == [0, 1, 2]
    assert pool.allocate(0) == ()
    assert pool.allocate(1) is None


def test_a_shared_block_is_free_after_the_last_release() -> None:
    pool = BlockPool(2, TOKENS)
    blocks = taken(pool, 1)
    pool.share(blocks)
    pool.release(blocks)
    assert (pool.free, pool.references(blocks[0])) == (1, 1)
    pool.release(blocks)
    assert (pool.free, pool.references(blocks[0])) == (2, 0)


@pytest.mark.parametrize("blocks", [(1,), (0, 1), (0, 0), (-2,), (2,)], ids=str)
@pytest.mark.parametrize("action", ["share", "release"])
def test_blocks_that_are_not_held_change_nothing(action: str, blocks: tuple[int, ...]) -> None:
    pool = BlockPool(2, TOKENS)
    assert pool.allocate(1) == (0,)
    with pytest.raises(InternalError, match="cache block"):
        getattr(pool, action)(blocks)
    assert (pool.free, pool.references(0)) == (1, 1)


def test_a_negative_number_of_blocks_is_refused() -> None:
    with pytest.raises(InternalError, match="0 or more"):
        BlockPool(2, TOKENS).allocate(-1)


def test_a_prefix_is_found_as_far_as_it_is_the_same() -> None:
    pool = BlockPool(8, TOKENS)
    cache = PrefixCache(pool)
    blocks = remember(cache, pool, "ann", (1, 2, 3, 4, 5, 6))
    assert cache.match("ann", (1, 2, 3, 4, 5, 6, 7)) == blocks
    assert cache.match("ann", (1, 2, 3, 4, 5)) == blocks[:2]
    assert cache.match("ann", (1, 2, 9, 4, 5, 6)) == blocks[:1]
    assert cache.match("ann", (3, 4, 5, 6)) == ()
    assert (cache.held, cache.idle, pool.free) == (3, 3, 5)


def test_a_prefix_is_never_found_by_another_owner() -> None:
    pool = BlockPool(8, TOKENS)
    cache = PrefixCache(pool)
    ids = (1, 2, 3, 4)
    first = remember(cache, pool, "ann", ids)
    assert cache.match("bob", ids) == ()
    second = remember(cache, pool, "bob", ids)
    assert not set(first) & set(second)
    assert (cache.match("ann", ids), cache.match("bob", ids)) == (first, second)


def test_nobody_leaves_and_finds_nothing() -> None:
    pool = BlockPool(8, TOKENS)
    cache = PrefixCache(pool)
    remember(cache, pool, NO_OWNER, (1, 2, 3, 4))
    assert (cache.held, pool.free) == (0, 8)
    assert cache.match(NO_OWNER, (1, 2, 3, 4)) == ()


def test_a_second_copy_is_not_kept_but_what_follows_it_is() -> None:
    pool = BlockPool(8, TOKENS)
    cache = PrefixCache(pool)
    first = remember(cache, pool, "ann", (1, 2))
    second = remember(cache, pool, "ann", (1, 2, 3, 4))
    assert cache.match("ann", (1, 2, 3, 4)) == (first[0], second[1])
    assert (cache.held, pool.free) == (2, 6)


def test_only_full_blocks_are_remembered() -> None:
    pool = BlockPool(2, TOKENS)
    with pytest.raises(InternalError, match="expected full ones"):
        PrefixCache(pool).insert("ann", (1, 2, 3), taken(pool, 2))


def test_room_is_made_by_the_least_recently_used_from_the_end() -> None:
    pool = BlockPool(5, TOKENS)
    cache = PrefixCache(pool)
    old = remember(cache, pool, "ann", (1, 2, 3, 4))
    new = remember(cache, pool, "ann", (5, 6, 7, 8))
    assert cache.match("ann", (1, 2)) == old[:1]
    # Least recently used: the end of the old chain, which the match did not reach; then the new one from its end.
    for room, left_old, left_new in [(2, 1, 2), (3, 1, 1), (4, 1, 0), (5, 0, 0)]:
        assert cache.make_room(room)
        assert pool.free == room
        found = (len(cache._chain("ann", (1, 2, 3, 4))), len(cache._chain("ann", (5, 6, 7, 8))))
        assert found == (left_old, left_new)
    assert len(new) == 2


def test_blocks_in_use_are_not_given_up_and_nothing_is_in_vain() -> None:
    pool = BlockPool(4, TOKENS)
    cache = PrefixCache(pool)
    remember(cache, pool, "ann", (1, 2, 3, 4))
    used = cache.match("ann", (1, 2))
    pool.share(used)
    assert not cache.make_room(4)
    assert (cache.held, cache.idle, pool.free) == (2, 1, 2)
    assert cache.make_room(3)
    assert cache.match("ann", (1, 2, 3, 4)) == used
    pool.release(used)
    assert cache.make_room(4)
    assert (cache.held, pool.free) == (0, 4)


def test_a_block_stays_while_what_follows_it_is_in_use() -> None:
    pool = BlockPool(4, TOKENS)
    cache = PrefixCache(pool)
    first = remember(cache, pool, "ann", (1, 2))
    copy = taken(pool, 2)
    cache.insert("ann", (1, 2, 3, 4), copy)  # its first block is a second copy, the other hangs on the first one
    assert not cache.make_room(2)
    cache.insert("ann", (1, 2, 3, 4), copy)
    assert cache.match("ann", (1, 2, 3, 4)) == (first[0], copy[1])
    pool.release(copy)
    assert cache.make_room(4)


def test_what_hung_on_a_block_that_is_gone_is_not_found_under_its_successor() -> None:
    pool = BlockPool(8, TOKENS)
    cache = PrefixCache(pool)
    remember(cache, pool, "ann", (1, 2, 3, 4))
    cache.clear()
    assert (cache.held, pool.free) == (0, 8)
    remember(cache, pool, "ann", (1, 2))
    assert len(cache.match("ann", (1, 2, 3, 4))) == 1


def test_it_does_not_show_what_it_holds() -> None:
    pool = BlockPool(8, TOKENS)
    cache = PrefixCache(pool)
    remember(cache, pool, "ann", (1717, 2))
    assert "1717" not in repr(cache)
    assert "ann" not in repr(cache)


actions = st.lists(
    st.tuples(
        st.sampled_from(["insert", "run", "match", "hold", "let_go", "room"]),
        st.sampled_from(["ann", "bob", NO_OWNER]),
        st.lists(st.integers(0, 1), min_size=2, max_size=9),
        st.integers(0, 12),
    ),
    max_size=60,
)


def spare(cache: PrefixCache, pool: BlockPool) -> int:
    """Count what the cache can give up: what nobody else holds, and nothing in use hangs on."""
    needed = set()
    for entry in cache._entries.values():
        above = entry if pool.references(entry.block) > 1 else None
        while above:
            needed.add(above.serial)
            above = above.parent
    return cache.held - len(needed)


def known(model: dict[int, tuple[str, tuple[int, ...]]], owner: str, ids: list[int], found: tuple[int, ...]) -> None:
    for at, block in enumerate(found):
        assert owner != NO_OWNER
        assert model[block] == (owner, tuple(ids[: (at + 1) * TOKENS]))


@settings(deadline=None)
@given(actions=actions)
def test_whatever_happens_blocks_hold_what_they_are_found_for(
    actions: list[tuple[str, str, list[int], int]],
) -> None:
    pool = BlockPool(12, TOKENS)
    cache = PrefixCache(pool)
    content: dict[int, tuple[str, tuple[int, ...]]] = {}  # what was last written into each block
    held: list[tuple[int, ...]] = []
    for action, owner, ids, number in actions:
        full = ids[: len(ids) // TOKENS * TOKENS]
        if action in {"insert", "run"} and cache.make_room(len(full) // TOKENS):
            blocks = taken(pool, len(full) // TOKENS)
            content |= {block: (owner, tuple(full[: (at + 1) * TOKENS])) for at, block in enumerate(blocks)}
            cache.insert(owner, full, blocks)
            held.append(blocks)
            if action == "insert":
                pool.release(held.pop())
        elif action in {"match", "hold"}:
            found = cache.match(owner, ids)
            known(content, owner, ids, found)
            if action == "hold":
                pool.share(found)
                held.append(found)
        elif action == "let_go" and held:
            pool.release(held.pop(number % len(held)))
        elif action == "room":
            free, could = pool.free, pool.free + spare(cache, pool)
            assert cache.make_room(number) == (number <= could)
            assert pool.free == (max(free, number) if number <= could else free)
        references = Counter(block for blocks in held for block in blocks)
        references.update(entry.block for entry in cache._entries.values())
        assert [pool.references(block) for block in range(pool.count)] == [references[at] for at in range(pool.count)]
        assert pool.free == pool.count - len(references)
        order = {entry.serial: at for at, entry in enumerate(cache._entries.values())}
        assert all(order[e.serial] < order[e.parent.serial] for e in cache._entries.values() if e.parent)
    for blocks in held:
        pool.release(blocks)
    assert cache.idle == cache.held
    assert cache.make_room(pool.count)
    assert pool.free == pool.count

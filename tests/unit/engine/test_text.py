"""Text as tokens come, on the bundled model's tokenizer and on tokenizers with other rules."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, processors
from tokenizers import Tokenizer as RawTokenizer

from tsqp.engine.text import TextStream
from tsqp.errors import WeightsError
from tsqp.model.manifest import read_manifest
from tsqp.model.packed import open_enclave
from tsqp.model.tokenizer import Conventions, Tokenizer, read_companions, read_tokenizer

END = 2
SMOLLM_VOCAB = 49152
many = settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])

# Tokenizers ----------------------------------------------------------------------------------------------------------


def with_special(raw: RawTokenizer) -> Tokenizer:
    raw.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(raw.to_str().encode())


def sentencepiece() -> Tokenizer:
    """As LLaMA 2: spaces as ▁, bytes as <0x..>, the text's first space stripped."""
    pieces = ["<unk>", "▁", "▁a", "a", "b", "ab", "▁▁", "é", ".", *(f"<0x{byte:02X}>" for byte in range(256))]
    raw = RawTokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)  # noqa: S106
    )
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return with_special(raw)


def metaspace() -> Tokenizer:
    raw = RawTokenizer(models.BPE({piece: i for i, piece in enumerate(["▁", "▁a", "a", "b", "▁b", "▁▁", "."])}, []))
    raw.decoder = decoders.Metaspace()
    return with_special(raw)


def wordpiece() -> Tokenizer:
    raw = RawTokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(["[UNK]", "a", "##a", "b", "##b", ".", ","])})
    )
    raw.decoder = decoders.WordPiece()
    return with_special(raw)


SMALL = {"sentencepiece": sentencepiece(), "metaspace": metaspace(), "wordpiece": wordpiece()}


@pytest.fixture(scope="module")
def bundled(bundled_directory: Path) -> Tokenizer:
    return read_tokenizer(bundled_directory)


@pytest.fixture(scope="module")
def any_ids(bundled: Tokenizer) -> Any:
    """Lists of ids: all of the vocabulary, mostly parts of characters, with special ones and some that do not exist."""
    parts = [token for token in range(SMOLLM_VOCAB) if "\ufffd" in bundled.decode([token])]
    assert len(parts) > 100
    one = st.one_of(
        st.sampled_from(parts), st.sampled_from(parts), st.integers(0, SMOLLM_VOCAB + 50), st.integers(0, 16)
    )
    written = st.text(max_size=12).map(bundled.encode)
    return st.lists(st.one_of(one.map(lambda token: [token]), written), max_size=12).map(
        lambda parts: [*chain.from_iterable(parts)]
    )


def stream_all(stream: TextStream, ids: Sequence[int]) -> list[str]:
    return [*(stream.push(token) for token in ids), stream.flush()]


# All of the text -----------------------------------------------------------------------------------------------------


def test_pieces_are_the_decoding(bundled: Tokenizer, any_ids: Any) -> None:
    @many
    @given(ids=any_ids)
    def check(ids: list[int]) -> None:
        assert "".join(stream_all(TextStream(bundled), ids)) == bundled.decode_shown(ids)

    check()


def test_nothing_shown_is_taken_back(bundled: Tokenizer, any_ids: Any) -> None:
    """What is out after any beginning is the beginning of every continuation's text."""

    @many
    @given(ids=any_ids, more=any_ids)
    def check(ids: list[int], more: list[int]) -> None:
        stream = TextStream(bundled)
        shown = "".join(stream.push(token) for token in ids)
        assert bundled.decode_shown(ids).startswith(shown)
        assert bundled.decode_shown(ids + more).startswith(shown)

    check()


@pytest.mark.parametrize("name", SMALL)
def test_other_tokenizers(name: str) -> None:
    tokenizer, special = SMALL[name], 265
    bytes_of_characters = [9 + byte for byte in (0x0A, 0x20, 0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC)]
    one = st.one_of(
        st.integers(0, 12),
        st.sampled_from(bytes_of_characters),
        st.sampled_from([special, 7, 999]),
        st.integers(0, 270),
    )

    @many
    @given(ids=st.lists(one, max_size=14), cut=st.integers(0, 14))
    def check(ids: list[int], cut: int) -> None:
        stream = TextStream(tokenizer)
        shown = "".join(stream.push(token) for token in ids[:cut])
        assert tokenizer.decode_shown(ids).startswith(shown)
        assert shown + "".join(stream_all(stream, ids[cut:])) == tokenizer.decode_shown(ids)

    check()


@pytest.mark.parametrize("name", SMALL)
def test_after_a_prompt_the_space_stays(name: str) -> None:
    """Prompt and answer together are the decoding of both, where the prompt ends in an ordinary token."""
    tokenizer = SMALL[name]
    ordinary = {"sentencepiece": [2, 3, 4, 5], "metaspace": [1, 2, 3], "wordpiece": [1, 2, 3]}[name]

    @many
    @given(
        prompt=st.lists(st.integers(0, 6), max_size=5),
        last=st.sampled_from(ordinary),
        ids=st.lists(st.integers(0, 6), max_size=6),
    )
    def check(prompt: list[int], last: int, ids: list[int]) -> None:
        prompt = [*prompt, last]
        before = tokenizer.decode_shown(prompt)
        assert before + "".join(stream_all(TextStream(tokenizer, (), prompt), ids)) == tokenizer.decode_shown(
            prompt + ids
        )

    check()


def test_text_comes_at_once(bundled: Tokenizer) -> None:
    """Only a token that completes no character waits."""
    ids = bundled.encode("The quick brown fox: naïve 🎉 done")
    stream = TextStream(bundled)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == "The quick brown fox: naïve 🎉 done"
    assert sum(not piece for piece in pieces) == sum("\ufffd" in bundled.decode([token]) for token in ids) - 1


def test_special_tokens_are_not_shown(bundled: Tokenizer) -> None:
    stream = TextStream(bundled)
    ids = bundled.encode("<|im_start|>Hi<|im_end|>")
    assert len(ids) == 3
    assert [stream.push(token) for token in ids] == ["", "Hi", ""]
    assert not stream.stopped


# Stop texts ----------------------------------------------------------------------------------------------------------


def first_stop(text: str, stops: Sequence[str]) -> str | None:
    """The text before the stop that is complete first, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return None


letters = st.text("ab é€", min_size=1, max_size=12)
stop_texts = st.lists(st.text("ab é€", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple)


def test_stops_whatever_the_boundaries(bundled: Tokenizer) -> None:
    """The same text from its own tokens, from single bytes, and from any mixture stops at the same place."""

    @many
    @given(parts=st.lists(letters, max_size=6), stops=stop_texts)
    @example(parts=["abc"], stops=("abc", "b"))
    @example(parts=["aab"], stops=("ab",))
    @example(parts=["a", "bab"], stops=("abb", "bab"))
    def check(parts: list[str], stops: tuple[str, ...]) -> None:
        text = "".join(parts)
        expected = first_stop(text, stops)
        single = [token for letter in text for token in bundled.encode(letter)]
        for ids in (bundled.encode(text), single, [token for part in parts for token in bundled.encode(part)]):
            stream = TextStream(bundled, stops)
            shown = ""
            for token in ids:
                shown += stream.push(token)
                assert (text if expected is None else expected).startswith(shown)
            assert stream.stopped == (expected is not None)
            assert shown + stream.flush() == (text if expected is None else expected)

    check()


def test_stops_in_any_ids(bundled: Tokenizer, any_ids: Any) -> None:
    """Invalid characters too: the answer is its tokens' own decoding, up to the first stop."""

    @many
    @given(ids=any_ids, data=st.data())
    def check(ids: list[int], data: st.DataObject) -> None:
        text = bundled.decode_shown(ids)
        assume(text)
        start = data.draw(st.integers(0, len(text) - 1))
        stop = text[start : start + data.draw(st.integers(1, 6))]
        stream = TextStream(bundled, (stop,))
        shown = "".join(stream_all(stream, ids))
        assert stream.stopped
        assert shown == text[: text.index(stop)]

    check()


@pytest.mark.parametrize("name", ["sentencepiece"])
def test_a_stop_of_single_bytes_needs_no_next_token(name: str) -> None:
    """A line's end is a byte in such vocabularies: the answer ends with it, not one token later."""
    stream = TextStream(SMALL[name], ("\n",))
    assert [stream.push(token) for token in (2, 9 + 0x0A)] == ["a", ""]
    assert stream.stopped
    assert stream.flush() == ""


def test_held_back_text_comes_when_it_is_no_stop(bundled: Tokenizer) -> None:
    stream = TextStream(bundled, ("abX",))
    ids = [bundled.encode(letter)[0] for letter in "zabab!"]
    assert [stream.push(token) for token in ids] == ["z", "", "", "ab", "", "ab!"]
    assert [stream.push(ids[1]), stream.push(ids[2]), stream.flush()] == ["", "", "ab"]
    assert not stream.stopped


def test_nothing_after_a_stop(bundled: Tokenizer) -> None:
    stream = TextStream(bundled, (" fox",))
    text = "".join(stream_all(stream, bundled.encode("The quick brown fox jumps")))
    assert text == "The quick brown"
    assert stream.stopped
    assert stream.push(bundled.encode("more")[0]) == ""


def test_a_special_token_as_a_stop(bundled: Tokenizer) -> None:
    """Clients list the end-of-sequence token's text; what was held back for another stop comes out."""
    stream = TextStream(bundled, ("<|im_end|>", "Hi there"))
    (hi,) = bundled.encode("Hi")
    assert [stream.push(hi), stream.push(END)] == ["", "Hi"]
    assert stream.stopped
    assert stream.flush() == ""


def test_an_incomplete_character_completes_a_stop_only_at_the_end(bundled: Tokenizer) -> None:
    first, *rest = bundled.encode("🎉")
    assert rest
    stream = TextStream(bundled, ("\ufffd",))
    assert "".join(stream_all(stream, [first, *rest])) == "🎉"
    assert not stream.stopped
    stream = TextStream(bundled, ("\ufffd",))
    assert "".join(stream_all(stream, [first])) == ""
    assert stream.stopped


def test_a_long_stop_is_found_in_time_that_grows_with_the_text(bundled: Tokenizer) -> None:
    """Self-similar stops are the worst case: each character is compared at most twice."""
    stop = "a" * 255 + "b"
    (one,) = bundled.encode("a")
    stream = TextStream(bundled, (stop,) * 16)
    shown = "".join(stream.push(one) for _ in range(400))
    assert shown == "a" * (400 - 255)
    assert stream.push(bundled.encode("b")[0]) == ""
    assert stream.stopped


# What the checkpoint says of its tokens ------------------------------------------------------------------------------

CONTENT = SMALL["wordpiece"]._tokenizer.to_str().encode()
WORDPIECE_END = 7


def conventions(**files: object) -> Conventions:
    """Those of a tokenizer whose ``<end>`` is token 7, with these files beside it."""
    contents = {
        name.replace("__", "."): content if isinstance(content, bytes) else json.dumps(content).encode()
        for name, content in files.items()
    }
    return Tokenizer(CONTENT, companions=contents).conventions


def test_the_bundled_model_ends_with_its_turn(bundled: Tokenizer) -> None:
    assert bundled.conventions.end_ids == {END}
    assert bundled.special_text(END) == bundled.conventions.named["eos_token"] == "<|im_end|>"
    assert bundled.conventions.chat_template is not None
    assert "add_generation_prompt" in bundled.conventions.chat_template


def test_a_packed_model_says_the_same(bundled: Tokenizer, bundled_packed: Path) -> None:
    packed = open_enclave(bundled_packed)
    assert packed.tokenizer_json is not None
    companions = read_companions(packed.directory, packed.manifest.files)
    assert Tokenizer(packed.tokenizer_json, companions=companions).conventions == bundled.conventions


def test_only_what_the_manifest_lists_is_read(bundled_packed: Path, tmp_path: Path) -> None:
    files = read_manifest(bundled_packed).files
    for name in ("config.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((bundled_packed / "enclave" / name).read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}', encoding="utf-8")
    assert set(read_companions(tmp_path, files)) == {"config.json", "tokenizer_config.json", "chat_template.jinja"}
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a"}', encoding="utf-8")
    with pytest.raises(WeightsError, match=r"tokenizer_config\.json of the packed model was changed"):
        read_companions(tmp_path, files)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(WeightsError, match=r"cannot read .*tokenizer_config\.json: No such file"):
        read_companions(tmp_path, files)


def test_a_file_too_large(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate((1 << 24) + 1)
    with pytest.raises(WeightsError, match="larger than 16 MiB"):
        read_companions(tmp_path, {"config.json": hashlib.sha256(b"").hexdigest()})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, set()),
        ({"config__json": {"eos_token_id": 3}}, {3}),
        ({"config__json": {"eos_token_id": None}}, set()),
        ({"config__json": {"eos_token_id": 3}, "generation_config__json": {"eos_token_id": [4, 5]}}, {4, 5}),
        ({"config__json": {"eos_token_id": 3}, "generation_config__json": {"temperature": 0.6}}, {3}),
        ({"config__json": {"eos_token_id": 3}, "tokenizer_config__json": {"eos_token": "<end>"}}, {3, WORDPIECE_END}),
        ({"tokenizer_config__json": {"eos_token": {"content": "<end>", "lstrip": False}}}, {WORDPIECE_END}),
        ({"tokenizer_config__json": {"eos_token": "<not in the vocabulary>"}}, set()),
    ],
    ids=str,
)
def test_end_ids(files: dict[str, object], expected: set[int]) -> None:
    assert conventions(**files).end_ids == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config__json": {"chat_template": "A"}}, "A"),
        ({"tokenizer_config__json": {"chat_template": "A"}, "chat_template__jinja": "Bé".encode()}, "Bé"),
        ({"tokenizer_config__json": {"chat_template": [{"name": "rag", "template": "R"}]}}, None),
        (
            {"tokenizer_config__json": {"chat_template": [{"name": "rag"}, {"name": "default", "template": "D"}]}},
            "D",
        ),
        ({"tokenizer_config__json": {}}, None),
    ],
    ids=str,
)
def test_chat_template(files: dict[str, object], expected: str | None) -> None:
    assert conventions(**files).chat_template == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config__json": {"eos_token_id": "two"}}, r"config\.json: eos_token_id is 'two'; expected a token id"),
        ({"config__json": {"eos_token_id": [1, -1]}}, "expected a token id or a list"),
        ({"config__json": {"eos_token_id": True}}, "expected a token id or a list"),
        ({"generation_config__json": b"{"}, r"generation_config\.json cannot be read as JSON"),
        ({"generation_config__json": b"[" * 100_000}, r"generation_config\.json cannot be read as JSON"),
        ({"tokenizer_config__json": b"[]"}, r"tokenizer_config\.json: expected a JSON object"),
        ({"tokenizer_config__json": {"eos_token": 7}}, "eos_token is no text"),
        ({"tokenizer_config__json": {"chat_template": 7}}, "chat_template is no text"),
        ({"chat_template__jinja": b"\xff"}, r"chat_template\.jinja is not UTF-8"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_malformed_companions(files: dict[str, object], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        conventions(**files)


def test_a_rendered_template_is_encoded_as_it_is() -> None:
    """No special token is added before what a chat template begins with itself."""
    raw = RawTokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="a"))  # noqa: S106
    raw.add_special_tokens(["<s>"])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = Tokenizer(raw.to_str().encode())
    assert tokenizer.encode("a") == [0, 1]
    assert tokenizer.encode_bare("<s>a") == [0, 1]

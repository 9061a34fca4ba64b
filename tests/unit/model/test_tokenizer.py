"""The tokenizer against transformers' own reading of the bundled GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer

from tsqp.errors import InputError, WeightsError
from tsqp.model.tokenizer import Tokenizer, find_tokenizer, read_tokenizer

TEXTS = {
    "plain": "The quick brown fox jumps over the lazy dog.",
    "digits": "In 1847 there were 12,345.678 kg, or 0x1F4 sacks: 3.14159 each.",
    "newlines": "first\n\nsecond\r\n\tthird   with   spaces \n",
    "code": "def f(x: int) -> int:\n    return x ** 2 if x != 0 else -1  # ok\n",
    "accents": "Ein Größenvergleich: naïve café, Ærøskøbing, İstanbul, e\u0301.",
    "chinese": "可信执行环境保护提示词，不可信的机器计算矩阵乘法。",
    "scripts": "Привет, мир! שלום עולם مرحبا नमस्ते こんにちは 안녕하세요",
    "emoji": "👩‍👩‍👧‍👦 said 🎉🏳️‍🌈 and 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "special": "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "control": "a\x00b\x07c\u200bd\ufeffe",
    "empty": "",
    "space": " ",
    "long": "word " * 3000,
}


@pytest.fixture(scope="module")
def ours(bundled_directory: Path) -> Tokenizer:
    return read_tokenizer(bundled_directory)


@pytest.fixture(scope="module")
def theirs(bundled_gguf: Path) -> Any:
    return AutoTokenizer.from_pretrained(bundled_gguf.parent, gguf_file=bundled_gguf.name, local_files_only=True)


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in TEXTS.items()])
def test_equals_transformers(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "special"])
def test_text_comes_back(ours: Tokenizer, name: str) -> None:
    assert ours.decode(ours.encode(TEXTS[name])) == TEXTS[name]


def test_any_text_equals_transformers(ours: Tokenizer, theirs: Any) -> None:
    @given(st.text(max_size=60))
    def check(text: str) -> None:
        assert ours.encode(text) == theirs(text)["input_ids"]

    check()


# Small tokenizers ----------------------------------------------------------------------------------------------------


def save_words(directory: Path, *, limited: bool = False) -> Path:
    """Save a tokenizer of five words, which truncates and pads if ``limited``."""
    words = {word: i for i, word in enumerate(("[UNK]", "one", "two", "three", "four"))}
    tokenizer = RawTokenizer(WordLevel(words, unk_token="[UNK]"))  # noqa: S106  no password
    tokenizer.pre_tokenizer = Whitespace()
    if limited:
        tokenizer.enable_truncation(2)
        tokenizer.enable_padding(length=8)
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_saved_truncation_and_padding_are_off(tmp_path: Path) -> None:
    """A prompt cut in silence would be a wrong answer."""
    tokenizer = read_tokenizer(save_words(tmp_path, limited=True))
    assert tokenizer.encode("one two three four") == [1, 2, 3, 4]
    assert tokenizer.encode("one") == [1]


@pytest.mark.parametrize("text", ["caf\udce9", "one \ud83d two", "\udfff"])
def test_a_text_that_is_not_utf8_is_refused_and_not_repeated(tmp_path: Path, text: str) -> None:
    """As Python reads such a command line."""
    tokenizer = read_tokenizer(save_words(tmp_path))
    place = next(index for index, letter in enumerate(text, 1) if "\ud800" <= letter <= "\udfff")
    for encode in (tokenizer.encode, tokenizer.encode_bare):
        with pytest.raises(InputError, match=f"not UTF-8 from character {place} on") as caught:
            encode(text)
        assert text not in str(caught.value)


def test_found_where_there_is_one(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) is None
    found = find_tokenizer(save_words(tmp_path))
    assert found is not None
    assert found.encode("two") == [2]


def test_missing_file_says_what_else_works(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no tokenizer\.json.*--tokens"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b'{"version": "1.0"}'], ids=["empty", "no-keys", "list", "not-utf8", "cut"]
)
def test_malformed_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(WeightsError, match=r"tokenizer\.json is not a tokenizer"):
        find_tokenizer(tmp_path)


def test_truncated_file(tmp_path: Path) -> None:
    file = save_words(tmp_path) / "tokenizer.json"
    whole = json.dumps(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(whole[: len(whole) // 2], encoding="utf-8")
    with pytest.raises(WeightsError, match="is not a tokenizer"):
        read_tokenizer(tmp_path)

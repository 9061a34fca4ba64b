"""What an answer is made of: every token once, at its place, and told when its text is."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import LOGPROB, byte_tokenizer

from tsqp.engine.api import Finished, PromptRead, Token, TokenLogprobs
from tsqp.errors import InputError, WeightsError
from tsqp.serve.chat_template import ChatTemplate
from tsqp.serve.choices import Choice, Prompt
from tsqp.serve.vocabulary import Vocabulary

VOCABULARY = Vocabulary(byte_tokenizer(), 258)
END = 257
SCORE = TokenLogprobs(LOGPROB, ((5, LOGPROB),))


def ids(text: str) -> tuple[int, ...]:
    return VOCABULARY.encode_bare(text)


def choice(*, echo: bool = False, text: str = "ab", hidden: int = 0, prefix: tuple[int, ...] = ()) -> Choice:
    return Choice(0, Prompt((*prefix, *ids(text)), text, hidden), VOCABULARY, echo=echo)


def token(number: int, text: str) -> Token:
    return Token(number, text, SCORE)


def test_a_token_that_is_held_back_is_told_with_its_text() -> None:
    following = choice()
    [first, second] = ids("xy")
    assert following.advance(token(first, "")) is None
    piece = following.advance(token(second, "xy"))
    assert piece is not None
    assert [(scored.id, scored.offset) for scored in piece.tokens] == [(first, 0), (second, 1)]


def test_tokens_of_a_stop_text_are_not_part_of_the_answer_and_an_end_token_is() -> None:
    [x, stop] = ids("x;")
    following = choice()
    following.advance(token(x, "x"))
    following.advance(token(stop, ""))
    piece = following.advance(Finished("stop", "", 2, 2))
    assert piece is not None
    assert (piece.tokens, piece.finish) == ((), "stop")
    following = choice()
    following.advance(token(x, "x"))
    following.advance(token(END, ""))
    piece = following.advance(Finished("stop", "", 2, 2))
    assert piece is not None
    assert [scored.id for scored in piece.tokens] == [END]


def test_bytes_of_a_character_that_never_ended_are_told_at_the_end() -> None:
    [first, second, _] = ids("\u3042")
    following = choice()
    assert following.advance(token(first, "")) is None
    assert following.advance(token(second, "")) is None
    piece = following.advance(Finished("length", "\ufffd", 2, 2))
    assert piece is not None
    assert [scored.id for scored in piece.tokens] == [first, second]
    assert (VOCABULARY.token_text(first), VOCABULARY.token_bytes(first)) == ("bytes:\\xe3", b"\xe3")


def test_an_echoed_prompt_has_all_its_tokens_also_those_the_tokenizer_put_there() -> None:
    following = choice(echo=True, text="a\u00e9b", hidden=1, prefix=(256,))
    scores = (TokenLogprobs(None), *[SCORE] * 4)
    piece = following.advance(PromptRead(scores))
    assert piece is not None
    assert piece.text == "a\u00e9b"
    assert [scored.offset for scored in piece.tokens] == [0, 0, 1, 1, 2]
    more = following.advance(token(ids("c")[0], "c"))
    assert more is not None
    assert [scored.offset for scored in more.tokens] == [3]


def test_what_the_tokenizer_puts_before_a_text_is_known() -> None:
    assert Vocabulary(byte_tokenizer(begins=True), 258).encode("a") == ((256, *ids("a")), 1)
    assert VOCABULARY.encode("a") == (ids("a"), 0)


def test_byte_level_tokens_are_the_bytes_they_stand_for() -> None:
    text = "a \n\u00e9\u3042\U0001f600"
    assert b"".join(VOCABULARY.token_bytes(number) for number in ids(text)) == text.encode()
    assert VOCABULARY.token_bytes(END) == b"<|im_end|>"


USER = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}", "<s>Hi"),
        ("{% for m in messages %}\n  {% if m.role == 'user' %}\nX\n  {% endif %}\n{% endfor %}", "X\n"),
        ("{% for m in messages %}{% break %}{% endfor %}{{ add_generation_prompt }}", "True"),
        ("{% generation %}{{ messages|tojson }}{% endgeneration %}", '[{"role": "user", "content": "Hi"}]'),
        ("{{ tools is none }}{{ strftime_now('%Y')|length }}", "True4"),
        ("{{ nothing }}", ""),
    ],
)
def test_templates_render_as_in_transformers(source: str, text: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template  # noqa: PLC0415  slow

    assert ChatTemplate(source, {"bos_token": "<s>"}).render(USER) == text
    theirs: Any = render_jinja_template([USER], chat_template=source, add_generation_prompt=True, bos_token="<s>")  # noqa: S106
    assert theirs[0] == [text]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{{ 1 // 0 }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(InputError, match="cannot render"):
        ChatTemplate(source, {}).render(USER)


def test_a_malformed_template_is_an_error_of_the_model() -> None:
    with pytest.raises(WeightsError, match="line 2"):
        ChatTemplate("\n{% for %}", {})

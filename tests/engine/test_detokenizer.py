"""Text that comes token by token: no half characters, no stop strings, nothing lost."""

import random
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from buddy_server.engine.detokenizer import Detokenizer


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """A token for every byte, as GPT-2 and Llama 3 spell them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """Letters, and bytes for the rest, as Llama 2 and Mistral spell them."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def pieces_of(tokenizer: Tokenizer, token_ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """What each token releases up to the stop, and at last what was held back; whether a stop string came."""
    detokenizer = Detokenizer(tokenizer, stop)
    pieces = []
    for token_id in token_ids:
        pieces.append(detokenizer.add(token_id))
        if detokenizer.stopped:
            break
    return [*pieces, detokenizer.flush()], detokenizer.stopped


@pytest.fixture(params=["byte_level", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", ["plain words", "naïve café", "🐦 sings 🎵🎶", "👩‍👩‍👧‍👦", "日本語\n🙂", "a  b   c"])
def test_pieces_make_the_text_and_none_is_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces, stopped = pieces_of(tokenizer, token_ids)
    assert "".join(pieces) == text == tokenizer.decode(token_ids)
    assert "\ufffd" not in "".join(pieces)
    assert not stopped


def test_emoji_appears_whole_with_its_last_byte(byte_level: Tokenizer) -> None:
    pieces, _ = pieces_of(byte_level, byte_level.encode("a🐦b").ids)
    assert pieces == ["a", "", "", "", "🐦", "b", ""]


def test_answer_cut_inside_a_character_shows_no_half_of_it(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("ok🐦", add_special_tokens=False).ids
    pieces, _ = pieces_of(tokenizer, token_ids[:-1])
    assert "".join(pieces) == "ok"


def test_special_tokens_have_no_text(byte_level: Tokenizer) -> None:
    token_ids = [*byte_level.encode("hi").ids, byte_level.token_to_id("<|end|>"), *byte_level.encode("!").ids]
    assert pieces_of(byte_level, token_ids)[0] == ["h", "i", "", "!", ""]


def test_special_tokens_that_a_request_wants_to_see_have_text(byte_level: Tokenizer) -> None:
    end = byte_level.token_to_id("<|end|>")
    detokenizer = Detokenizer(byte_level, ("nd|>!",), (end,))
    told = [detokenizer.add(token_id) for token_id in [*byte_level.encode("hi").ids, end, *byte_level.encode("!").ids]]
    assert (told, detokenizer.stopped) == (["h", "i", "<|e", ""], True)


def test_token_outside_the_vocabulary_has_no_text(tokenizer: Tokenizer) -> None:
    letter = tokenizer.encode("x", add_special_tokens=False).ids[0]
    assert pieces_of(tokenizer, [letter, 10**6, letter])[0] == ["x", "", "x", ""]


def test_bytes_that_are_no_text_stop_nobody(tokenizer: Tokenizer) -> None:
    """A model may say any token after any other; one request's must not fail the step of all."""
    rng = random.Random(0)
    words = tokenizer.encode("x x", add_special_tokens=False).ids
    for _ in range(200):
        token_ids = [rng.choice((words[0], rng.randrange(1, 256))) for _ in range(40)]
        text = "".join(pieces_of(tokenizer, [*token_ids, *words])[0])
        assert text.endswith("x x")
        assert text.count("x") >= token_ids.count(words[0]) + 2


def test_stop_string_across_token_boundaries_is_cut_out(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("one two three", add_special_tokens=False).ids
    pieces, stopped = pieces_of(tokenizer, token_ids, (" two",))
    assert (pieces, stopped) == (["o", "n", "e", "", "", "", "", ""], True)


def test_text_that_only_begins_like_a_stop_string_is_released_later(byte_level: Tokenizer) -> None:
    pieces, stopped = pieces_of(byte_level, byte_level.encode("abcabd").ids, ("abd",))
    assert (pieces, stopped) == (["", "", "abc", "", "", "", ""], True)
    pieces, stopped = pieces_of(byte_level, byte_level.encode("xab").ids, ("abd",))
    assert (pieces, stopped) == (["x", "", "", "ab"], False)


@pytest.mark.parametrize(
    ("text", "stop", "released"),
    [
        ("abcd", ("abcd", "bc"), "a"),
        ("abce", ("abcd", "bc"), "a"),
        ("abab!", ("abab!", "b!"), ""),
        ("aaab", ("aab",), "a"),
        ("xyz", ("yz", "y"), "x"),
        ("stop", ("stop", "stop"), ""),
        ("ok🐦no", ("🐦",), "ok"),
        ("a\n\nb", ("\n\n",), "a"),
        ("none", ("None",), "none"),
    ],
)
def test_overlapping_stop_strings_end_at_the_first_complete_one(
    byte_level: Tokenizer, text: str, stop: tuple[str, ...], released: str
) -> None:
    pieces, stopped = pieces_of(byte_level, byte_level.encode(text).ids, stop)
    assert "".join(pieces) == released
    assert stopped == (released != text)


def test_released_text_is_all_before_the_first_complete_stop_string(byte_level: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=20))
        stop = tuple("".join(rng.choices("ab", k=rng.randint(2, 6))) for _ in range(rng.randint(1, 3)))
        pieces, stopped = pieces_of(byte_level, byte_level.encode(text).ids, stop)
        released = "".join(pieces)
        ends = [match.end() for match in (re.search(string, text) for string in stop) if match]
        assert stopped == bool(ends)
        if stopped:
            read = text[: min(ends)]
            assert released == min((read.removesuffix(s) for s in stop if read.endswith(s)), key=len)
        else:
            assert released == text
        assert not any(string in released for string in stop)

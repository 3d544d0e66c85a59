"""TextStream: a request's text as its tokens come, whatever the tokenizer."""

import random
from types import SimpleNamespace

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PythonBackend

from cortexlab.engine.detokenizer import TextStream, wrapped

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁a", "▁the", "▁▁", "▁", "ing", "é", "日本", "a▁b", " ", ".", "<s>", "\ufffd", "<0x4>"]
PIECES = ["a", "##ing", "n", "'", "t", "s", "ve", "re", "m", ".", ",", "?", "!", "'s", "n't"]
PIECES += ["do", "not", "##", "[SEP]", "'m", "' ", " "]


def fast(names: list[str], decoder, model=models.BPE, **options) -> PreTrainedTokenizerFast:
    """Token i is ``names[i]``; a special token and an added one follow."""
    vocabulary = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(model(vocabulary, **({"merges": []} if model is models.BPE else {})))
    backend.decoder = decoder
    backend.add_special_tokens(["<|end|>"])
    backend.add_tokens(["an added one"])
    options = {"clean_up_tokenization_spaces": False} | options
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def byte_level() -> PreTrainedTokenizerFast:
    """Token i is byte i; then words, halves of characters and one across two characters."""
    by_code = sorted(pre_tokenizers.ByteLevel.alphabet())
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = dict(zip((b for b in range(256) if b not in kept), by_code[len(kept) :], strict=True))
    names |= {byte: chr(byte) for byte in kept}
    longer = [b" the", "日本".encode(), b"\xe6\x97", b"\x97\xa5\xe6", b"\x9f\x98 ", b".\n"]
    words = ["".join(names[byte] for byte in word) for word in longer]
    return fast([names[byte] for byte in range(256)] + words, decoders.ByteLevel())


def byte_fallback(*around, **options) -> PreTrainedTokenizerFast:
    """Token i is byte i, as in Llama 2; then words. ``around``: decoders before and after."""
    before, after = around or ([decoders.Replace("▁", " ")], [decoders.Strip(" ", 1, 0)])
    chain = [*before, decoders.ByteFallback(), decoders.Fuse(), *after]
    return fast(BYTES + WORDS, decoders.Sequence(chain), **options)


class Slow(PythonBackend):
    """A tokenizer in Python, whose words are joined by ``glue`` and then lose ``lost``."""

    def __init__(self, names, glue, lost, put="", **options):
        self.names, self.how = names, (glue, lost, put)
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(self.names)

    def get_vocab(self):
        return {name: i for i, name in enumerate(self.names)}

    def _tokenize(self, text):
        raise ValueError("reads no text")

    def _convert_token_to_id(self, token):
        return self.names.index(token) if token in self.names else None

    def _convert_id_to_token(self, index):
        return self.names[index]

    def convert_tokens_to_string(self, tokens):
        glue, lost, put = self.how
        return glue.join(tokens).replace(lost, put).strip()


CLEAN = {"clean_up_tokenization_spaces": True}
FORCED = {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
KINDS = {
    "byte level": byte_level,
    "byte level, not cleaned": lambda: fast([*".,'ns?Ġ"], decoders.ByteLevel(), **CLEAN),
    "byte level, cleaned": lambda: fast([*".,'nstĠ"], decoders.ByteLevel(), **CLEAN | FORCED),
    "byte fallback": byte_fallback,
    "byte fallback, unstripped": lambda: byte_fallback([decoders.Replace("▁", " ")], []),
    "byte fallback, plain": lambda: byte_fallback([], []),
    "byte fallback, cleaned": lambda: byte_fallback(**CLEAN | FORCED),
    "no byte fallback": lambda: fast(BYTES + WORDS, decoders.Fuse()),
    "metaspace": lambda: fast(WORDS, decoders.Metaspace()),
    "word pieces": lambda: fast(PIECES, decoders.WordPiece(cleanup=False), models.WordPiece),
    "word pieces, clean": lambda: fast(PIECES, decoders.WordPiece(), models.WordPiece),
    "word pieces, cleaned": lambda: fast(
        PIECES, decoders.WordPiece(cleanup=False), models.WordPiece, **CLEAN
    ),
    "suffix": lambda: fast(["low", "er</w>", "a", "</w>", ".</w>"], decoders.BPEDecoder("</w>")),
    "no decoder": lambda: fast(PIECES, None, models.WordPiece),
    "slow": lambda: Slow(PIECES, " ", " ##", **CLEAN),
    "slow, joined": lambda: Slow(["lo@@", "w", "er@@", "a", "@@"], " ", "@@ "),
    "slow, suffix": lambda: Slow(["low", "er</w>", "a", ".</w>"], "", "</w>", " "),
}


def read(tokenizer, tokens, stop=()) -> tuple[list[str], bool]:
    """The segments shown after each token and at the end, up to a stop string."""
    stream, segments = TextStream(tokenizer, stop), []
    for count in range(1, len(tokens) + 1):
        stream.state, text, stopped = stream.after(tokens, count)
        segments.append(text)
        if stopped:
            return segments, True
    stream.state, text, stopped = stream.rest(tokens, len(tokens))
    return [*segments, text], stopped


def some(rng: random.Random, tokenizer, longest: int = 60) -> list[int]:
    """Random tokens, with runs of the same and of few, and now and then one that has no name."""
    size = len(tokenizer) + (0 if isinstance(tokenizer, Slow) else 2)
    few = rng.choice([range(size), rng.sample(range(size), min(size, rng.randint(1, 6)))])
    tokens = [rng.choice(few) for _ in range(rng.randint(0, longest))]
    if size > 256 and rng.random() < 0.7:  # characters of two to four bytes, whole or cut
        for _ in range(rng.randint(1, 8)):
            at = rng.randint(0, len(tokens))
            tokens[at:at] = "".join(rng.choices("é日本😀 .'n", k=4)).encode()[: rng.randint(1, 12)]
    return tokens[:longest]


@pytest.mark.parametrize("kind", KINDS)
def test_the_segments_are_the_text_that_the_tokenizer_decodes(kind):
    tokenizer, rng = KINDS[kind](), random.Random(7)
    for _ in range(400):
        tokens = some(rng, tokenizer)
        segments, _ = read(tokenizer, tokens)
        assert "".join(segments) == tokenizer.decode(tokens), tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_ends_the_text_at_the_token_that_completes_it(kind):
    tokenizer, rng = KINDS[kind](), random.Random(8)
    for _ in range(200):
        tokens = some(rng, tokenizer)
        text = tokenizer.decode(tokens).replace("\ufffd", "").replace("@@", "")
        stops = [text[at : at + rng.randint(1, 4)] for at in rng.choices(range(len(text) + 1), k=2)]
        stops = [stop for stop in stops if stop]
        segments, stopped = read(tokenizer, tokens, stops)
        assert ("".join(segments), stopped) == first_stop(tokenizer, tokens, stops), (tokens, stops)


def first_stop(tokenizer, tokens, stops) -> tuple[str, bool]:
    """The same by decoding everything after each token."""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count])
        if found := [at for stop in stops if (at := text.find(stop)) >= 0]:
            return text[: min(found)], True
    return tokenizer.decode(tokens), False


# --- stories --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_token_i_is_byte_i(kind):
    assert KINDS[kind]().decode(list("日本語 x".encode())) == "日本語 x"


def test_half_a_character_waits_for_the_rest_of_it():
    assert read(byte_level(), list("né\n".encode()))[0] == ["n", "", "é", "\n", ""]
    assert read(byte_level(), [110, 0xC3])[0] == ["n", "", "\ufffd"]


def test_a_run_of_byte_tokens_waits_for_its_end_since_one_invalid_byte_spoils_all_of_it():
    tokenizer, the = byte_fallback(), 257
    assert read(tokenizer, [the, *"é!".encode(), the])[0] == ["the", "", "", "", "é! the", ""]
    assert read(tokenizer, [the, *b"hi\xff", the])[0] == [
        "the",
        "",
        "",
        "",
        "\ufffd" * 3 + " the",
        "",
    ]


def test_a_token_outside_the_vocabulary_does_not_end_a_run_of_bytes():
    assert read(byte_fallback(), [0xC3, 9999, 0xA9, 257])[0] == ["", "", "", "é the", ""]


def test_a_stop_string_is_seen_inside_a_run_of_bytes():
    assert read(byte_fallback(), list("日本語".encode()), ["本"]) == ([*[""] * 5, "日"], True)
    assert read(byte_fallback(), [257, *b" ab"], ["e a"]) == (["th", "", ""], True)


def test_a_stop_string_is_not_seen_in_a_run_that_an_invalid_byte_spoils():
    assert read(byte_fallback(), list(b"\xffstop"), ["stop"]) == ([*[""] * 5, "\ufffd" * 5], False)


def test_spaces_are_cleaned_up_when_it_is_known_what_follows_them():
    tokenizer = KINDS["word pieces, cleaned"]()
    tokens = tokenizer.convert_tokens_to_ids(["do", "n", "'", "t", "a", "."])
    assert read(tokenizer, tokens)[0] == ["do", "", "", "n't", " a", ".", ""]


def test_words_joined_by_a_sign_wait_for_the_next():
    assert read(KINDS["slow, joined"](), [0, 1, 3])[0] == ["lo", "w", " a", ""]


def test_the_possible_beginning_of_a_stop_string_waits_and_is_shown_if_it_is_none():
    assert read(byte_level(), list(b"abcabd"), ["abd"]) == (["", "", "abc", "", "", ""], True)
    assert read(byte_level(), list(b"xab"), ["abd"]) == (["x", "", "", "ab"], False)


def test_of_several_stop_strings_the_earliest_place_wins():
    assert read(byte_level(), [97, 256], ["e", " t", "the"]) == (["a", ""], True)


def test_a_stop_string_that_waited_is_found_at_the_end():
    stream = TextStream(byte_level(), ["\ufffd"])
    state, text, stopped = stream.rest([97, 0xC3], 2)
    assert (text, stopped, state.stopped) == ("a", True, True)


def test_a_tokenizer_need_only_decode_and_a_token_may_change_how_later_ones_are_written():
    def decode(tokens):
        """Token 0 turns capitals on and off."""
        parts = bytes(tokens).split(b"\0")
        return b"".join([part.upper() if i % 2 else part for i, part in enumerate(parts)]).decode()

    tokens = list(b"on\0" + b"capital" * 9 + b"\0" + b"small" * 9)
    assert "".join(read(SimpleNamespace(decode=decode), tokens)[0]) == decode(tokens)


# --- state ----------------------------------------------------------------------------------------


def test_a_step_can_be_done_again_after_an_error_anywhere_in_it():
    tokenizer, tokens = Failing(byte_fallback()), [257, *"日本".encode(), 256, *b"\xff", 258] * 9
    stream, shown = TextStream(tokenizer, ["no such"]), ""
    for count in range(1, len(tokens) + 1):
        for calls in range(3):
            tokenizer.calls = calls
            before = stream.state
            try:
                assert stream.after(tokens, count) == stream.after(tokens, count)
            except InterruptedError:
                assert stream.state is before
        tokenizer.calls = 99
        stream.state, text, _ = stream.after(tokens, count)
        shown += text
    assert shown + stream.rest(tokens, len(tokens))[1] == tokenizer.decode(tokens)


class Failing:
    """A tokenizer that fails after ``calls`` more calls, and notes the longest list it decodes."""

    def __init__(self, tokenizer, calls: int = 1 << 30):
        self.tokenizer, self.calls, self.longest, self.decoded = tokenizer, calls, 0, 0

    def _called(self, method, given):
        if (calls := self.calls) == 0:
            raise InterruptedError
        self.calls = calls - 1
        return getattr(self.tokenizer, method)(given)

    def convert_ids_to_tokens(self, token):
        return self._called("convert_ids_to_tokens", token)

    def decode(self, tokens):
        self.longest = max(self.longest, len(tokens))
        self.decoded += len(tokens)
        return self._called("decode", tokens)


def test_tokens_may_come_several_at_a_time_and_none_is_shown_twice():
    tokens = list("a日本 b".encode())
    stream = TextStream(byte_level())
    stream.state, text, _ = stream.after(tokens, 5)
    assert text == "a日"
    stream.state, text, _ = stream.after(tokens, 5)
    assert text == ""
    stream.state, text, _ = stream.rest(tokens, len(tokens))
    assert text == "本 b"
    assert stream.rest(tokens, len(tokens)) == (stream.state, "", False)


def test_nothing_is_shown_after_a_stop_string_nor_of_no_tokens():
    stream, tokens = TextStream(byte_level(), ["h"]), [256, 97, 98]
    assert stream.rest([], 0)[1:] == ("", False)
    stream.state, text, stopped = stream.after(tokens, 2)
    assert (text, stopped) == (" t", True)
    assert stream.after(tokens, 3)[1:] == stream.rest(tokens, 3)[1:] == ("", True)


# --- cost -----------------------------------------------------------------------------------------

LONG = {
    "one line": (byte_level, list(b"hello there, world ") * 211),
    "random bytes": (byte_level, random.Random(3).choices(range(256), k=4000)),
    "tokens across characters": (byte_level, [259] * 4000),
    "words": (byte_fallback, [257, 260, 256, 258] * 1000),
    "short runs of bytes": (byte_fallback, [*"日本語".encode(), 257] * 400),
}


@pytest.mark.parametrize("name", LONG)
def test_no_more_tokens_are_decoded_together_late_than_early(name):
    make, tokens = LONG[name]
    longest = {}
    for count in (400, 4000):
        tokenizer = Failing(make())
        read(tokenizer, tokens[:count], ["no such"])
        longest[count] = tokenizer.longest
    assert longest[4000] == longest[400] < 60


@pytest.mark.parametrize("first", [b"", b"\xff"])
def test_a_long_run_of_bytes_is_decoded_once_valid_or_not(first):
    tokenizer = byte_fallback()
    counting, tokens = Failing(tokenizer), [*first, *"日本語é".encode() * 363, 257]
    segments, _ = read(counting, tokens, ["no such", *(["本"] if first else [])])
    assert "".join(segments) == tokenizer.decode(tokens)
    assert counting.decoded < 4 * len(tokens)


# --- wrapping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokenizer_is_wrapped_once_for_its_end_tokens_and_streams_the_same(kind):
    plain = KINDS[kind]()
    plain.eos_token = plain.convert_ids_to_tokens(0)
    tokenizer = wrapped(plain)
    assert wrapped(tokenizer) is tokenizer
    assert tokenizer.eos_token_ids == {0}
    tokens = some(random.Random(9), plain)
    assert read(tokenizer, tokens) == read(plain, tokens)


def test_a_wrapper_made_by_mlx_lm_stays():
    tokenizer = TokenizerWrapper(byte_level())
    assert wrapped(tokenizer) is tokenizer

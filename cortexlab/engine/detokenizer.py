"""Tokens as text while they come, and the strings at which a request stops."""

import codecs
import re
from collections.abc import Sequence
from typing import NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import BadInput, shown

WINDOW, KEPT = 24, 8  # tokens decoded together, runs of bytes apart; those kept of them
UNSURE = re.compile("(\ufffd{1,3}|@@)\\Z")  # an end that the next token may change
BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
CLEANED = " n'vr"  # of the strings that are cleaned up, all but the last character
FORCED = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


class TextState(NamedTuple):
    """How far a stream has come. Its text is what was shown, then ``held``, then ``raw``."""

    count: int = 0  # tokens read
    start: int = 0  # first token of the window, which is decoded together
    passed: int = 0  # characters of the window's text that came into `raw`
    raw: str = ""  # may still be cleaned up
    held: str = ""  # may be the beginning of a stop string
    tail: str = ""  # end of the text, as if a run of bytes ended here
    half: bytes | None = b""  # of the run's last character; None: the run is not UTF-8
    stopped: bool = False


class TextStream:
    """Text of one request's output, exactly as the tokenizer decodes the whole. Its methods change
    nothing: the caller sets ``state`` to the one returned.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self.state = TextState()
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=1)
        self._name = getattr(tokenizer, "convert_ids_to_tokens", str)
        self._raw, self._clean = {}, str
        if _cleans(tokenizer):
            self._raw = {"clean_up_tokenization_spaces": False}
            self._clean = tokenizer.clean_up_tokenization

    def after(self, tokens: list[int], count: int) -> tuple[TextState, str, bool]:
        """The state after ``tokens[:count]``, the text to show now, and whether a stop string has
        come: it and what follows are never shown. What more tokens may change waits for them.
        """
        state, text = self.state, ""
        while state.count < count and not state.stopped:
            state, more = self._next(state._replace(count=state.count + 1), tokens)
            text += more
        return state, text, state.stopped

    def rest(self, tokens: list[int], count: int) -> tuple[TextState, str, bool]:
        """As `after`, with all that waits: no more tokens come."""
        state, text, stopped = self.after(tokens, count)
        if not stopped:
            state, more = self._read(state, tokens, last=True)
            text += more
        return state, text, state.stopped

    def _next(self, state: TextState, tokens: list[int]) -> tuple[TextState, str]:
        """One invalid byte makes a whole run of byte tokens replacement characters, so a run is
        read at its end: after it, or where a stop string is complete.
        """
        byte, half = self._byte(tokens[state.count - 1]), state.half
        if byte is None:
            return self._read(state, tokens)
        if half is None:
            return state, ""
        try:
            text, used = codecs.utf_8_decode(half + byte, "strict", False)
        except UnicodeDecodeError:
            return state._replace(half=None), ""
        tail = (state.tail + text)[-self._longest :]
        if text and any(stop in tail for stop in self._stop):
            then, shown = self._read(state, tokens)
            if then.stopped:
                return then, shown
        return state._replace(tail=tail, half=(half + byte)[used:]), ""

    def _read(self, state: TextState, tokens: list[int], last=False) -> tuple[TextState, str]:
        window = self._decode(tokens[state.start : state.count])
        unsure = None if last else UNSURE.search(window)
        passed = max(state.passed, unsure.start() if unsure else len(window))
        raw = state.raw + window[state.passed : passed]
        space = raw.find(" ", len(raw.rstrip(CLEANED))) if self._raw and not last else -1
        sure = space if space >= 0 else len(raw)
        text, raw = state.held + self._clean(raw[:sure]), raw[sure:]
        whole = text + self._clean(raw)
        if found := [at for stop in self._stop if (at := whole.find(stop)) >= 0]:
            return state._replace(stopped=True), whole[: min(found)]
        held = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        text, held = text[: len(text) - held], text[len(text) - held :]
        start, passed = self._window(state, tokens, window, passed)
        return TextState(state.count, start, passed, raw, held, whole[-self._longest :]), text

    def _window(self, state: TextState, tokens: list[int], window: str, passed: int):
        """Start of the next window and the characters passed in it: it may begin otherwise than
        the same tokens did before, but must end so.
        """
        if (count := state.count) - state.start > WINDOW:
            near = (at for at in range(count - KEPT, count) if self._byte(tokens[at]) is None)
            start = next(near, count)
            text = self._decode(tokens[start:count])
            now = len(text) - (len(window) - passed)
            if now > 0 and window.endswith(text[now // 2 :]):
                return start, now
        return state.start, passed

    def _byte(self, token: int) -> bytes | None:
        """A byte token's byte, ``b""`` for a token that the vocabulary lacks, None for others."""
        if (name := self._name(token)) is None:
            return b""
        byte = BYTE.fullmatch(str(name))
        return bytes.fromhex(byte[1]) if byte and self._decode([token]) != name else None

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, **self._raw)


def wrapped(tokenizer) -> TokenizerWrapper:
    """mlx-lm's tokenizer around a plain one, without its own detokenizer, which encodes a text
    that not every tokenizer can.
    """
    if isinstance(tokenizer, TokenizerWrapper):
        return tokenizer
    if not all(callable(getattr(tokenizer, name, None)) for name in ("encode", "decode")):
        raise BadInput(f"tokenizer must encode and decode, not {shown(tokenizer)}")
    return TokenizerWrapper(tokenizer, detokenizer_class=lambda _: None)


def _cleans(tokenizer) -> bool:
    """Whether decoding cleans up spaces: not for BPE, unless forced."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)) and (
        type(model).__name__ != "BPE" or getattr(tokenizer, FORCED, False)
    )


def _overlap(text: str, stop: str) -> int:
    """The longest end of ``text`` that is the beginning of ``stop``, but not all of it."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )

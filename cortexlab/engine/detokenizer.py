"""Tokens as text while they come, and the strings at which a request stops."""

from collections.abc import Sequence

from mlx_lm.tokenizer_utils import TokenizerWrapper


class TextStream:
    """Detokenizes one request's output; a possible beginning of a ``stop`` string is held back."""

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self._detokenizer = wrapped(tokenizer).detokenizer
        self._detokenizer.reset()
        self._stop = tuple(stop)
        self._held = ""  # read, but not shown

    def add(self, token: int) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string has come: it and what follows
        it are never shown.
        """
        self._detokenizer.add_token(token)
        return self._shown(self._detokenizer.last_segment)

    def finish(self) -> tuple[str, bool]:
        """As `add`, for the text left after the last token."""
        self._detokenizer.finalize()
        text, stopped = self._shown(self._detokenizer.last_segment)
        if not stopped:
            text, self._held = text + self._held, ""
        return text, stopped

    def _shown(self, segment: str) -> tuple[str, bool]:
        text = self._held + segment
        if found := [at for stop in self._stop if (at := text.find(stop)) >= 0]:
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def wrapped(tokenizer):
    """mlx-lm's tokenizer, which has a detokenizer, around a plain one."""
    return tokenizer if hasattr(tokenizer, "detokenizer") else TokenizerWrapper(tokenizer)


def _overlap(text: str, stop: str) -> int:
    """The longest end of ``text`` that is the beginning of ``stop``, but not all of it."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )

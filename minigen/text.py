"""From token ids to text as they come: whole characters only, stop strings cut off."""

from collections.abc import Sequence

from minigen.weights.tokenizer import Tokenizer


class TextStream:
    """Text of one sample. It only grows: what may become a stop string is held back.

    Without stop strings tokens are decoded when the text is read: at the end, all at once, in a
    sixth of the time that it takes after each of them.

    Args:
        tokenizer: None gives empty text.
        stop: strings that end the sample.
        include_stop: whether the stop string stays in the text.
        prompt_ids: what the text continues; stop strings are not looked for in it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: Sequence[str],
        include_stop: bool,
        skip_special_tokens: bool,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self._stream = tokenizer.stream(skip_special_tokens, prompt_ids) if tokenizer else None
        self._stop, self._include_stop = stop, include_stop
        self._all = ""
        self._num_shown = 0
        self._unread: list[int] = []  # tokens that are not in `_all` yet

    def read(self) -> str:
        """The text so far."""
        if self._unread and self._stream:
            self._all += self._stream.push_all(self._unread)
            self._num_shown = len(self._all)
            self._unread.clear()
        return self._all[: self._num_shown]

    def push(self, token_id: int, may_stop: bool = True) -> str | None:
        """Takes a token -> the stop string that ended the text, if one did."""
        if not self._stop:
            self._unread.append(token_id)
            return None
        return self._take(self._stream.push(token_id), may_stop) if self._stream else None

    def flush(self, may_stop: bool = True) -> str | None:
        """No token follows: shows what was held back -> the stop string found in it, if any."""
        self.read()
        found = self._take(self._stream.flush(), may_stop) if self._stream else None
        if found is None:
            self._num_shown = len(self._all)
        return found

    def _take(self, piece: str, may_stop: bool) -> str | None:
        # A stop string that is new must end in the new piece.
        searched = len(self._all)
        self._all += piece
        if may_stop:
            hits = []
            for stop in self._stop:
                at = self._all.find(stop, max(self._num_shown, searched - len(stop) + 1))
                if at >= 0:
                    hits.append((at + len(stop), at, stop))
            if hits:
                end, start, stop = min(hits)
                self._all = self._all[: end if self._include_stop else start]
                self._num_shown = len(self._all)
                return stop
        held = max((self._overlap(stop) for stop in self._stop), default=0)
        self._num_shown = max(self._num_shown, len(self._all) - held)
        return None

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        for length in range(min(len(stop) - 1, len(self._all)), 0, -1):
            if self._all.endswith(stop[:length]):
                return length
        return 0

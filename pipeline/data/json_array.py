"""Reads the elements of a JSON array that is too large for memory, one after another."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

CHUNK = 2**20  # characters that are read at a time
SPACE = re.compile(r"[ \t\n\r]*")
LONGEST_TOKEN = 12  # characters: an escaped surrogate pair


class BadArray(Exception):
    """The text is not a JSON array."""


class TooLarge(Exception):
    """An element is larger than allowed."""


class JsonArray:
    """The elements of an array. Memory is bounded by twice the largest element.

    Args:
        text: the beginning of the array, after the opening bracket.
        pieces: the rest of it, in pieces of any size.
        limit: characters of the largest element that is allowed.

    Attributes:
        number: of the last element that was returned, from 1.
    """

    def __init__(self, text: str, pieces: Iterator[str], limit: int) -> None:
        self._text, self._pieces, self._limit = text, pieces, limit
        self._at = self.number = 0
        self._decoder = json.JSONDecoder()

    def __iter__(self) -> Iterator[Any]:
        """Raises BadArray, TooLarge, and as ``json.loads`` does ValueError and RecursionError."""
        while (mark := self._next_mark()) != "]":
            if self.number and mark != ",":
                raise BadArray(f"after it, {mark!r} follows instead of a comma" if mark else "the array is not closed")
            self._at += self.number > 0
            self._next_mark()
            self.number += 1
            yield self._element()
        self._at += 1
        if self._next_mark():
            raise BadArray("something follows the end of the array")

    def _next_mark(self) -> str:
        """Skips white space and returns the character that follows, or an empty string at the end."""
        while True:
            space = SPACE.match(self._text, self._at)
            assert space is not None, "the pattern matches an empty string"
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more(CHUNK):
                return ""

    def _read_more(self, size: int) -> bool:
        """Adds text until there are ``size`` characters. Returns whether there was any more."""
        parts = [self._text[self._at :]]
        length = len(parts[0])
        while length < size and (piece := next(self._pieces, "")):
            parts.append(piece)
            length += len(piece)
        self._text, self._at = "".join(parts), 0
        return len(parts) > 1

    def _element(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # If the text just ends too early, there may be more. Otherwise it is wrong however it continues.
                ends = error.pos >= len(self._text) - LONGEST_TOKEN or error.msg.startswith("Unterminated string")
                size = len(self._text) - self._at
                if ends and size > self._limit:
                    raise TooLarge from error
                if not (ends and self._read_more(max(2 * size, CHUNK))):
                    raise BadArray(f"it is not JSON ({error.msg})") from error
            else:
                if end - self._at > self._limit:
                    raise TooLarge
                self._at = end
                return value

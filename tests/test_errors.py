"""Messages to users."""

from __future__ import annotations

import pytest

from pipeline.errors import UserError, first_few


@pytest.mark.parametrize(
    ("quoted", "shown"), [("gr\udcfc\udcdfe", r"gr\udcfc\udcdfe"), ("\x1b[2J", r"\x1b[2J"), ("größe\n😀", "größe\n😀")]
)
def test_what_messages_quote_is_printable(quoted: str, shown: str) -> None:
    error = UserError(setting="model.path", value=quoted, rule=f"it has {quoted}", remedy=f"Remove {quoted}.")
    assert (error.value, error.rule, error.remedy) == (shown, f"it has {shown}", f"Remove {shown}.")
    assert str(error).encode()


def test_a_message_names_the_first_few_and_counts_the_rest() -> None:
    assert [first_few("abcde"[:count]) for count in (0, 1, 3, 5)] == ["", "a", "a, b, c", "a, b, c and 2 more"]
    assert first_few("abc", 2, separator="; ") == "a; b; and 1 more"

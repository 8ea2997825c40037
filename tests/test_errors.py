"""Messages to users."""

from __future__ import annotations

import pytest

from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("quoted", "shown"), [("gr\udcfc\udcdfe", r"gr\udcfc\udcdfe"), ("\x1b[2J", r"\x1b[2J"), ("größe\n😀", "größe\n😀")]
)
def test_what_messages_quote_is_printable(quoted: str, shown: str) -> None:
    error = UserError(setting="model.path", value=quoted, rule=f"it has {quoted}", remedy=f"Remove {quoted}.")
    assert (error.value, error.rule, error.remedy) == (shown, f"it has {shown}", f"Remove {shown}.")
    assert str(error).encode()

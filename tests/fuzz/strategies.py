"""Odd values of the kinds that files and command lines contain."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

# Mostly ASCII, with what JSON, Jinja, Hydra and terminals treat specially.
ODD_CHARACTERS = "aZ0 \t\n\r\"'\\/{}[]()<>|:;,.=~$%#@!?*+-_\0\x07\x1b\x7f\x85\xa0é\u2028\ufeff\u202e😀\ud800\udfff"
characters = st.sampled_from(ODD_CHARACTERS) | st.characters(codec="utf-8")
texts = st.text(characters, max_size=12)
numbers = (
    st.sampled_from([0, 1, -1, 2, 4, 64, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30]) | st.integers()
)
# Without subnormal numbers, which libraries that other tests import make the processor round to zero.
reals = st.sampled_from([0.0, -0.0, 0.5, 1.0, 1e308, 1e-307, float("inf"), float("-inf"), float("nan")]) | st.floats(
    allow_subnormal=False
)
scalars = st.none() | st.booleans() | numbers | reals | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
# As they are written in JSON: also what json.dumps does not write.
LITERALS = ["1e999", "-1e999", "NaN", "Infinity", "-0", "-0.0", "1E2", "1.0", "01", "+1", "0x10", "1_0", '"\\ud800"',
    '"\\u0000"',
            "9" * 5000, "[" * 900 + "]" * 900, "[" * 5000 + "]" * 5000, '{"a":' * 400 + "1" + "}" * 400, "", "nul",
            "'a'", "[1,]", "// a"]  # fmt: skip


@st.composite
def literals(draw: st.DrawFn) -> str:
    """A JSON value as text, valid or not."""
    if draw(st.integers(0, 7)) == 0:
        return draw(st.sampled_from(LITERALS))
    return json.dumps(draw(values), ensure_ascii=draw(st.booleans()))


def object_text(pairs: list[tuple[str, str]], separator: str = ", ") -> str:
    """A JSON object of literals, in which names may repeat."""
    return "{" + separator.join(f"{json.dumps(name)}: {literal}" for name, literal in pairs) + "}"


def encoded(text: str) -> bytes:
    """UTF-8, in which a lone surrogate is invalid."""
    return text.encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The content of a file with at most one accident: another encoding, or bytes that were lost, added or changed."""
    accident = draw(
        st.sampled_from(["none"] * 4 + ["cut", "insert", "change", "repeat", "bom", "utf-16", "latin-1", "append"])
    )
    at = draw(st.integers(0, len(content)))
    added = draw(st.binary(min_size=1, max_size=4) | st.sampled_from([b"\0", b"}", b",", b"\n", b" ", b"\xff", b'"']))
    match accident:
        case "cut":
            return content[:at]
        case "insert":
            return content[:at] + added + content[at:]
        case "change":
            return content[:at] + added + content[at + len(added) :]
        case "repeat":
            return content + content
        case "bom":
            return b"\xef\xbb\xbf" + content
        case "utf-16" | "latin-1":
            return content.decode("utf-8", "replace").encode(accident, "replace")
        case "append":
            return content + added
    return content


def plain(value: Any) -> str:
    """Represents a value so that NaN equals itself, and 1, 1.0 and True differ."""
    return repr(value)

"""Records as conversations for instruction tuning: a list of messages, each with ``role`` and ``content``.

Three formats are told apart by their columns:

    messages     {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    alpaca       {"instruction": ..., "input": ..., "output": ...}      (input may be missing or empty)
    completion   {"prompt": ..., "completion": ...}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any

from pipeline.data.files import Record
from pipeline.errors import UserError

Message = dict[str, str]
Conversation = list[Message]

ROLES = ("system", "user", "assistant")
REMEDY = "Correct or remove that record; of a data set of the hub, in a copy of yours (kind: files)."


def turn(prompt: str, answer: str) -> Conversation:
    """One question with its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def conversation_of(record: Record, setting: str) -> Conversation:
    """The record's messages; none, which is dropped and counted as blank, where a content is null.

    Args:
        setting: the source's dotted name, ``data.instructions``.

    Raises:
        UserError: the columns are of no known format, a role is unknown, or content is not text.
    """
    row = record.value if isinstance(record.value, dict) else {}
    for columns, convert in FORMATS.items():
        if set(columns) <= set(row):
            return _checked(convert(row), record.where, setting)
    raise UserError(
        setting=f"{setting}.path",
        value=record.where,
        rule=f"its columns are {', '.join(row) or 'none (it is plain text)'}, which is no known conversation format",
        remedy="Known are messages; instruction, input, output; prompt, completion.",
    )


def _from_messages(row: Mapping[str, Any]) -> Any:
    return row["messages"]


def _from_alpaca(row: Mapping[str, Any]) -> Any:
    parts = [row["instruction"], row.get("input") or ""]
    return [_message("user", "\n\n".join(part for part in parts if part)), _message("assistant", row["output"])]


def _from_completion(row: Mapping[str, Any]) -> Any:
    return [_message("user", row["prompt"]), _message("assistant", row["completion"])]


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


FORMATS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Any]] = {
    ("messages",): _from_messages,
    ("instruction", "output"): _from_alpaca,
    ("prompt", "completion"): _from_completion,
}


def _checked(messages: Any, where: str, setting: str) -> Conversation:
    """The messages with nothing but role and content, both known to be good."""
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise _malformed(where, setting, "its messages must be a list of objects")
    for message in messages:
        if message.get("role") not in ROLES:
            raise _malformed(where, setting, f"the role {message.get('role')!r} is none of {', '.join(ROLES)}")
        if "content" not in message or not isinstance(message["content"], (str, NoneType)):
            raise _malformed(where, setting, f"the content of a {message['role']} message must be text")
    if any(message["content"] is None for message in messages):  # a call of a tool, say: nothing to answer or learn
        return []
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _malformed(where: str, setting: str, rule: str) -> UserError:
    return UserError(setting=f"{setting}.path", value=where, rule=rule, remedy=REMEDY)


# --------------------------------------------------------------------------------------------------
# Records as documents for continual pre-training: one text each.


def text_of(record: Record, text_field: str | None, setting: str) -> str:
    """The record's text; empty, which is dropped and counted as blank, where the column holds null.

    Args:
        text_field: the column that holds it; not used where the record is a text.
        setting: the source's dotted name, ``data.corpus``.

    Raises:
        UserError: the column is missing or holds something else than text.
    """
    if isinstance(record.value, str):
        return record.value
    if text_field is None or text_field not in record.value:
        raise UserError(
            setting=f"{setting}.text_field",
            value=text_field,
            rule=f"{record.where} has no such column; it has {', '.join(record.value)}",
            remedy=f"Set {setting}.text_field to the column that holds the text.",
        )
    text = "" if record.value[text_field] is None else record.value[text_field]
    if not isinstance(text, str):
        raise UserError(
            setting=f"{setting}.text_field",
            value=text_field,
            rule=f"{record.where} holds {type(text).__name__} there, and a document must be text",
            remedy=f"Set {setting}.text_field to the column that holds the text.",
        )
    return text

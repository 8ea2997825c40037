"""Examples to train on, and their conversion from the records of a source.

A record becomes a document (a text, for continued pre-training) or a conversation (a list of messages with ``role`` and
``content``, for instruction tuning). Three conversation formats are recognized by their columns:

    messages     {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    alpaca       {"instruction": ..., "input": ..., "output": ...}      (input may be missing or empty)
    completion   {"prompt": ..., "completion": ...}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal

from pipeline.data.files import Record
from pipeline.errors import UserError

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

Message = dict[str, str]
Conversation = list[Message]

CHAT_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """One document or one conversation.

    Attributes:
        content: the text of a document, or the messages of a conversation.
        split: the split that the source itself assigns, or None if it has no splits of its own.
    """

    content: str | Conversation
    split: Split | None

    @property
    def is_blank(self) -> bool:
        """Whether it consists of white space only."""
        return not any(text.strip() for text in self._texts)

    @property
    def size(self) -> int:
        """Length of the text, or of all messages together, in UTF-8 bytes."""
        return sum(len(text.encode("utf-8", "replace")) for text in self._texts)

    @property
    def _texts(self) -> list[str]:
        return [self.content] if isinstance(self.content, str) else [message["content"] for message in self.content]


def single_turn(prompt: str, answer: str) -> Conversation:
    """Returns a conversation of one question and its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def document_from(record: Record, text_field: str | None, setting: str) -> str:
    """Returns the text of a record.

    Args:
        text_field: the column to read; ignored for records that are plain text.
        setting: dotted name of the source, for example ``data.corpus``.

    Returns:
        The text; empty if the column is null, so that the record is dropped as blank.

    Raises:
        UserError: the column does not exist, or its value is not text.
    """
    if isinstance(record.value, str):
        return record.value
    if text_field is None or text_field not in record.value:
        rule = f"{record.location} has no such column; its columns are {', '.join(record.value)}"
    else:
        # Null is common in scraped datasets and should not stop the run.
        text = "" if record.value[text_field] is None else record.value[text_field]
        if isinstance(text, str):
            return text
        rule = f"a document must be text, and {record.location} has {type(text).__name__} in that column"
    raise UserError(
        setting=f"{setting}.text_field",
        value=text_field,
        rule=rule,
        remedy=f"Set {setting}.text_field to the column that holds the text.",
    )


def conversation_from(record: Record, setting: str) -> Conversation:
    """Returns the messages of a record in one of the known formats.

    Args:
        setting: dotted name of the source, for example ``data.instructions``.

    Returns:
        The messages, or an empty list if the content of any message is null, so that the record is dropped as blank.

    Raises:
        UserError: the columns match no known format, a role is unknown, or content is not text.
    """
    row = record.value if isinstance(record.value, dict) else {}
    for columns, convert in CONVERSATION_FORMATS.items():
        if set(columns) <= set(row):
            return _validated(convert(row), record.location, setting)
    raise UserError(
        setting=f"{setting}.path",
        value=record.location,
        rule=f"its columns ({', '.join(row) or 'none, it is plain text'}) match no known conversation format",
        remedy="Provide one of: messages; instruction, input, output; prompt, completion.",
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


# Required columns of each format, and the function that converts its rows.
CONVERSATION_FORMATS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Any]] = {
    ("messages",): _from_messages,
    ("instruction", "output"): _from_alpaca,
    ("prompt", "completion"): _from_completion,
}


def _validated(messages: Any, location: str, setting: str) -> Conversation:
    """Checks messages and reduces them to ``role`` and ``content``."""

    def malformed(rule: str) -> UserError:
        remedy = "Correct or remove that record. For a dataset on the Hub, do so in a local copy (kind: files)."
        return UserError(setting=f"{setting}.path", value=location, rule=rule, remedy=remedy)

    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise malformed("its messages must be a list of objects")
    for message in messages:
        if message.get("role") not in CHAT_ROLES:
            raise malformed(f"the role {message.get('role')!r} is not one of {', '.join(CHAT_ROLES)}")
        if "content" not in message or not isinstance(message["content"], (str, NoneType)):
            raise malformed(f"the content of a {message['role']} message must be text")
    # A tool call, for example, has no content. The conversation is then dropped as blank.
    if any(message["content"] is None for message in messages):
        return []
    return [{"role": message["role"], "content": message["content"]} for message in messages]

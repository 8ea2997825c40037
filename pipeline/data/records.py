"""Examples to train on, and their conversion from the records of a source.

A record becomes a document (a text, for continued pre-training) or a conversation (a list of messages with ``role`` and
``content``, for instruction tuning). Conversation formats are recognized by their columns:

    messages     {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    ShareGPT     {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}
    alpaca       {"instruction": ..., "input": ..., "output": ...}      (input may be missing or empty)
    completion   {"prompt": ..., "completion": ...}                     (texts, or lists of messages)

The column ``system`` may hold a system message, ``tools`` the tools that may be called, as a list or as JSON, and
``history`` of alpaca the turns before: pairs of two texts. Messages of the assistant may have ``reasoning_content``.
The content of a message may also be a list of parts, ``[{"type": "text", "text": ...}]``, of which all must be text.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from pipeline.config.data import Split
from pipeline.data.chat_worker import REASONING
from pipeline.data.files import Record, location_of
from pipeline.errors import UserError
from pipeline.files import MAX_NESTING, is_nested_deeper

# Role and content, both text. Also, as far as there are any: reasoning, tool_calls, tool_call_id and name; and in the
# first question, or the first message if there is none, the tools that the conversation declares.
Message = dict[str, Any]
Conversation = list[Message]

CHAT_ROLES = ("system", "developer", "user", "assistant", "tool")
# Names that ShareGPT and its descendants use in the column "from".
ROLE_NAMES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "model": "assistant", "observation": "tool", "function": "tool", "function_response": "tool",
    "function_call": "assistant",
}  # fmt: skip
SHOWN_LOCATIONS = 3  # of dropped records, per reason


@dataclass(frozen=True)
class Example:
    """One document or one conversation.

    Attributes:
        content: the text of a document, or the messages of a conversation; empty if there is a fault.
        split: the split that the source itself assigns, or None if it has no splits of its own.
        file, place: the file or dataset that it is from, and the line or row.
        fault: why its record cannot be used, as counted in dataset.json, or None.
        group: all examples of one group get the same split, of training and validation; None: assigned by the content.
    """

    content: str | Conversation
    split: Split | None
    file: str = ""
    place: str = ""
    fault: str | None = None
    group: str | None = None

    @property
    def location(self) -> str:
        """Where it is from, such as ``chats.jsonl, line 3``."""
        return location_of(self.file, self.place)

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


class Drops(Counter[str]):
    """The number of dropped examples by reason, and where the first few of them are.

    Attributes:
        locations: by reason, the locations of the first examples, such as ``chats.jsonl, line 3``.
    """

    def __init__(
        self, counts: Mapping[str, int] | None = None, locations: Mapping[str, list[str]] | None = None
    ) -> None:
        super().__init__(counts or {})
        self.locations = {reason: list(places) for reason, places in (locations or {}).items()}

    def add(self, reason: str, location: str) -> None:
        """Counts one more."""
        self[reason] += 1
        if len(places := self.locations.setdefault(reason, [])) < SHOWN_LOCATIONS and location:
            places.append(location)


class BadRecord(Exception):
    """A record cannot be used.

    Attributes:
        reason: what it is counted as, if others of its source can be used.
        error: the message, if none can.
    """

    def __init__(self, reason: str, error: UserError) -> None:
        self.reason, self.error = reason, error
        super().__init__(str(error))


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
        BadRecord: the column does not exist, or its value is not text.
    """
    if isinstance(record.value, str):
        return record.value
    if text_field is None or text_field not in record.value:
        reason = "missing_column"
        rule = f"{record.location} has no such column; its columns are {', '.join(record.value)}"
    else:
        # Null is common in scraped datasets and should not stop the run.
        text = "" if record.value[text_field] is None else record.value[text_field]
        if isinstance(text, str):
            return text
        reason = "not_text"
        rule = f"a document must be text, and {record.location} has {type(text).__name__} in that column"
    error = UserError(
        setting=f"{setting}.text_field",
        value=text_field,
        rule=rule,
        remedy=f"Set {setting}.text_field to the column that holds the text.",
    )
    raise BadRecord(reason, error)


def conversation_from(record: Record, setting: str) -> Conversation:
    """Returns the messages of a record in one of the known formats.

    Args:
        setting: dotted name of the source, for example ``data.instructions``.

    Returns:
        The messages, or an empty list if the content of any message is null, so that the record is dropped as blank.

    Raises:
        BadRecord: the columns match no known format, a role is unknown, or content is not text.
    """

    def bad(reason: str, rule: str, remedy: str = CORRECT_RECORD) -> BadRecord:
        error = UserError(setting=f"{setting}.path", value=record.location, rule=rule, remedy=remedy)
        return BadRecord(reason, error)

    row = record.value if isinstance(record.value, dict) else {}
    for columns, convert in CONVERSATION_FORMATS.items():
        # Files with rows of several formats have all columns in every row, and null in those of the other formats.
        if set(columns) <= set(row) and any(row[column] is not None for column in columns):
            try:
                conversation = _after_system(row.get("system"), _normalized(convert(row)))
                return _with_tools(conversation, _tools(row.get("tools")))
            except _Malformed as error:
                raise bad(error.reason, str(error)) from None
    if any(set(columns) <= set(row) for columns in CONVERSATION_FORMATS):
        return []  # all of them are null
    rule = f"its columns ({', '.join(row) or 'none, it is plain text'}) match no known conversation format"
    formats = "messages; conversations; instruction, input, output; prompt, completion"
    raise bad("unknown_format", rule, f"Provide one of: {formats}.")


CORRECT_RECORD = "Correct or remove that record. For a dataset on the Hub, do so in a local copy (kind: files)."


class _Malformed(Exception):
    def __init__(self, reason: str, rule: str) -> None:
        self.reason = reason
        super().__init__(rule)


def _from_alpaca(row: Mapping[str, Any]) -> Any:
    parts = [row["instruction"], row.get("input")]
    if row.get("instruction") is None:
        return [_message("user", None)]  # never a prompt that is empty, or the input alone
    if not all(isinstance(part, str) for part in parts if part is not None):
        raise _Malformed("not_text", "its instruction, input and output must be text")
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise _Malformed("malformed", "its history must be a list of pairs of a question and its answer")
    prompt = "\n\n".join(part for part in parts if part)
    return [
        _message(role, text)
        for turn in (*history, [prompt, row["output"]])
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _from_completion(row: Mapping[str, Any]) -> Any:
    prompt, completion = row["prompt"], row["completion"]
    return [
        *(prompt if isinstance(prompt, list) else [_message("user", prompt)]),
        *(completion if isinstance(completion, list) else [_message("assistant", completion)]),
    ]


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


# Required columns of each format, and the function that converts its rows.
CONVERSATION_FORMATS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Any]] = {
    ("messages",): itemgetter("messages"),
    ("instruction", "output"): _from_alpaca,
    ("prompt", "completion"): _from_completion,
    ("conversations",): itemgetter("conversations"),  # ShareGPT
}
# All columns that are read of conversations.
CONVERSATION_COLUMNS = (
    *(column for columns in CONVERSATION_FORMATS for column in columns), "input", "history", "system", "tools",
)  # fmt: skip


def _after_system(system: Any, conversation: Conversation) -> Conversation:
    """Returns a conversation with the text of the column ``system`` in front, unless it begins with it already."""
    if not conversation or not isinstance(system, str) or not system.strip():
        return conversation
    first = _message("system", system)
    return conversation if conversation[0] == first else [first, *conversation]


def _normalized(messages: Any) -> Conversation:
    """Checks messages and reduces them to what a template can use."""
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise _Malformed("malformed", "its messages must be a list of objects")
    conversation = list(map(_normalized_message, messages))
    # A message without content cannot be taught. The conversation is then dropped as blank.
    return [] if any(message["content"] is None for message in conversation) else conversation


def _normalized_message(message: Mapping[str, Any]) -> Message:
    stated = message.get("role", message.get("from"))
    role = ROLE_NAMES.get(stated, stated) if isinstance(stated, str) else stated
    if role not in CHAT_ROLES:
        raise _Malformed("unknown_role", f"the role {stated!r} is not one of {', '.join(CHAT_ROLES)}")
    calls = _tool_calls(message) if role == "assistant" else []
    content = next((message[name] for name in ("content", "value") if name in message), ...)
    content = _text_of_parts(content) if isinstance(content, list) else content
    content = "" if calls and content in (None, ...) else content
    if content is not None and not isinstance(content, str):
        raise _Malformed("not_text", f"the content of a {role} message must be text")
    named = {name: message[name] for name in ("name", "tool_call_id") if role == "tool" and message.get(name)}
    reasoning = {name: message[name] for name in REASONING if role == "assistant" and message.get(name)}
    for name, text in reasoning.items():
        if not isinstance(text, str):
            raise _Malformed("not_text", f"the {name} of an assistant message must be text")
    return {"role": role, "content": content, **reasoning, **named, **({"tool_calls": calls} if calls else {})}


def _text_of_parts(parts: list[Any]) -> Any:
    """Joins a list of parts. Returns it unchanged if any of them is not text."""
    texts: list[Any] = []
    for part in parts:
        texts.append(part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part)
    return "".join(texts) if texts and all(isinstance(text, str) for text in texts) else parts


def _tools(value: Any) -> list[dict[str, Any]]:
    """Returns the tools that a row declares, as a list or as JSON, in the form that templates expect."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise _Malformed("malformed", "its tools must be a list of objects, or one in JSON") from None
    tools = value or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise _Malformed("malformed", "its tools must be a list of objects, or one in JSON")
    functions = [tool.get("function") or tool for tool in tools]
    if not all(isinstance(each, Mapping) and isinstance(each.get("name"), str) for each in functions):
        raise _Malformed("malformed", "a tool must have a function with a name")
    if is_nested_deeper(functions):
        raise _Malformed("malformed", f"its tools have more than {MAX_NESTING} levels")
    # Arrow adds null for what only other tools state.
    stated = [{name: value for name, value in each.items() if value is not None} for each in functions]
    return [{"type": "function", "function": each} for each in stated]


def _with_tools(conversation: Conversation, tools: list[dict[str, Any]]) -> Conversation:
    """Returns a conversation whose first question declares tools: there, ``fold`` keeps them."""
    if not conversation or not tools:
        return conversation
    first = next((number for number, message in enumerate(conversation) if message["role"] == "user"), 0)
    declaring = {**conversation[first], "tools": tools}
    return [*conversation[:first], declaring, *conversation[first + 1 :]]


def _tool_calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the tool calls of a message as templates expect them: with arguments as objects, not as JSON."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise _Malformed("malformed", "the tool_calls of a message must be a list of objects")
    found = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _Malformed("malformed", "a tool call must have a function with a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise _Malformed("malformed", "the arguments of a tool call must be JSON") from None
        if is_nested_deeper(arguments):
            raise _Malformed("malformed", f"the arguments of a tool call have more than {MAX_NESTING} levels")
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append({**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found

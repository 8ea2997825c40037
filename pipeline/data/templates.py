"""Chat templates: which one a model has, and a process with limits that renders conversations with it.

The driver uses this module to check a template before a run. It therefore does not import the tokenizer.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from pipeline.data import chat_worker
from pipeline.data.records import Conversation
from pipeline.errors import UserError
from pipeline.launch.child import close_pipes
from pipeline.models.source import CHAT_TEMPLATE

# For base models without a chat template. It consists of text and the end-of-sequence token, so it adds no new tokens.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] in ('system', 'developer') %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'tool' %}{{ '### Tool result:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)

# The end of every remedy for a template that cannot be used.
USE_PLAIN = "data.chat_template=plain for a plain-text template that needs no new tokens."

# Limits of the process in which a template runs. The memory suffices for the largest conversation that is read.
TEMPLATE_SECONDS = 20.0  # of CPU time, per conversation
TEMPLATE_MEMORY = 2**30  # bytes, in addition to four times the largest record


def default_template(found: Any) -> str:
    """Returns the template to use of those that a model has.

    Args:
        found: one template, or several by name, as a dictionary or as in tokenizer_config.json; None if it has none.

    Raises:
        UserError: there is none, or none of several is named ``default``.
    """
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, dict) and "default" not in found:
        names = ", ".join(sorted(found))
        raise UserError(
            setting="data.chat_template",
            value="model",
            rule=f"the model has the chat templates {names}, and none that is named default",
            remedy=f"Save one of them as {CHAT_TEMPLATE} in the model's directory, or set {USE_PLAIN}",
        )
    if not found:
        raise UserError(
            setting="data.chat_template",
            value="model",
            rule="the model's tokenizer has no chat template, which instruction tuning needs",
            remedy=f"Set {USE_PLAIN}",
        )
    return str(found["default"] if isinstance(found, dict) else found)


def check_template(
    template: str, tokens: Mapping[str, str], conversations: Mapping[str, Iterable[Conversation]], folds: bool
) -> None:
    """Checks that a template renders a question and its answer, and some conversations, so that they can be trained on.

    Args:
        template, tokens: as for :class:`TemplateProcess`.
        conversations: the first conversations of every source, by the source's dotted name.
        folds: whether messages of unsupported roles are folded.

    Raises:
        UserError: it does not render the question, or none of a source's conversations.
    """
    with TemplateProcess(template, tokens) as process:
        folded = process.unsupported if folds else frozenset()
        for source, first in conversations.items():
            replies = [process.turns(fold(conversation, folded)) for conversation in first]
            faults = [reply["fault"] for reply in replies if "fault" in reply]
            if faults and len(faults) == len(replies):
                raise UserError(
                    setting=f"{source}.path",
                    value=f"its first {len(faults)} conversations",
                    rule=f"none of them can be rendered with the chat template: {faults[0]} ({replies[0]['detail']})",
                    remedy=f"{process.advice(faults, folded)}Correct them, or set {USE_PLAIN}",
                )


class TurnRenderer(Protocol):
    """Renders conversations: ``TemplateProcess``, or in this process ``chat_worker.Renderer``."""

    def turns(self, messages: Conversation) -> chat_worker.Reply:
        """Returns ``texts`` with the spans of the assistant's turns, or the ``fault`` of the conversation."""


class TemplateProcess:
    """A process that renders conversations with a template from elsewhere, under limits.

    Args:
        template: a Jinja template.
        tokens: the variables for special tokens, such as ``eos_token``.
        max_record_bytes: size of the largest conversation.

    Attributes:
        template: the text of the template, changed if it reads content only as a list of parts.
        probe: a question and its answer, which it accepts.
        unsupported: the roles among system and developer that it rejects or leaves out.
        beginning: what every answer must begin with, because the generation prompt ends with it; usually empty.

    Raises:
        UserError: the template cannot be trained on, whatever the conversation.
    """

    def __init__(self, template: str, tokens: Mapping[str, str], max_record_bytes: int = 0) -> None:
        command = [sys.executable, "-P", str(Path(chat_worker.__file__))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._requests, self._answers = cast("BinaryIO", self._process.stdin), cast("BinaryIO", self._process.stdout)
        memory = TEMPLATE_MEMORY + 4 * max_record_bytes
        setup = {"template": template, "tokens": tokens, "memory_bytes": memory, "seconds": TEMPLATE_SECONDS}
        try:
            chosen = self._ask(setup)
            if "fault" in chosen:
                raise unusable(_REASONS[chosen["fault"]].format(chosen["detail"]))
        except BaseException:
            self.kill()
            raise
        self.template: str = chosen["template"]
        self.probe: Conversation = chosen["probe"]
        self.unsupported: frozenset[str] = frozenset(chosen["unsupported"])
        self.beginning: str = self.probe[-1]["content"].removesuffix(chat_worker.ANSWER["content"])

    def turns(self, messages: Conversation) -> chat_worker.Reply:
        """Returns ``texts`` with the spans of the assistant's turns, or the ``fault`` of the conversation.

        Raises:
            UserError: the template exceeded a limit.
        """
        return self._ask(messages)

    def _ask(self, request: Any) -> chat_worker.Reply:
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = b""
        if not answer.endswith(b"\n"):
            raise unusable(_cause_of_death(self._process.wait()))
        return cast("chat_worker.Reply", json.loads(answer))

    def advice(self, faults: Container[str], folded: Container[str] = ()) -> str:
        """Returns what to do about the faults of some conversations, followed by a space; empty for others.

        Args:
            faults: the faults.
            folded: the roles that are folded already.
        """
        roles = sorted(role for role in self.unsupported if role not in folded)
        if roles and (chat_worker.REJECTED in faults or chat_worker.TEXT_MISSING in faults):
            names = " and ".join(roles)
            return (
                f"If they have {names} messages, which the chat template lacks, set data.system_messages=fold to join "
                "these to questions. "
            )
        if chat_worker.PROMPT_DIFFERS in faults:
            return f"With this chat template, every answer must begin with {self.beginning!r}. "
        return ""

    def kill(self) -> None:
        """Ends the process without waiting for an answer."""
        self._process.kill()
        self.close()

    def close(self) -> None:
        """Ends the process by closing its input."""
        close_pipes(self._process)

    def __enter__(self) -> TemplateProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self.kill() if kind else self.close()


_REASONS = {
    "syntax": "it is not a valid Jinja template ({})",
    chat_worker.REJECTED: "it rejects a question with an answer ({})",
    chat_worker.TEXT_MISSING: "it leaves out the text, whether passed as a string or as a list of parts ({})",
    chat_worker.PROMPT_DIFFERS: "its generation prompt differs from the beginning of an answer, by {}",
}


def _cause_of_death(status: int) -> str:
    if status == -signal.SIGPROF:
        return f"it took more than {TEMPLATE_SECONDS:g} seconds of CPU time for one conversation"
    cause = f"signal {-status}" if status < 0 else f"exit status {status}"
    return f"its process ended with {cause}, probably for lack of memory"


def unusable(reason: str) -> UserError:
    """Returns the error for a template that cannot be trained on."""
    return UserError(
        setting="data.chat_template",
        value="model",
        rule=f"the model's chat template cannot be trained on, because {reason}",
        remedy=f"Set {USE_PLAIN}",
    )


def fold(conversation: Conversation, roles: frozenset[str]) -> Conversation:
    """Returns a conversation in which the first message of the user begins with all messages of some roles."""
    folded = [message["content"] for message in conversation if message["role"] in roles]
    rest = [message for message in conversation if message["role"] not in roles]
    first = next((number for number, message in enumerate(rest) if message["role"] == "user"), None)
    if not folded or first is None:
        return conversation
    content = "\n\n".join([*(text for text in folded if text.strip()), rest[first]["content"]])
    return [*rest[:first], {**rest[first], "content": content}, *rest[first + 1 :]]

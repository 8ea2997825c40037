"""Renders conversations with a chat template, in a process of its own with limits on memory, time and recursion.

Run as a script (``python -P chat_worker.py``) by ``chat.py``. Templates come with a model from elsewhere. The sandbox
of Jinja limits what they can access, but not how much memory and time they take. This module imports neither this
project nor transformers, so that it starts at once and takes little memory. What it renders equals the result of
``apply_chat_template(tokenize=False)``. Each request and each answer is one line of JSON.

    setup       {"template": ..., "tokens": {"eos_token": ...}, "memory_bytes": ..., "seconds": ...}
    answer      {"template": ..., "probe": messages, "unsupported": [roles]} or {"fault": ..., "detail": ...}
    request     messages, of which the first question may have "tools"
    answer      {"texts": [[text, [[begin, end], ...]], ...]} or {"fault": ..., "detail": ...}
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

Messages = Sequence[Mapping[str, Any]]
Reply = dict[str, Any]

# Why a conversation was not rendered. The names are those of dataset.json.
REJECTED, TEXT_MISSING, PROMPT_DIFFERS = (
    "rejected_by_template",
    "text_not_in_rendering",
    "differs_from_generation_prompt",
)

# The date for templates that print the current one, so that a dataset does not depend on the day on which it is built.
# It is the default of Llama 3.2's template.
TEMPLATE_DATE = date(2024, 7, 26)
# Templates of vision models read content as a list of parts and render nothing for a string. With this in front of
# them, they accept both. It is saved with the tuned model, so that prompts are rendered like the training data.
PARTS_PRELUDE = (
    "{% set with_parts = namespace(messages=[]) %}{% for message in messages %}"
    "{% set with_parts.messages = with_parts.messages + [dict(message, content=[{'type': 'text', 'text': "
    "message['content']}]) if message['content'] is string else message] %}{% endfor %}"
    "{% set messages = with_parts.messages %}"
)
QUESTION = {"role": "user", "content": "Probing question 4711?"}
ANSWER = {"role": "assistant", "content": "Probing answer 0815."}
REASONING = ("reasoning_content", "reasoning", "thinking")  # names under which messages have it, besides their content
OPTIONAL_ROLES = ("system", "developer")  # that a template may lack, and that can be folded into the first question
SHOWN_CHARACTERS = 120  # of a line of the template


class _Generation(Extension):
    """The tag ``{% generation %}``, with which templates mark the assistant's text for a loss mask. Not needed here."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Jinja)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> Any:
        return caller()


class _Dict:
    """The global ``dict`` of templates: of the class, only what transformers offers."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """A namespace that accepts only the names that it accepts in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may call it with self=...
        self, *values = args
        entries = dict(*values, **kwargs)
        for name in entries:
            _check_name(name)
        Namespace.__init__(self, entries)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the name {name} of a namespace begins with an underscore")


def _environment() -> ImmutableSandboxedEnvironment:
    """Returns an environment with what transformers offers to chat templates."""

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": TEMPLATE_DATE.strftime}
    environment.globals |= {"dict": _Dict(), "namespace": _Namespace}
    return environment


class Renderer:
    """Renders conversations with one template.

    Args:
        template: a Jinja template.
        tokens: the variables for special tokens, such as ``eos_token``.

    Raises:
        TemplateError: the template cannot be compiled.
    """

    def __init__(self, template: str, tokens: Mapping[str, str]) -> None:
        self._source, self._tokens = template, tokens
        self._template = _environment().from_string(template)

    def turns(self, messages: Messages) -> Reply:
        """Returns the texts to train on, each with the spans of its assistant turns, which extend to the next turn.

        It is one text, or one per assistant turn if the template rewrites earlier turns.
        """
        try:
            return self._turns(messages)
        except Exception as error:  # noqa: BLE001  a template can raise anything
            return {"fault": REJECTED, "detail": explain(error, self._source)}

    def _turns(self, messages: Messages) -> Reply:
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        complete = self.render(messages)
        prefixes = []
        for turn in turns:
            before = self.render(messages[:turn], add_generation_prompt=True)
            text = complete if turn == len(messages) - 1 else self.render(messages[: turn + 1])
            if not text.startswith(before):
                return {"fault": PROMPT_DIFFERS, "detail": repr(_remainder(before, text))}
            prefixes.append((text, len(before), turn))
        if all(complete.startswith(text) for text, *_ in prefixes):
            texts = [(complete, [(begin, len(text)) for text, begin, _ in prefixes])]
            missing = find_missing(messages, complete, rewritten=False)
        else:  # each turn is trained on in the context in which it is generated
            texts = [(text, [(begin, len(text))]) for text, begin, _ in prefixes]
            found = (find_missing(messages[: turn + 1], text, rewritten=True) for text, _, turn in prefixes)
            missing = next(filter(None, found), None)
        if missing is not None:
            parts = ", ".join(name for name in ("tools", *REASONING, "content", "tool_calls") if name in missing)
            detail = f"of the {missing['role']} message ({parts}); {self._line_with('content')}"
            return {"fault": TEXT_MISSING, "detail": detail}
        "".join(text for text, _ in texts).encode()  # a lone surrogate, which a template can write, has no tokens
        return {"texts": texts}

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """Renders messages like ``apply_chat_template``, with the tools that one of them declares."""
        tools = next((message["tools"] for message in messages if "tools" in message), None)
        if tools is not None:
            messages = [{name: message[name] for name in message if name != "tools"} for message in messages]
        return self._template.render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt, **self._tokens
        )

    def _line_with(self, word: str) -> str:
        lines = self._source.splitlines()
        return describe_line(self._source, next((n for n, text in enumerate(lines, 1) if word in text), 1), word)


def explain(error: BaseException, source: str) -> str:
    """Returns the message of an exception, and the line of the template that raised it."""
    line = error.lineno if isinstance(error, TemplateSyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
    message = f"{kind}{error}"[: 2 * SHOWN_CHARACTERS].strip() or type(error).__name__
    return message if line is None else f"{message}; {describe_line(source, line)}"


def describe_line(source: str, number: int, word: str = "") -> str:
    """Returns the number of a line of a template, and the part of it that begins shortly before a word."""
    text = ([*source.splitlines(), ""])[number - 1].strip()
    begin = max(0, text.find(word) - SHOWN_CHARACTERS // 2)
    shown = text[begin : begin + SHOWN_CHARACTERS]
    return f"line {number} of the template: {shown}"


def _remainder(before: str, text: str) -> str:
    """Returns what a generation prompt adds to the beginning that it shares with the rendered answer."""
    shared = next((at for at, pair in enumerate(zip(before, text, strict=False)) if pair[0] != pair[1]), len(text))
    return before[shared:]


def find_missing(messages: Messages, text: str, rewritten: bool) -> Mapping[str, Any] | None:
    """Returns a message whose text is not part of a rendering, or None if there is none.

    Whitespace does not count, since templates strip it. ``rewritten`` says that the template rewrites earlier turns: of
    these, only what follows the reasoning must be there.
    """
    position = 0
    for message in messages:  # usually, all of them are there in order
        for part in _texts(message):
            found = text.find(part, position)
            if found < 0:
                return _find_missing_anywhere(messages, text, rewritten)
            position = found + len(part)
    return None


def _find_missing_anywhere(messages: Messages, text: str, rewritten: bool) -> Mapping[str, Any] | None:
    squeezed = "".join(text.split())
    wanted: Counter[str] = Counter()
    for number, message in enumerate(messages, 1):
        is_rewritten = rewritten and number < len(messages) and message["role"] == "assistant"
        for part in _texts(message, with_reasoning=not is_rewritten):
            squeezed_part = "".join(part.split())
            if is_rewritten:
                squeezed_part = squeezed_part.rpartition("</think>")[2]
            wanted[squeezed_part] += 1
            forms = [squeezed_part]
            if message["role"] == "tool":  # Llama 3.1's template writes the results of tools as JSON
                forms.append("".join(json.dumps(part, ensure_ascii=False)[1:-1].split()))
            if squeezed_part and max(map(squeezed.count, forms)) < wanted[squeezed_part]:
                return message
    return None


def _texts(message: Mapping[str, Any], with_reasoning: bool = True) -> list[str]:
    named = [*message.get("tools", ()), *message.get("tool_calls", ())]
    # Some programs write the same reasoning under two names.
    reasoning = {message[name].strip() for name in REASONING if with_reasoning and name in message}
    return [*sorted(reasoning), message["content"].strip(), *(each["function"]["name"] for each in named)]


# ------------------------------------------------------------------------------------ choice of a template


def choose(template: str, tokens: Mapping[str, str]) -> tuple[Renderer | None, Reply]:
    """Tries a template as it is, and with messages as lists of parts, on a question with its answer.

    Returns:
        The renderer, and the text of its template, a conversation that it accepts, and the roles that it does not
        support. None and the fault, if the template cannot be trained on.
    """
    found: list[tuple[Renderer, Reply]] = []
    fault: Reply = {}
    for source in (template, PARTS_PRELUDE + template):
        try:
            renderer = Renderer(source, tokens)
        except Exception as error:  # noqa: BLE001  including RecursionError and MemoryError of deeply nested templates
            return None, {"fault": "syntax", "detail": explain(error, source)}
        probe, outcome = _probe(renderer)
        if "texts" in outcome:
            roles = [role for role in OPTIONAL_ROLES if not _supports(renderer, role, probe)]
            found.append((renderer, {"template": source, "probe": probe, "unsupported": roles}))
            if "system" not in roles:
                break
        fault = fault or outcome
    if not found:
        return None, fault
    return min(found, key=lambda item: "system" in item[1]["unsupported"])  # as it is, unless parts support more


def _probe(renderer: Renderer) -> tuple[Messages, Reply]:
    messages = [QUESTION, ANSWER]
    outcome = renderer.turns(messages)
    if outcome.get("fault") == PROMPT_DIFFERS:
        # Templates of reasoning models may begin every answer with <think>. Answers that contain it can be trained on.
        added = _remainder(renderer.render(messages[:1], add_generation_prompt=True), renderer.render(messages))
        thinking = [QUESTION, {**ANSWER, "content": added + ANSWER["content"]}]
        if "texts" in (accepted := renderer.turns(thinking)):
            return thinking, accepted
    return messages, outcome


def _supports(renderer: Renderer, role: str, probe: Messages) -> bool:
    return "texts" in renderer.turns([{"role": role, "content": "Probing instruction 1234."}, *probe])


# ------------------------------------------------------------------------------------------------- process


def main() -> None:
    """Answers requests until standard input ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")

    def answer(value: Reply) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(value).encode() + b"\n")
        answers.flush()

    setup = json.loads(requests.readline())
    resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], setup["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # CPU seconds, so that a busy machine changes nothing. SIGPROF ends the process, also in the middle of C code.
    seconds = setup["seconds"]
    signal.setitimer(signal.ITIMER_PROF, seconds)
    renderer, chosen = choose(setup["template"], setup["tokens"])
    answer(chosen)
    while renderer is not None and (line := requests.readline()):
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer(renderer.turns(json.loads(line)))


if __name__ == "__main__":
    main()

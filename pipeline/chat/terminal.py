"""Reads questions, and shows the answers of one or several models while they are generated.

In a terminal, the answers of several models are shown in columns. Otherwise, everything is plain text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.chat.model import ChatModel, ContextFull
from pipeline.errors import printable

PROMPT = "you> "
COMMANDS = "/reset begins a new conversation, /exit or the end of the input ends it, and Ctrl-C stops an answer"

_Answering = Callable[[Callable[[str], object]], object]  # generates an answer and passes its parts on


def questions() -> Iterator[str]:
    """Yields the lines that the user types, or those of a pipe, which are printed as in a terminal."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            print(f"{PROMPT}{printable(line.rstrip())}", flush=True)
            yield line
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - edits the line, and recalls earlier ones
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input(PROMPT)


def converse(models: Sequence[ChatModel], lines: Iterable[str], console: Console) -> None:
    """Answers questions until the lines end. Every model remembers its own answers.

    Args:
        models: with different names.
        lines: questions and commands.
        console: where the answers are shown.
    """
    histories: dict[str, list[dict[str, str]]] = {model.name: [] for model in models}
    for line in lines:
        text = line.strip()
        if text == "/exit":
            return
        if text == "/reset":
            for history in histories.values():
                history.clear()
            console.print("a new conversation")
        elif text.startswith("/"):
            console.print(f"there is no command {text}; {COMMANDS}", markup=False)
        elif text:
            _ask(models, histories, text, console)


def _ask(
    models: Sequence[ChatModel], histories: dict[str, list[dict[str, str]]], question: str, console: Console
) -> None:
    """Adds a question and the answers to the histories, or nothing if an answer is stopped or does not fit."""
    asked = {name: [*history, {"role": "user", "content": question}] for name, history in histories.items()}
    answers: dict[str, str] = {}

    def answering(model: ChatModel) -> _Answering:
        return lambda show: answers.update({model.name: model.answer(asked[model.name], show)})

    show_all = _in_columns if console.is_terminal and len(models) > 1 else _in_turn
    try:
        show_all({model.name: answering(model) for model in models}, console)
    except KeyboardInterrupt:
        console.print("\nstopped; the question is not remembered")
    except ContextFull as error:
        console.print(f"{error}; /reset begins a new conversation", markup=False)
    else:
        for name, answer in answers.items():
            histories[name] = [*asked[name], {"role": "assistant", "content": answer}]


def _in_turn(answers: dict[str, _Answering], console: Console) -> None:
    for name, answer in answers.items():
        console.print(f"{name}> ", end="", style="bold", markup=False)
        answer(lambda text: console.print(_safe(text), end="", markup=False))
        console.print()


def _in_columns(answers: dict[str, _Answering], console: Console) -> None:
    texts = {name: Text() for name in answers}
    with Live(console=console, vertical_overflow="visible", auto_refresh=False) as live:

        def show(name: str, part: str) -> None:
            texts[name].append(_safe(part))
            table = Table(*texts, expand=True)
            table.add_row(*texts.values())
            live.update(table, refresh=True)

        for name, answer in answers.items():
            answer(lambda part, name=name: show(name, part))  # type: ignore[misc]


def _safe(text: str) -> str:
    """Returns a text without characters that a terminal would act on."""
    return printable(text.replace("\t", "    "))

"""Runs without conversations, and hence without instruction tuning: ``data.instructions=null``.

Every experiment can be run in this way: what configuration files ask of tuning is left out. On the command line, such a
request contradicts ``data.instructions=null``, and ``planning/checks.py`` refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import reduce
from typing import Any

from pipeline.config import Settings


def _without_sft(names: list[str]) -> list[str]:
    """Drops the stage and its snapshots."""
    return [name for name in names if name.partition("@")[0] != "sft"]


# Settings that can ask for what only a run with conversations has, and what is left of their values without it.
_LEFT: dict[str, Callable[[Any], Any]] = {
    "target": lambda target: None if target == "sft" else target,
    "compare": _without_sft,
    "stages": _without_sft,
    "force": _without_sft,
    "evaluate.targets": _without_sft,
    "evaluate.sample_answers": lambda questions: 0,
    "sft.corpus_fraction": lambda fraction: 0.0,
}


def leave_out_tuning(run: Settings, given: Collection[str]) -> Settings:
    """Returns the settings of a run. If it does not tune, they ask nothing of tuning.

    Args:
        run: the settings as composed.
        given: dotted names of the settings on the command line, which stay as they are.
    """
    for name, _ in tuning_requests(run):
        if name not in given:
            section, _, field = name.rpartition(".")
            changed = {field: _LEFT[name](_value(run, name))}
            if section:
                changed = {section: _value(run, section).model_copy(update=changed)}
            run = run.model_copy(update=changed)
    return run


def tuning_requests(run: Settings) -> Iterator[tuple[str, Any]]:
    """Yields the settings of a run without tuning that ask for it, each with its value, or with the items that ask."""
    if run.tunes:
        return
    for name, left_of in _LEFT.items():
        value = _value(run, name)
        left = left_of(value)
        if isinstance(value, list) and left != value:
            yield name, ", ".join(item for item in value if item not in left)
        elif left != value:
            yield name, value


def _value(run: Settings, name: str) -> Any:
    return reduce(getattr, name.split("."), run)

"""Runs without conversations, and hence without instruction tuning: ``data.instructions=null``.

Every experiment can be run in this way: settings in configuration files that need tuning are ignored, unless nothing
would be left of a list. ``planning/checks.py`` refuses those, and settings on the command line that contradict
``data.instructions=null``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from pipeline.config import Settings
from pipeline.config.section import setting_value


def _without_sft(names: list[str]) -> list[str]:
    """Drops the stage and its snapshots."""
    return [name for name in names if name.partition("@")[0] != "sft"]


# Settings that can need conversations, and what is left of their values without these.
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
    """Returns the settings of a run. If it does not tune, those in files that need tuning are changed.

    Args:
        run: the settings as composed.
        given: dotted names of the settings on the command line, which stay as they are.
    """
    for name, _ in tuning_requests(run):
        left = _LEFT[name](setting_value(run, name))
        if name not in given and left != []:
            section, _, field = name.rpartition(".")
            changed = {field: left}
            if section:
                changed = {section: setting_value(run, section).model_copy(update=changed)}
            run = run.model_copy(update=changed)
    return run


def tuning_requests(run: Settings) -> Iterator[tuple[str, Any]]:
    """Yields the settings of a run without tuning that need it, each with its value, or with the items that need it."""
    if run.tunes:
        return
    for name, left_of in _LEFT.items():
        value = setting_value(run, name)
        left = left_of(value)
        if isinstance(value, list) and left != value:
            yield name, ", ".join(item for item in value if item not in left)
        elif left != value:
            yield name, value

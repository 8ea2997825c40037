"""How long an artifact took to make, over all attempts at it: killed ones count too.

A killed attempt cannot say when it ended, but the files that it wrote do.
"""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.artifact import read_json, write_json

ATTEMPTS_FILE = "attempts.json"


def begin(partial: Path) -> None:
    """Notes in a partial directory that an attempt begins now, and closes the one before."""
    started = [*_closed(partial), {"started": time.time(), "seconds": None}]
    write_json(partial / ATTEMPTS_FILE, started)


def finish(partial: Path) -> tuple[int, float]:
    """Removes the notes; returns how many attempts there were and how many seconds they took together."""
    attempts = read_json(partial / ATTEMPTS_FILE)
    (partial / ATTEMPTS_FILE).unlink()
    last = time.time() - attempts[-1]["started"]
    return len(attempts), sum(attempt["seconds"] for attempt in attempts[:-1]) + last


def _closed(partial: Path) -> list[dict[str, float]]:
    """Earlier attempts, the last of them as long as it wrote."""
    file = partial / ATTEMPTS_FILE
    if not file.exists():
        return []
    attempts: list[dict[str, float]] = read_json(file)
    written = max(path.stat().st_mtime for path in partial.rglob("*"))
    return [*attempts[:-1], {**attempts[-1], "seconds": max(0.0, written - attempts[-1]["started"])}]

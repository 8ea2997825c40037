"""How many examples are tried, and how long one may take.

``FUZZ_EXAMPLES`` is the number of examples of all properties together. Without it there are 500, always the same ones.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TypeVar

from hypothesis import HealthCheck, Phase, event, settings

from pipeline.errors import UserError

Result = TypeVar("Result")
TOTAL = int(os.environ.get("FUZZ_EXAMPLES", "500"))
NO_WORD = re.compile(r"[^\w ._,-]|\d")
SECONDS = 10.0  # of CPU time, so that a busy machine changes nothing


def examples(per_mille: int) -> settings:
    """Returns the settings of a property.

    Args:
        per_mille: its share of all examples.
    """
    return settings(
        max_examples=max(1, TOTAL * per_mille // 1000),
        derandomize="FUZZ_EXAMPLES" not in os.environ,
        database=None,
        deadline=None,  # in wall time; see outcome()
        print_blob=True,
        report_multiple_bugs=False,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


class _TooSlow(BaseException):
    """Not an Exception, because the pipeline turns those of libraries into refusals."""


@contextmanager
def _limited() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def outcome(call: Callable[[], Result]) -> Result | UserError:
    """Returns what a call returns, or its refusal.

    Raises:
        AssertionError: it took too long, or its message does not have the four parts or cannot be printed.
    """
    try:
        with _limited():
            return call()
    except _TooSlow:
        raise AssertionError(f"it took more than {SECONDS:g} seconds of CPU time") from None
    except UserError as refusal:
        error = refusal
    parts = (error.setting, str(error.value), error.rule, error.remedy)
    "".join(parts).encode()  # a lone surrogate cannot be printed
    assert error.setting and error.rule and error.remedy and max(map(len, parts)) < 20_000
    event(f"refused: {re.split(NO_WORD, error.rule)[0][:60]}")  # for --hypothesis-show-statistics
    return error

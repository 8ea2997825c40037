"""Ends a training run in which a rank is stuck, and tells which one, where, and what the others wait for.

Every rank writes every few seconds, to a file in the log directory, that it is alive and which part of the training it
has reached. It reads the file of the next rank. If that rank sends no heartbeat, or stays behind, for longer than a
collective may take, then this rank records the outcome, writes its own stack to its log, and exits. The launcher then
ends the others, after their stacks have been written to their logs.

Files rather than the process group's store, because rank 0 serves the store and may be the one that is stuck.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from torch import distributed

from pipeline.errors import EXIT_FAILED
from pipeline.files import write_json
from pipeline.launch.failure import alive_file
from pipeline.training.worker import write_outcome

LONGEST_INTERVAL = 10.0  # seconds between heartbeats
# Modules whose lines do not tell what a rank was doing.
OUTSIDE = (__name__, "pipeline.training.process_group", "pipeline.training.worker")
SHORTEST_PAUSE, LONGEST_PAUSE = 0.001, 0.2  # seconds between checks whether all ranks have arrived


def wait_until(is_true: Callable[[], bool]) -> None:
    """Waits for something that no event announces, by looking again after growing pauses."""
    pause = SHORTEST_PAUSE
    while not is_true():
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE)


@dataclass(frozen=True)
class Phase:
    """The part of the training that a rank has reached.

    Attributes:
        number: how many parts it has entered. All ranks enter the same parts in the same order.
        part: a description, for messages.
        is_alone: the others may have to wait for as long as this part takes, such as for rank 0 while it saves.
    """

    number: int
    part: str
    is_alone: bool


class Watch:
    """Watches the next rank from a background thread.

    Args:
        rank: this rank.
        ranks: number of ranks.
        timeout: how long a collective may take, in seconds.
        log_dir: of the job.
        store: through which ranks meet; see ``wait_for_all``. Not used by the thread.
    """

    def __init__(
        self, rank: int, ranks: int, timeout: float, log_dir: Path, store: distributed.Store | None = None
    ) -> None:
        self._rank, self._ranks, self._next = rank, ranks, (rank + 1) % ranks
        self._timeout, self._interval = timeout, min(LONGEST_INTERVAL, timeout / 20)
        self._log_dir, self._store, self._meetings = log_dir, store, 0
        self._position = Phase(0, "starting", True)
        self._entered = time.monotonic()
        self._main = threading.main_thread().ident
        self._ticks = 0
        self._seen: tuple[int, Phase] | None = None  # the next rank's last heartbeat
        self._changed = self._moved = self._looked = self._entered  # when it changed, moved on, and was looked at

    def start(self) -> None:
        """Starts the thread."""
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def enter(self, part: str, is_alone: bool = False) -> None:
        """Records that this rank has reached another part."""
        self._position = Phase(self._position.number + 1, part, is_alone)
        self._entered = time.monotonic()

    def describe(self, part: str) -> None:
        """Records progress within a part, so that this rank is not considered stuck in it."""
        self._position = replace(self._position, part=part)

    def wait_for_all(self, part: str) -> None:
        """Waits until all ranks have called this, however long that takes, unlike a collective.

        Args:
            part: what the others may still be at, for messages.
        """
        assert self._store is not None
        self.enter(f"waiting for the others after {part}", is_alone=True)
        self._meetings += 1
        key = f"meeting/{self._meetings}"
        if self._store.add(key, 1) == self._ranks:
            self._store.set(f"{key}/complete", "")
        wait_until(partial(self._store.check, [f"{key}/complete"]))
        distributed.barrier()  # so that rank 0 keeps serving the store until all have seen this

    # ------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        while True:
            self.publish()
            if (fault := self.look(time.monotonic())) is not None:
                self._end(fault)
            time.sleep(self._interval)

    def look(self, now: float) -> str | None:
        """Returns what is wrong with the next rank, or None. To be called every few seconds.

        Args:
            now: the current time in seconds.
        """
        found = self._read()
        if now - self._looked > 5 * self._interval:  # this process was stopped itself, perhaps with all others
            self._changed = self._moved = now
        self._looked = now
        if found is not None and found != self._seen:
            if self._seen is None or found[1] != self._seen[1]:
                self._moved = now
            self._seen, self._changed = found, now
        return None if self._seen is None else self._fault(self._seen[1], now - self._changed, now - self._moved, now)

    def _fault(self, other: Phase, silent: float, unmoved: float, now: float) -> str | None:
        """Returns what is wrong with the next rank, or None.

        Args:
            other: where it was last.
            silent: seconds since its last heartbeat.
            unmoved: seconds since it was seen to enter that part, or to move within it.
            now: the current time.
        """
        if silent > self._timeout:
            return f"no heartbeat for {silent:.0f} seconds; it was last {other.part}"
        waited = min(unmoved, now - self._entered)
        if other.number < self._position.number and not other.is_alone and waited > self._timeout:
            return f"still {other.part} after {waited:.0f} seconds"
        return None

    def publish(self) -> None:
        """Writes the heartbeat of this rank, with the part that it has reached."""
        self._ticks += 1
        place = self._position
        said = json.dumps([self._ticks, place.number, place.part, place.is_alone])
        with suppress(OSError):  # a full disk is reported where it matters
            alive_file(self._log_dir, self._rank).write_text(said)  # a reader that sees a partial write retries

    def _read(self) -> tuple[int, Phase] | None:
        try:
            tick, *place = json.loads(alive_file(self._log_dir, self._next).read_text())
            return tick, Phase(*place)
        except (OSError, ValueError, TypeError):
            return None

    def _end(self, fault: str) -> None:
        """Ends this process, which ends the job."""
        waits = f"rank {self._rank} is {self._position.part}"
        if (call := collective_of(sys._current_frames().get(self._main or 0))) is not None:
            waits += f", in {call}"
        cause = f"{fault}, while {waits}"
        print(f"rank {self._next} is stuck: {cause}. The stack of this rank:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        self._dump_flight_record()
        outcome = {"status": "failed", "rank": self._next, "cause": f"stuck: {cause}", "explained": True}
        write_outcome(self._log_dir, outcome)
        os._exit(EXIT_FAILED)  # the main thread may be blocked in a collective that never returns

    def _dump_flight_record(self) -> None:
        """Writes NCCL's last collectives. Its own files would be pickled."""
        if not torch.cuda.is_available():
            return
        with suppress(Exception):  # private, and only for people who debug
            record = json.loads(torch._C._distributed_c10d._dump_nccl_trace_json())  # type: ignore[attr-defined]
            write_json(self._log_dir / f"nccl-{self._rank}.json", record)


def collective_of(frame: FrameType | None) -> str | None:
    """Returns the innermost function of torch.distributed on a stack, and the line of ours that called it."""
    name = None
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if name is None and module == "torch.distributed.distributed_c10d":
            name = frame.f_code.co_name
        if module.startswith("pipeline.training.") and module not in OUTSIDE:
            place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            return f"{name or frame.f_code.co_name} at {place}"
        frame = frame.f_back
    return name

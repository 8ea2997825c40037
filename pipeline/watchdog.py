"""A worker must not outlive the process that started it, however that one died.

The parent gives each child a pipe as standard input and never writes to it. When the parent dies, even by
``kill -9``, the kernel closes the pipe and the child's read returns: it then ends itself at once. Grandchildren
started by torchrun inherit the same pipe, so the whole tree goes.
"""

from __future__ import annotations

import os
import sys
import threading

ORPHANED = 70  # exit status of a worker whose parent is gone


def end_with_parent() -> None:
    """Starts the watch. Call it once, at the top of a worker's main, with the pipe as standard input."""
    threading.Thread(target=_wait_for_end, name="end-with-parent", daemon=True).start()


def _wait_for_end() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass  # nothing is ever sent; only the end matters
    os._exit(ORPHANED)  # not sys.exit: the main thread may sit in a collective that never returns

"""Estimates how long a training takes to save and stop after a signal."""

from __future__ import annotations

# Bytes per second and node. One thread hashes 1.5 GB/s and writes 0.6 to 2 GB/s. Every rank has one, but the ranks of a
# node share its disk or its connection to one.
WRITE_RATE = 0.5e9


def write_seconds(checkpoint_bytes: int, nodes: int) -> float:
    """Estimates how long a checkpoint takes to write in the background. All nodes write at once."""
    return checkpoint_bytes / (WRITE_RATE * nodes)


def stop_seconds(checkpoint_bytes: int, nodes: int, step_seconds: float) -> float:
    """Estimates the longest time from a signal to the exit of all ranks.

    It ends the current step. An earlier checkpoint may have just begun to be written, and the last one comes after it.
    """
    return step_seconds + 2 * write_seconds(checkpoint_bytes, nodes)

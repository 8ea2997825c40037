"""Joins the ranks that the launcher has started into one process group, and lets them wait for each other."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from pipeline.files import read_json, write_json
from pipeline.launch.ranks import ADDRESS_VARIABLE, POLL_SECONDS, RENDEZVOUS_VARIABLE, refresh_directory
from pipeline.training.watchdog import Watch

STORE_TIMEOUT = timedelta(hours=6)  # ranks may start that much later than others, as on nodes that read a slow disk
MARGIN = timedelta(seconds=60)  # for the watch, whose message is better, to come before the backend's own timeout
_watch: Watch | None = None


def enter(part: str, is_alone: bool = False) -> None:
    """Records which part of the training this rank has reached; see ``watchdog.Phase``."""
    if _watch is not None:
        _watch.enter(part, is_alone)


def wait_for_all(part: str) -> None:
    """Waits for all ranks, however long. Collectives are not to be used where rank 0 hashes, saves or exports a model.

    Args:
        part: what the others may still be at, for messages.
    """
    if _watch is not None:
        _watch.wait_for_all(part)


def limit_collectives(timeout: timedelta) -> None:
    """Sets the timeout of all groups, including those that DeepSpeed has created with PyTorch's defaults."""
    for group in distributed.distributed_c10d._world.pg_map:
        if distributed.get_rank(group) >= 0:
            distributed.distributed_c10d._set_pg_timeout(timeout + MARGIN, group)


def join_process_group(device: torch.device, timeout: timedelta = STORE_TIMEOUT, log_dir: Path | None = None) -> None:
    """Creates the default process group of all ranks, with NCCL or gloo. Does nothing if there is one.

    Args:
        device: of this rank.
        timeout: how long a collective may take.
        log_dir: of the job, if ranks that are stuck are to end it.
    """
    global _watch
    if distributed.is_initialized():
        return
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # As DeepSpeed does: with one rank, a bound device would only make every further group slower to create.
    bound = device if device.type == "cuda" and ranks > 1 else None
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=_connect(rank == 0, os.environ[ADDRESS_VARIABLE], Path(os.environ[RENDEZVOUS_VARIABLE])),
        rank=rank,
        world_size=ranks,
        timeout=timeout + MARGIN,
        device_id=bound,
    )
    if log_dir is not None and ranks > 1:
        # A connection of its own, since waiting for a key blocks the connection for other threads.
        store = _connect(False, os.environ[ADDRESS_VARIABLE], Path(os.environ[RENDEZVOUS_VARIABLE]))
        _watch = Watch(rank, ranks, timeout.total_seconds(), log_dir, distributed.PrefixStore("watch", store))
        _watch.start()


def _connect(serve: bool, address: str, rendezvous: Path) -> distributed.TCPStore:
    """Connects to the store through which the ranks exchange their addresses.

    Args:
        serve: this rank serves the store, at a free port that the system chooses, and publishes the port.
        address: at which the other ranks reach the one that serves.
        rendezvous: the file with the port.
    """
    if serve:
        # PyTorch would listen on all interfaces.
        listener = _listen(address)
        port = listener.getsockname()[1]
        store = distributed.TCPStore(
            address,
            port,
            is_master=True,
            timeout=STORE_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        write_json(rendezvous, {"port": port})
        return store
    while not rendezvous.exists():
        time.sleep(POLL_SECONDS)
        refresh_directory(rendezvous.parent)
    port = read_json(rendezvous)["port"]
    return distributed.TCPStore(address, port, is_master=False, timeout=STORE_TIMEOUT, wait_for_workers=False)


def _listen(address: str) -> socket.socket:
    """Returns a listening socket at an address, or on all interfaces if no interface of this host has the address."""
    family = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
    try:
        return socket.create_server((address, 0), family=family)
    except OSError as error:  # for example, address translation lies in between
        print(f"{address} is not an address of this host ({error}): listening on all interfaces", flush=True)
        return socket.create_server(("", 0), family=family)

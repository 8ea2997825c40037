"""Joins the ranks that the launcher has started into one process group."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from pipeline.files import read_json, write_json
from pipeline.launch.ranks import ADDRESS_VARIABLE, POLL_SECONDS, RENDEZVOUS_VARIABLE, look_again

# The other ranks wait in a collective while rank 0 hashes, saves or exports a large model, which may take longer than
# the defaults of PyTorch and DeepSpeed. The launcher and the driver detect a dead rank within a minute.
TIMEOUT = timedelta(hours=6)


def join_process_group(device: torch.device) -> None:
    """Creates the default process group of all ranks, with NCCL or gloo. Does nothing if there is one."""
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
        timeout=TIMEOUT,
        device_id=bound,
    )


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
            address, port, is_master=True, timeout=TIMEOUT, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        write_json(rendezvous, {"port": port})
        return store
    while not rendezvous.exists():
        time.sleep(POLL_SECONDS)
        look_again(rendezvous.parent)
    port = read_json(rendezvous)["port"]
    return distributed.TCPStore(address, port, is_master=False, timeout=TIMEOUT, wait_for_workers=False)


def _listen(address: str) -> socket.socket:
    """Returns a listening socket at an address, or on all interfaces if no interface of this host has the address."""
    family = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
    try:
        return socket.create_server((address, 0), family=family)
    except OSError as error:  # for example, address translation lies in between
        print(f"{address} is not an address of this host ({error}): listening on all interfaces", flush=True)
        return socket.create_server(("", 0), family=family)

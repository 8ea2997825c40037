"""Builds the evaluations of a run at the same time, each on its own share of the machine: some GPUs or cores."""

from __future__ import annotations

import queue
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from pipeline.config import Evaluate, Launch, Settings
from pipeline.driver.graph import Node
from pipeline.errors import Stopped
from pipeline.launch.child import wait_or_terminate
from pipeline.launch.machine import Machine, detect_machine, evaluation_processes, first_node_prefix, visible_gpus


class StageProcesses:
    """The processes of stages that run at the same time. They end together."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._ended = False

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Runs a command and returns its exit status. Its standard input is a pipe, which ends it if we die.

        Raises:
            Stopped: ``end`` was called before the command ended.
        """
        with self._lock:
            self.check()
            process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
            self._running.add(process)
        try:
            status = wait_or_terminate(process)
        finally:
            self._running.discard(process)
        self.check()
        return status

    def check(self) -> None:
        """Raises ``Stopped`` if ``end`` was called."""
        if self._ended:
            raise Stopped("another stage has failed")

    def end(self) -> None:
        """Ends all processes, and starts no more."""
        with self._lock:
            self._ended = True
            for process in list(self._running):
                process.terminate()


@dataclass(frozen=True)
class MachineShare:
    """Where a stage runs.

    Attributes:
        processes: of the stages that run at the same time.
        launch: the settings, with the processes of one of them and the threads of each.
        variables: added to the environment of the stage's process.
    """

    processes: StageProcesses
    launch: Launch
    variables: Mapping[str, str] = field(default_factory=dict)


def whole_machine(run: Settings) -> MachineShare:
    """Returns the share of a stage that runs alone, as the settings describe it."""
    return MachineShare(StageProcesses(), run.launch)


def shares_of(run: Settings, models: int) -> list[MachineShare]:
    """Divides the processes of evaluations among models that are scored at the same time.

    Each process has a GPU, or a share of the cores. Models that get several score one task with all of them.

    Args:
        models: how many there are to score. More shares are not made.

    Raises:
        UserError: ``evaluate.processes`` exceeds the number of GPUs.
    """
    if models == 0:
        return [whole_machine(run)]
    machine = detect_machine()
    total = evaluation_processes(run.evaluate, run.launch, machine)
    if models == 1 or total == 1 or first_node_prefix():  # srun would let the steps of one job wait for each other
        return [MachineShare(StageProcesses(), run.launch.model_copy(update={"processes": total}))]
    return _divided(run.launch, machine, total, min(models, total))


def _divided(launch: Launch, machine: Machine, total: int, count: int) -> list[MachineShare]:
    """Returns ``count`` shares of ``total`` processes."""
    threads = launch.threads if launch.threads != "auto" else max(1, machine.cores // total)
    gpus = visible_gpus(machine.gpus) if launch.kind != "cpu" else []
    processes = StageProcesses()
    # Several progress bars would overwrite each other. Without a terminal they are lines.
    variables = {"TTY_COMPATIBLE": "0"}
    shares, first = [], 0
    for index in range(count):
        size = total // count + (index < total % count)
        own = {"CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + size])} if gpus else {}
        changed = launch.model_copy(update={"threads": threads, "processes": size})
        shares.append(MachineShare(processes, changed, {**variables, **own}))
        first += size
    return shares


def batches(nodes: Mapping[str, Node]) -> list[list[Node]]:
    """Splits nodes, parents first, into lists to be built one after another. Evaluations in sequence are one list."""
    found: list[list[Node]] = []
    for node in nodes.values():
        if found and isinstance(node.settings, Evaluate) and isinstance(found[-1][-1].settings, Evaluate):
            found[-1].append(node)
        else:
            found.append([node])
    return found


def build_all(
    nodes: Sequence[Node], shares: Sequence[MachineShare], build: Callable[[Node, MachineShare], None]
) -> None:
    """Builds all nodes, as many at a time as there are shares, each after those whose results it may reuse.

    After a failure the others end, too.

    Raises:
        Exception: what ``build`` raised first.
    """
    if len(shares) == 1:
        for node in nodes:
            build(node, shares[0])
        return
    free: queue.SimpleQueue[MachineShare] = queue.SimpleQueue()
    for share in shares:
        free.put(share)

    def build_in_free_share(node: Node) -> None:
        share = free.get()
        try:
            build(node, share)
        finally:
            free.put(share)

    names = {node.name for node in nodes}
    waiting, running, done = list(nodes), dict[Future[None], str](), set[str]()
    with ThreadPoolExecutor(len(shares)) as pool:
        try:
            while waiting or running:
                ready = [node for node in waiting if {each.name for each in node.reuses.values()} & names <= done]
                running |= {pool.submit(build_in_free_share, node): node.name for node in ready}
                waiting = [node for node in waiting if node not in ready]
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    done.add(running.pop(future))
        except BaseException:
            shares[0].processes.end()
            pool.shutdown(wait=False, cancel_futures=True)
            raise

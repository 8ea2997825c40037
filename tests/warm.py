"""Starts processes without the seconds of imports: a server imports everything once and forks what tests start.

Tests set ``sys.executable`` to ``tests.warm_client``, so that production code starts stages and ranks as always. Each
is a process with real signals, pipes and exit statuses; it only skips ``import torch``. The first client starts the
server, all pytest workers share it, and it ends with pytest. What is not ``-m`` one of ``MODULES`` or ``-P`` one of
``SCRIPTS``, or sets a variable of ``FIXED`` to something else, gets a new interpreter.
"""

from __future__ import annotations

import array
import ast
import atexit
import copy
import gc
import importlib
import os
import random
import runpy
import selectors
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

VARIABLE = "PIPELINE_TEST_PYTHON"  # holds the client's path in a run's processes
REAL = sys.executable
ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    "pipeline", "pipeline.chat", "pipeline.evaluation.worker", "pipeline.models.family_inference", "pipeline.stages",
    "pipeline.training.worker",
    "tests.training.forked", "tests.training.many_tasks", "tests.study.one_worker",
)  # fmt: skip
SCRIPTS = (str(ROOT / "pipeline" / "data" / "tokenizer_worker.py"),)
FIXED = ("OMP_NUM_THREADS", "HF_HOME", "HF_ENDPOINT", "PYTHONHASHSEED")
IMPORTED = (
    "pipeline.__main__", "pipeline.stages.load", "pipeline.stages.expand", "pipeline.stages.tokenize",
    "pipeline.stages.evaluate", "pipeline.stages.report", "pipeline.training.trainer",
    "pipeline.report.plots", "transformers.models.llama.modeling_llama", "deepspeed.runtime.zero.muon.original_muon",
    "transformers.pipelines", "PIL.PngImagePlugin", "setuptools",
)  # fmt: skip
TRACKING = (
    "wandb.sdk.launch.inputs.internal"  # imported by W&B when a run starts, within two seconds if IMPORTED is loaded
)
REQUEST_BYTES = 1 << 18


def install(site: Path | None = None) -> Path:
    """Writes the client for this process and its xdist workers, and returns its path, for ``sys.executable``.

    Args:
        site: a ``sitecustomize.py`` that the server runs before its imports, and every fork before its module. The
            server is for a run that W&B tracks. Without it, a process whose ``PYTHONPATH`` has such a file gets a new
            interpreter.
    """
    place = Path(tempfile.mkdtemp(prefix="warm-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    address = str(place / "server")
    constants = {
        "REAL": REAL,
        "ADDRESS": address,
        "START": (REAL, str(Path(__file__).resolve()), address, str(os.getpid()), *([str(site)] if site else [])),
        "HAS_SITE": site is not None,
        "MODULES": MODULES,
        "SCRIPTS": SCRIPTS,
        "FIXED": {name: os.environ.get(name) for name in FIXED},
    }
    source = (Path(__file__).parent / "warm_client.py").read_text()
    before, guard, after = source.partition('\nif __name__ == "__main__":')
    values = "".join(f"{name} = {value!r}\n" for name, value in constants.items())
    client = place / "python"
    client.write_text(f"#!{REAL} -IS\n{before}\n{values}{guard}{after}")
    client.chmod(0o755)
    return client


def parse_configuration_once() -> None:
    """Makes OmegaConf parse each text once in this process, since hundreds of tests compose the files of conf/."""
    import yaml
    from omegaconf import _utils, omegaconf

    loader = cache(_utils.get_yaml_loader)  # it is another class every time, but they are all the same

    @cache
    def parse(text: str) -> Any:
        return yaml.load(text, Loader=loader())

    def load(stream: IO[str] | str, **_: Any) -> Any:
        return copy.deepcopy(parse(stream if isinstance(stream, str) else stream.read()))

    _utils.get_yaml_loader = loader
    omegaconf.yaml = types.SimpleNamespace(**{**vars(yaml), "load": load})  # type: ignore[attr-defined]


def fork_of(client: int) -> list[int]:
    """Returns the process that a client represents, or an empty list if the process is not a client."""
    place = Path(os.environ[VARIABLE]).parent / str(client)
    return [int(os.readlink(place))] if place.is_symlink() else []


# ---------------------------------------------------------------------------------------- the server


@dataclass(eq=False)
class Fork:
    """A process that was forked for a client."""

    pid: int
    watched: int  # a file descriptor that becomes readable when it ends
    client: socket.socket
    name: Path  # a link from the client's number to this one's
    abandoned: bool = False  # the client no longer exists


class Server:
    """Forks a process per request and tells its client how it ended."""

    def __init__(self, address: str, owner: int, site: types.CodeType | None) -> None:
        self._site = site
        self._place = Path(address).parent
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(address)
        self._listener.listen(64)
        self._owner = os.pidfd_open(owner)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._owner, selectors.EVENT_READ, self._end)
        self._forks: set[Fork] = set()

    def serve(self) -> None:
        """Serves requests until the owner ends."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj in self._selector.get_map():  # not unregistered by an earlier event
                    key.data()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        self._selector.register(client, selectors.EVENT_READ, lambda: self._start(client))

    def _start(self, client: socket.socket) -> None:
        self._selector.unregister(client)
        message, ancillary, _, _ = client.recvmsg(REQUEST_BYTES, socket.CMSG_SPACE(3 * 4))
        if not message:
            client.close()
            return
        streams = array.array("i", ancillary[0][2]).tolist()
        pid = os.fork()
        if pid == 0:
            self._become(ast.literal_eval(message.decode()), streams)
        peer = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        name = self._place / str(struct.unpack("3i", peer)[0])
        name.unlink(missing_ok=True)
        name.symlink_to(str(pid))
        for stream in streams:
            os.close(stream)
        fork = Fork(pid, os.pidfd_open(pid), client, name)
        self._forks.add(fork)
        self._selector.register(fork.watched, selectors.EVENT_READ, lambda: self._tell(fork))
        self._selector.register(client, selectors.EVENT_READ, lambda: self._abandon(fork))
        with suppress(OSError):
            client.send(str(pid).encode())

    def _tell(self, fork: Fork) -> None:
        _, status = os.waitpid(fork.pid, 0)
        self._selector.unregister(fork.watched)
        os.close(fork.watched)
        fork.name.unlink(missing_ok=True)
        if not fork.abandoned:
            self._selector.unregister(fork.client)
            with suppress(OSError):
                fork.client.send(str(os.waitstatus_to_exitcode(status)).encode())
            fork.client.close()
        self._forks.discard(fork)

    def _abandon(self, fork: Fork) -> None:
        """Kills the fork of a client that was killed."""
        self._selector.unregister(fork.client)
        fork.client.close()
        fork.abandoned = True
        os.kill(fork.pid, signal.SIGKILL)

    def _end(self) -> None:
        for fork in self._forks:
            os.kill(fork.pid, signal.SIGKILL)
        shutil.rmtree(self._place, ignore_errors=True)  # an owner that was killed has not removed it
        os._exit(0)

    def _become(self, request: Mapping[str, Any], streams: list[int]) -> None:
        """Runs the requested module in this fork. Does not return."""
        status = 1
        try:
            for target, stream in enumerate(streams):
                os.dup2(stream, target)
            os.closerange(3, max(64, *streams, *self._descriptors()) + 1)
            _settle(request)
            if self._site is not None:
                _media_directory().name = tempfile.mkdtemp("wandb-media")  # removed when this process exits
                exec(self._site, {"__name__": "sitecustomize"})
            status = _run(request["arguments"])
        except BaseException:  # noqa: BLE001  # a fork must not return into the server's loop
            traceback.print_exc()
        finally:
            with suppress(BaseException):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)

    def _descriptors(self) -> list[int]:
        return [int(name) for name in os.listdir("/proc/self/fd")]


def _media_directory() -> tempfile.TemporaryDirectory[str]:
    """W&B's directory for media, which it creates when it is imported."""
    return sys.modules["wandb.sdk.data_types._private"].MEDIA_TMP  # type: ignore[no-any-return]


def _settle(request: Mapping[str, Any]) -> None:
    """Brings this fork into the state of a new interpreter."""
    os.setsid()
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # read from TMPDIR again
    sys.orig_argv = [REAL, *request["arguments"]]
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN if signal.SIGINT in request["ignored"] else signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["mask"])
    path = [request["directory"], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*dict.fromkeys([*path, *sys.path])]
    importlib.invalidate_caches()
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            sys.modules[name].HF_HUB_OFFLINE = offline  # type: ignore[attr-defined]


def _run(arguments: list[str]) -> int:
    """Does what ``python -m MODULE ...`` or ``python -P SCRIPT ...`` does, and returns the exit status."""
    option, module, *rest = arguments
    for name in (module, f"{module}.__main__"):
        if name not in ("pipeline", "pipeline.chat", "pipeline.stages"):
            sys.modules.pop(name, None)
    sys.argv = [module, *rest]
    sys.modules["__main__"] = types.ModuleType("__main__")
    status: Any = 0
    try:
        if option == "-m":
            runpy._run_module_as_main(module)  # type: ignore[attr-defined]
        else:
            runpy.run_path(module, run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    return int(status or 0)


def main(address: str, owner: int, site: str | None = None) -> None:
    """Imports the modules, listens, reports readiness, and serves requests."""
    sys.path[0] = str(ROOT)
    code = compile(Path(site).read_text(), site, "exec") if site else None
    if code is not None:
        exec(code, {"__name__": "sitecustomize"})
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    for name in IMPORTED:
        importlib.import_module(name)
    if site:
        importlib.import_module(TRACKING)
        _media_directory().cleanup()
    parse_configuration_once()
    sys.modules["pipeline.__main__"].compose_jobs(["+experiment=quickstart"], False, None)  # Hydra's plugins
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("llama")  # a second, once
    assert threading.active_count() == 1, "a process with threads cannot be forked"
    gc.collect()
    gc.freeze()
    sys.executable = str(Path(address).parent / "python")
    server = Server(address, owner, code)
    os.write(1, b"!")
    os.dup2(2, 1)
    server.serve()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])

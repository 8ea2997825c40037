"""The environment variables of the processes that the driver starts, and the private directories that they name."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from pipeline.config import Launch
from pipeline.errors import UserError
from pipeline.launch.machine import Placement

# Set by torchrun, accelerate, MPI and the training operators of Kubernetes. They describe the rank of the process that
# a user starts. Its workers must not inherit them, since libraries would take them for the workers' own ranks.
LAUNCHER_VARIABLES = re.compile(
    r"(PET|TORCHELASTIC|ACCELERATE|OMPI_COMM_WORLD|PMI|PMIX|MV2_COMM_WORLD|MPI)_.*|MPI_LOCALRANKID"
    r"|(LOCAL_|GROUP_|ROLE_|CROSS_|NODE_)?RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|(LOCAL|CROSS)_SIZE|ROLE_NAME"
    r"|MASTER_(ADDR|PORT)"
)
# Where libraries keep code that they have compiled and later load and execute.
IMPORTED_CACHE = "TORCHINDUCTOR_CACHE_DIR"  # importing parts of torch already creates this one
CODE_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "torchinductor", "TRITON_CACHE_DIR": "triton"}
WRITABLE_BY_OTHERS = 0o022
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the latter is the older name
# glibc returns large blocks to the kernel as soon as they are freed, which then clears the same pages at every step.
KEEP_FREED_MEMORY = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1_000_000_000))  # bytes


def other_nodes_fault(inherited: Mapping[str, str]) -> UserError | None:
    """Returns an error if a launcher other than Slurm has started this command as one of several nodes."""
    name, nodes = "PET_NNODES", inherited.get("PET_NNODES", "").rpartition(":")[2]  # a number, or MIN:MAX
    if not nodes:
        name, nodes = "WORLD_SIZE", str(_count_nodes(inherited))
    if not nodes.isdecimal() or int(nodes) <= 1:
        return None
    return UserError(
        setting=name,
        value=inherited[name],
        rule=f"this command was started as one of {nodes} nodes, and only Slurm can start training on several nodes",
        remedy=f"Start it on one node (one pod) with all of its GPUs, or unset {name} to train on this node alone.",
    )


def _count_nodes(inherited: Mapping[str, str]) -> int:
    """Returns the number of nodes according to the variables of torchrun, or of Kubeflow's operator."""
    ranks, local = (_number(inherited, name) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if ranks is None or not inherited.keys() >= {"RANK", "MASTER_ADDR"}:
        return 1  # left over from something else
    if local is None and "LOCAL_RANK" not in inherited:  # the operator starts pods, which torchrun would then divide
        local = _number(inherited, "PET_NPROC_PER_NODE") or 1
    return ranks // local if local else 1


def is_secondary_copy(inherited: Mapping[str, str]) -> bool:
    """Returns whether this command was started several times on this node, as by torchrun, and this is not the first.

    DeepSpeed's launcher sets ``LOCAL_SIZE``.
    """
    local = _number(inherited, "LOCAL_WORLD_SIZE") or _number(inherited, "LOCAL_SIZE")
    return local is not None and local == _number(inherited, "WORLD_SIZE") and inherited.get("LOCAL_RANK", "0") != "0"


def _number(inherited: Mapping[str, str], name: str) -> int | None:
    value = inherited.get(name, "")
    return int(value) if value.isdecimal() else None


def python_path(inherited: Mapping[str, str]) -> str:
    """Returns a PYTHONPATH with which a child process can import this package from any working directory."""
    return _prepend(str(Path(__file__).resolve().parents[2]), inherited.get("PYTHONPATH"))


def child_environment(launch: Launch, inherited: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a stage's process."""
    kept = {name: value for name, value in inherited.items() if not LAUNCHER_VARIABLES.fullmatch(name)}
    caches = {name: str(path) for name, path in code_caches(inherited).items()}
    return {
        **kept,
        **caches,
        # PyTorch stores these in the system's directory for temporary files, whatever TORCHINDUCTOR_CACHE_DIR is.
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
        "PYTHONPATH": python_path(inherited),
        "OMP_WAIT_POLICY": launch.wait_policy.upper(),
    }


def worker_environment(launch: Launch, placement: Placement, inherited: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of the workers of a training run."""
    environment = {
        **child_environment(launch, inherited),
        # DeepSpeed runs ninja, which is installed beside the interpreter, even if the environment is not activated.
        "PATH": _prepend(str(Path(sys.executable).parent), inherited.get("PATH")),
        "DS_ACCELERATOR": placement.device,
        "OMP_NUM_THREADS": str(placement.threads),
    }
    if placement.device == "cpu":
        environment = {**KEEP_FREED_MEMORY, **environment, "CUDA_VISIBLE_DEVICES": ""}
    elif not inherited.keys() & ALLOCATOR_VARIABLES:
        # Segments that grow leave no gaps between batches of different shapes, which could not be used otherwise.
        environment[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    if placement.device == "cuda":  # NCCL records its last collectives, which pipeline.training.watchdog writes as JSON
        environment = {"TORCH_FR_BUFFER_SIZE": "2000", **environment, "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    if placement.nodes == 1:  # otherwise gloo and NCCL would listen on addresses that other hosts can reach
        environment |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), _loopback())
    return environment


def _loopback() -> str:
    return next((name for _, name in socket.if_nameindex() if re.fullmatch(r"lo\d*", name)), "lo")


def _prepend(first: str, rest: str | None) -> str:
    parts = [first, *(rest or "").split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(part for part in parts if part))


# --------------------------------------------------------------------------------- compilers and caches


def missing_for_compilation(device: str, inherited: Mapping[str, str]) -> tuple[str, str] | None:
    """Returns what torch.compile needs and this machine lacks, and how to provide it. None if nothing is missing.

    Args:
        device: "cpu", for which C++ is compiled, or "cuda", where Triton compiles its launchers in C.
        inherited: the environment.
    """
    if device == "cpu":
        compiler = inherited.get("CXX", "g++")
        needed = f"torch.compile needs a C++ compiler on CPUs, and {compiler} was not found"
        return None if shutil.which(compiler) else (needed, "Install g++, set CXX to a compiler")
    compilers = [inherited["CC"]] if "CC" in inherited else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        needed = f"Triton needs a C compiler on GPUs, and {' or '.join(compilers)} was not found"
        return needed, "Install gcc, set CC to a compiler"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.is_file():
        return f"Triton needs Python's headers on GPUs, and {headers} was not found", "Install them (python3-dev)"
    return None


def code_caches(inherited: Mapping[str, str]) -> dict[str, Path]:
    """Returns the directories for compiled code by environment variable: inherited, or in the user's cache.

    PyTorch's default is a directory with a guessable name in the system's directory for temporary files, where another
    user may have left files that would be executed.
    """
    home = Path(inherited.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "depth-growth-pipeline"
    return {name: Path(inherited.get(name) or home / default).absolute() for name, default in CODE_CACHES.items()}


def code_cache_faults(inherited: Mapping[str, str], needed: bool) -> Iterator[UserError]:
    """Yields an error for every directory for compiled code to which another user could have written.

    Args:
        inherited: the environment.
        needed: a directory that cannot be created is an error too. The one in ``IMPORTED_CACHE`` is always needed.
    """
    for name, path in code_caches(inherited).items():
        must_exist = needed or name == IMPORTED_CACHE
        fault = _why_not_private(path) if os.path.lexists(path) else _why_not_creatable(path) if must_exist else None
        if fault is not None:
            rule = f"compiled code is stored there and executed, and {fault}"
            remedy = f"Set {name} to a directory that only you can write to. It is created if it does not exist."
            yield UserError(setting=name, value=path, rule=rule, remedy=remedy)


def create_code_caches() -> None:
    """Creates the directories for compiled code that this process's variables name, with access for this user only.

    Raises:
        UserError: another user could have written to one of them.
    """
    for path in code_caches(os.environ).values():
        with suppress(OSError):  # only a training run that compiles needs them, which is checked before it starts
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for fault in code_cache_faults(os.environ, needed=False):
        raise fault


def _why_not_private(path: Path) -> str | None:
    if not path.is_dir():
        return "it is not a directory"
    if {path.lstat().st_uid, path.stat().st_uid} != {os.geteuid()}:
        return "it belongs to another user"
    return "other users can write to it" if path.stat().st_mode & WRITABLE_BY_OTHERS else None


def _why_not_creatable(path: Path) -> str | None:
    place = next(parent for parent in path.parents if os.path.lexists(parent))
    return None if place.is_dir() and os.access(place, os.W_OK | os.X_OK) else f"{place} is not writable"

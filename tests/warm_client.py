"""Replaces ``sys.executable`` in tests: lets a warm server run ``-m MODULE`` in a fork, and otherwise starts Python.

``tests.warm`` writes this file with a first line and its constants to a temporary directory. Only built-in modules are
imported, so that it starts in ten milliseconds. The process behaves as the interpreter would: signals are passed on,
it ends as the fork does, and the fork ends when it is killed.
"""

import _signal as signal
import _socket as socket
import os
import sys

REAL = sys.executable  # the interpreter; what follows is replaced in the written file
ADDRESS = ""  # of the server
START: tuple[str, ...] = ()  # the command that starts the server
MODULES: tuple[str, ...] = ()  # modules that behave the same in a fork as in a new interpreter
SCRIPTS: tuple[str, ...] = ()  # and files
FIXED: dict[str, str | None] = {}  # environment variables that libraries read once, with the server's values
HAS_SITE = False  # whether the server runs the sitecustomize.py that PYTHONPATH has

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def is_warm(arguments: list[str]) -> bool:
    """Returns whether a fork of the server can run these arguments."""
    if len(arguments) < 2 or arguments[1] not in {"-m": MODULES, "-P": SCRIPTS}.get(arguments[0], ()):
        return False
    places = os.environ.get("PYTHONPATH", "").split(":")
    if not HAS_SITE and any(os.path.exists(f"{place}/sitecustomize.py") for place in places):
        return False  # only a new interpreter runs it
    return all(os.environ.get(name) == value for name, value in FIXED.items())


def connect() -> "socket.socket":
    """Returns a connection to the server, which is started if it does not answer."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(ADDRESS)
    except OSError:
        start_server()
        connection.connect(ADDRESS)
    return connection


def start_server() -> None:
    """Starts the server unless another client has, and returns once it listens."""
    import fcntl

    with open(ADDRESS + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(ADDRESS):  # another client was first
            return
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.setsid()
            if os.fork():  # the server is no descendant of its first client
                os._exit(0)
            os.dup2(told, 1)
            os.dup2(os.open(ADDRESS + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.closerange(3, 1024)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.environ.pop("PYTHONPATH", None)
            os.execv(START[0], START)
        os.close(told)
        os.waitpid(child, 0)
        os.read(ready, 1)


def run(arguments: list[str]) -> int:
    """Runs the arguments in a fork and returns its exit status. A signal that ends the fork also ends this process."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    connection = connect()
    ignored = [number for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
    request = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "mask": list(map(int, mask)),
        "ignored": list(map(int, ignored)),
    }
    fds = b"".join(number.to_bytes(4, sys.byteorder) for number in (0, 1, 2))
    connection.sendmsg([repr(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    pid = int(connection.recv(64))

    def pass_on(number: int, frame: object) -> None:
        try:  # noqa: SIM105  # an import costs time
            os.kill(pid, number)
        except ProcessLookupError:
            pass

    for number in PASSED_ON:
        if number not in ignored:
            signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    answer = connection.recv(64)
    status = int(answer) if answer else 1
    if status < 0:
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    given = sys.argv[1:]
    if given[:1] == ["-u"]:  # as the launcher asks
        given = given[1:]
    if not is_warm(given):
        os.execv(REAL, [REAL, *given])
    os._exit(run(given))

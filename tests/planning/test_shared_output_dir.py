"""Two users with one ``output_dir``. Needs root, to become other users in forked children."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.__main__ import compose_jobs
from pipeline.artifacts.fingerprints import Fingerprints
from pipeline.config import Settings
from pipeline.driver.graph import Inputs, build_graph
from pipeline.driver.run import link, record_keys
from pipeline.errors import UserError
from pipeline.files import let_group_write
from pipeline.planning import PreparedRun
from pipeline.planning.checks import CHECKS, _access, _output_dir, find_blockers
from pipeline.planning.prepared import FoundInputs, unwritable

GROUP, ANNA, BERT = 50_000, 50_001, 50_002
ACCESS = [check for check in CHECKS if check.faults in (_access, _output_dir)]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory in which the users' common group can write. pytest's own can be entered by root only."""
    with tempfile.TemporaryDirectory(prefix="shared-") as place:
        os.chmod(place, 0o755)
        output_dir = Path(place) / "out"
        output_dir.mkdir()
        os.chown(output_dir, ANNA, GROUP)
        os.chmod(output_dir, 0o2775)
        yield output_dir


def _as_user(user: int, function: Callable[[], object]) -> str:
    """Calls a function as another user, in a forked child, and returns its error message, or an empty string."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.umask(0o022)
            os.setgroups([GROUP])
            os.setgid(user)
            os.setuid(user)
            function()
        except UserError as error:
            os.write(writer, str(error).encode())
        except BaseException:  # noqa: BLE001
            os.write(writer, traceback.format_exc().encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as stream:
        message = stream.read()
    os.waitpid(child, 0)
    return message


def _prepared(output_dir: Path) -> PreparedRun:
    run: Settings = compose_jobs(
        ["+experiment=quickstart", f"output_dir={output_dir}", "stages=[expand]"], False, None
    )[0].settings
    found = FoundInputs(run.model, run.data, None, {}, "", Inputs("m", "c", "i", "p"), {})
    return PreparedRun(run, found, build_graph(run, found.identities))


def _build(prepared: PreparedRun, name: str, finish: bool, group_writable: bool) -> None:
    """Does what a run does in ``output_dir`` to build an artifact, or to begin it."""
    if group_writable:
        let_group_write()
    if (fault := unwritable(prepared.run.output_dir)) is not None:
        raise fault
    for blocker in find_blockers(prepared, ACCESS):
        raise blocker.fault
    node = prepared.nodes[name]
    record_keys(prepared.run, {name: node})
    with node.artifact.lock().held(print):
        (node.artifact.partial / "logs").mkdir(parents=True, exist_ok=True)
        with open(node.artifact.partial / "logs" / "log", "a") as log:
            log.write(f"built by {os.getuid()}\n")
        if finish:
            node.artifact.commit({})
            link(prepared.run, node)
    Fingerprints(Path(prepared.run.output_dir) / "artifacts" / "fingerprints.jsonl").of_file(Path("/proc/self/stat"))


def test_users_share_a_directory_that_their_group_can_write(shared: Path) -> None:
    def steps(user: int, name: str, finish: bool) -> None:
        assert _as_user(user, lambda: _build(_prepared(shared), name, finish, group_writable=True)) == ""

    steps(ANNA, "load", True)
    steps(ANNA, "expand", False)
    steps(BERT, "expand", True)  # what the other user has begun
    artifact = _prepared(shared).nodes["expand"].artifact
    assert artifact.is_complete() and (artifact.path / "logs" / "log").read_text().count("built by") == 2
    assert _as_user(ANNA, lambda: _build(_prepared(shared), "expand", False, group_writable=True)) == ""


@pytest.mark.parametrize("finish", [True, False])
def test_without_access_a_command_is_refused_with_path_owner_and_umask(shared: Path, finish: bool) -> None:
    assert _as_user(ANNA, lambda: _build(_prepared(shared), "load", finish, group_writable=False)) == ""
    before = sorted(shared.rglob("*"))
    message = _as_user(BERT, lambda: _build(_prepared(shared), "expand", True, group_writable=True))
    assert message.startswith(f"output_dir = {shared}/") and f"belongs to user {ANNA} with mode" in message, message
    assert "umask of this command is 0002" in message and "group_writable=true" in message
    assert sorted(shared.rglob("*")) == before


def test_without_permission_to_read_a_command_is_refused(shared: Path) -> None:
    assert _as_user(ANNA, lambda: _build(_prepared(shared), "load", True, group_writable=True)) == ""
    for private in (_prepared(shared).nodes["load"].artifact.path, shared / "artifacts"):
        os.chmod(private, 0o700)
        message = _as_user(BERT, lambda: _build(_prepared(shared), "expand", True, group_writable=True))
        assert message.startswith(f"output_dir = {private}: it belongs to user {ANNA} with mode 0700"), message

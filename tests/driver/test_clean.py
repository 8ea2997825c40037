"""``action=clean`` removes what no run needs, and nothing else."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.__main__ import compose_jobs, main
from pipeline.artifacts.store import Artifact
from pipeline.config import Settings
from pipeline.driver.clean import clean
from pipeline.driver.graph import Inputs, Node, build_graph
from pipeline.driver.run import KEYS_FILE, link, record_keys
from pipeline.driver.submit import JOBS_FILE, slurm_dir
from pipeline.errors import EXIT_DONE, UserError
from pipeline.files import write_json


def _nodes(tmp_path: Path, *overrides: str) -> tuple[Settings, dict[str, Node]]:
    settings = compose_jobs(["+experiment=quickstart", f"output_dir={tmp_path}", *overrides], False, None)[0].settings
    return settings, build_graph(settings, Inputs("m", "c", "i", "p"))


def _begin(artifact: Artifact) -> Path:
    with artifact.lock().held(print):
        artifact.partial.mkdir(parents=True)
        (artifact.partial / "weights").write_text("weights")
    return artifact.partial


def _finish(node: Node) -> Path:
    _begin(node.artifact)
    node.artifact.commit({"parents": {role: parent.artifact.key for role, parent in node.parents.items()}})
    return node.artifact.path


def _clean(tmp_path: Path, confirm: bool) -> str:
    console = Console(file=io.StringIO(), width=200)
    clean(tmp_path, confirm, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _tree(tmp_path: Path) -> set[Path]:
    return set(tmp_path.rglob("*"))


def test_files_that_vanish_while_they_are_counted_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an attempt of a run that was started again with other settings, and is still running."""
    _, nodes = _nodes(tmp_path)
    partial = _begin(nodes["load"].artifact)
    (partial / "kept").write_bytes(bytes(2**30 // 10))
    is_file, walk = Path.is_file, os.walk

    def is_file_until_now(path: Path) -> bool:
        found = is_file(path)
        if path.name == "weights":
            path.unlink()
        return found

    def walk_and_remove(top: Path, **options: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for entry in walk(top, **options):
            if top == partial:
                (partial / "weights").unlink()
            yield entry

    monkeypatch.setattr(Path, "is_file", is_file_until_now)
    monkeypatch.setattr(os, "walk", walk_and_remove)
    assert "0.1 GiB  lock, partial" in _clean(tmp_path, confirm=False)


def test_only_what_no_run_needs_is_removed(tmp_path: Path) -> None:
    run, nodes = _nodes(tmp_path)
    _, changed = _nodes(tmp_path, "seed=7", "pretrain.steps=5", "model.dtype=float16")
    kept = [_finish(nodes["load"]), _finish(nodes["expand"])]
    link(run, nodes["expand"])  # load is needed as its parent
    kept.append(_begin(nodes["pretrain"].artifact))
    record_keys(run, {"pretrain": nodes["pretrain"]})
    kept.append(_begin(nodes["sft"].artifact))
    (slurm_dir(run)).mkdir()
    write_json(slurm_dir(run) / JOBS_FILE, {"sft": {"job": 1, "log": "", "key": nodes["sft"].artifact.key}})
    removed = [_finish(changed["load"]), _begin(changed["pretrain"].artifact)]
    removed.append(kept[0].with_name(f"{kept[0].name}.old"))
    removed[-1].mkdir()
    removed.append(changed["expand"].artifact.path.with_name(f".{changed['expand'].artifact.key}.partial.{'0' * 32}"))
    removed[-1].mkdir(parents=True)
    locks = [*tmp_path.glob("artifacts/*/*.builder")]
    assert len(locks) == 6

    with changed["sft"].artifact.lock().held(print):
        changed["sft"].artifact.partial.mkdir(parents=True)
        before = _tree(tmp_path)
        listed = _clean(tmp_path, confirm=False)
        assert _tree(tmp_path) == before
        assert all(path.name.lstrip(".")[:12] in listed for path in removed)
        assert f"{changed['sft'].artifact.key[:12]}" in listed and "in use by process" in listed
        assert f"{nodes['pretrain'].artifact.key[:12]}" not in listed
        _clean(tmp_path, confirm=True)
        assert changed["sft"].artifact.partial.exists()
    assert all(path.exists() for path in kept) and not [path for path in removed if path.exists()]
    assert not [path for path in locks if path.exists()]
    assert nodes["load"].artifact.is_complete() and nodes["expand"].artifact.is_complete()
    _clean(tmp_path, confirm=True)
    assert not changed["sft"].artifact.partial.exists()
    assert "0 entries, and 0 unused locks" in _clean(tmp_path, confirm=False)


def test_an_unreadable_record_stops_the_removal(tmp_path: Path) -> None:
    _, nodes = _nodes(tmp_path)
    partial = _begin(nodes["pretrain"].artifact)
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / KEYS_FILE).write_text("\0\0")
    with pytest.raises(UserError, match=KEYS_FILE):
        _clean(tmp_path, confirm=True)
    assert partial.exists()


def test_the_command_lists_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, nodes = _nodes(tmp_path)
    partial = _begin(nodes["pretrain"].artifact)
    command = ["+experiment=quickstart", f"output_dir={tmp_path}", "action=clean"]
    assert main(command) == EXIT_DONE
    assert "add confirm=true" in capsys.readouterr().out and partial.exists()
    assert main([*command, "confirm=true"]) == EXIT_DONE
    assert not partial.exists()
    assert main([*command, f"output_dir={tmp_path / 'none'}"]) == EXIT_DONE
    assert not (tmp_path / "none").exists()

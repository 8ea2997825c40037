"""Commands about finished models refuse those that do not exist, before a process is started."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.errors import EXIT_REQUEST


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["+experiment=quickstart", *arguments]) == EXIT_REQUEST
    message: str = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    "arguments, setting, advice",
    [
        (["target=stf"], "target = stf", "Did you mean sft?"),
        (["target=missing/directory"], "target = missing/directory", "to a directory"),
        (["target=pretrain@20%"], "target = pretrain@20%", "holds only the trained weights"),
        (["compare=load,stf"], "compare = stf", "Did you mean sft?"),
        (["--multirun", "expand=copy,average"], "action = chat", "Leave out --multirun"),
        (["chat.temperature=-1"], "chat.temperature = -1", "greater than or equal to 0"),
    ],
)
def test_a_wrong_target_is_refused(
    arguments: list[str], setting: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = _refused(capsys, "action=chat", *arguments)
    assert message.startswith(setting) and advice in message


def test_a_model_that_is_not_built_yet_is_refused(
    shrunk: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = _refused(capsys, *shrunk, f"output_dir={tmp_path}/outputs", "action=chat")
    assert message.startswith("target = sft") and "action=run and stages=[sft]" in message
    assert not (tmp_path / "outputs").exists()
    message = _refused(capsys, *shrunk, f"output_dir={tmp_path}/outputs", "data.instructions=null", "action=chat")
    assert message.startswith("target = pretrain") and "action=run and stages=[pretrain]" in message


def test_a_directory_that_cannot_answer_is_refused(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    (model / "chat_template.jinja").unlink()
    message = _refused(capsys, "action=chat", f"target={model}")
    assert message.startswith(f"target = {model}") and "no chat template" in message and "target=sft" in message
    message = _refused(capsys, "data.instructions=null", "action=chat", f"target={model}")
    assert "Set data.instructions to conversations" in message
    (model / "model.safetensors").unlink()
    message = _refused(capsys, "action=chat", f"compare=[{tiny_llama_dir},{model}]")
    assert message.startswith(f"compare = {model}") and "neither model.safetensors" in message

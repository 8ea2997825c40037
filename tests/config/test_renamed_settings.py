"""A setting's old name is refused with its new one, wherever the user wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.__main__ import compose_jobs
from pipeline.errors import UserError


def _assert_refused(section: str, overrides: list[str], config_dir: Path | None = None) -> None:
    with pytest.raises(UserError) as caught:
        compose_jobs(overrides, False, config_dir)
    error = caught.value
    assert (error.setting, str(error.value).replace(" ", "")) == (f"{section}.keep_at", "[0.2,0.5]")
    assert f"now called {section}.snapshot_at" in error.rule
    assert error.remedy.replace(" ", "") == f"Set{section}.snapshot_at=[0.2,0.5]instead."


@pytest.mark.parametrize("section", ["pretrain", "sft"])
@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_keep_at_is_refused_on_the_command_line(prefix: str, section: str) -> None:
    _assert_refused(section, ["+experiment=quickstart", f"{prefix}{section}.keep_at=[0.2,0.5]"])


@pytest.mark.parametrize("section", ["pretrain", "sft"])
def test_keep_at_is_refused_in_a_configuration_file(section: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        f"defaults:\n  - quickstart\n  - _self_\n\n{section}:\n  keep_at: [0.2, 0.5]\n"
    )
    _assert_refused(section, ["+experiment=mine"], tmp_path)


def test_keep_at_is_refused_in_a_users_group_file(tmp_path: Path) -> None:
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "mine.yaml").write_text("keep_at: [0.2, 0.5]\n")
    _assert_refused("pretrain", ["+experiment=quickstart", "pretrain=mine"], tmp_path)

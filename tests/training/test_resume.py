import json
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.files import sha256_file, write_json
from pipeline.training.checkpoint import STATE_FILE, Checkpoint
from pipeline.training.resume import check_identity, content_hash, rounding_note
from tests.training.small import train_settings

CURRENT = {"model": "m", "data": "d", "settings": train_settings().key_settings(), "seed": 0}


def checkpoint_of(directory: Path, identity: dict) -> Checkpoint:
    path = directory / "step-00000003"
    path.mkdir()
    write_json(path / STATE_FILE, {"identity": json.loads(json.dumps(identity))})
    return Checkpoint(path)


def test_a_checkpoint_of_this_run_is_accepted(tmp_path: Path):
    check_identity(checkpoint_of(tmp_path, CURRENT), CURRENT, "pretrain")


@pytest.mark.parametrize(
    "change, difference",
    [
        ({"model": "other"}, "the model's files"),
        ({"data": "other"}, "the data's files"),
        ({"seed": 7}, "seed (checkpoint: 7, now: 0)"),
        (
            {"settings": train_settings(learning_rate=0.5).key_settings()},
            "sft.learning_rate (checkpoint: 0.5, now: 0.001)",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_differences(tmp_path: Path, change: dict, difference: str):
    with pytest.raises(UserError) as error:
        check_identity(checkpoint_of(tmp_path, {**CURRENT, **change}), CURRENT, "sft")
    assert error.value.rule.endswith(f"which differs in {difference}")
    assert "step-00000003" in str(error.value.value) and "force=[sft]" in error.value.remedy


def test_files_are_hashed_unless_the_manifest_is_trusted(tmp_path: Path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"frozen weights")
    write_json(tmp_path / "manifest.json", {"files": {
        weights.name: {"sha256": sha256_file(weights)}, "on_the_way/20/model.safetensors": {"sha256": "x"},
    }})  # fmt: skip
    before = content_hash(tmp_path, "*.safetensors", trust_manifest=False)
    assert content_hash(tmp_path, "*.safetensors", trust_manifest=True) == before
    weights.write_bytes(b"frozen weighty")
    assert content_hash(tmp_path, "*.safetensors", trust_manifest=True) == before
    assert content_hash(tmp_path, "*.safetensors", trust_manifest=False) != before


def test_a_changed_number_of_ranks_is_noted():
    saved = {"ranks": 2, "zero_stage": 2, "micro_batch": 4}
    assert rounding_note(saved, saved) is None
    note = rounding_note(saved, {**saved, "ranks": 4})
    assert note is not None and "ranks (checkpoint: 2, now: 4)" in note and "not bitwise" in note

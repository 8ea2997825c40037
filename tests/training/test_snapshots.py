from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.models.reading import ModelDirectory
from pipeline.models.replacing import write_with_replaced
from pipeline.models.stored_parameters import StoredParameters
from pipeline.training.job import snapshot_dir
from pipeline.training.snapshots import materialize_snapshot, save_snapshot

TRAINED = "model.layers.1.mlp.down_proj.weight"


def changed(base: StoredParameters, value: float) -> torch.Tensor:
    return base.read(TRAINED) + value


def test_a_snapshot_is_the_finished_model_with_earlier_weights(grown_dir: Path, tmp_path: Path):
    base, artifact = StoredParameters(ModelDirectory(grown_dir)), tmp_path / "artifact"
    artifact.mkdir()
    for fraction, value in ((0.2, 2.0), (0.125, 1.25)):
        save_snapshot(snapshot_dir(artifact, fraction), base, [TRAINED], iter([(TRAINED, changed(base, value))]))
    write_with_replaced(grown_dir, artifact, {TRAINED: changed(base, 10.0)})
    assert sorted(path.name for path in (artifact / "on_the_way").iterdir()) == ["12.5", "20"]
    snapshot = load_file(artifact / "on_the_way" / "20" / "model.safetensors")
    assert snapshot.keys() == {TRAINED}  # and no frozen weights

    materialize_snapshot(artifact, 0.2, tmp_path / "model")
    ours = load_file(tmp_path / "model" / "model.safetensors")
    before = load_file(grown_dir / "model.safetensors")
    assert ours.keys() == before.keys()
    assert {name for name in ours if not torch.equal(ours[name], before[name])} == {TRAINED}
    assert torch.equal(ours[TRAINED], changed(base, 2.0))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.num_hidden_layers == 4
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template


def test_an_existing_snapshot_stays_until_its_replacement_is_complete(grown_dir: Path, tmp_path: Path):
    """Otherwise a kill while saving it again, after resuming at the same step, would leave a run that cannot resume."""
    base, place = StoredParameters(ModelDirectory(grown_dir)), snapshot_dir(tmp_path, 0.4)
    save_snapshot(place, base, [TRAINED], iter([(TRAINED, changed(base, 1.0))]))

    def killed():
        raise InterruptedError
        yield

    with pytest.raises(InterruptedError):
        save_snapshot(place, base, [TRAINED], killed())
    assert torch.equal(load_file(place / "model.safetensors")[TRAINED], changed(base, 1.0))


def test_saving_again_replaces_the_partial_snapshot_of_a_killed_attempt(grown_dir: Path, tmp_path: Path):
    base, place = StoredParameters(ModelDirectory(grown_dir)), snapshot_dir(tmp_path, 0.4)
    for value in (1.0, 2.0):
        partial = place.with_name(f".{place.name}.partial")
        partial.mkdir(parents=True)
        (partial / "junk").write_text("cut")
        save_snapshot(place, base, [TRAINED], iter([(TRAINED, changed(base, value))]))
    assert torch.equal(load_file(place / "model.safetensors")[TRAINED], changed(base, 2.0))
    assert [path.name for path in place.parent.iterdir()] == ["40"]

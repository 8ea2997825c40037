"""``model.dtype=auto`` is the dtype that most of a checkpoint's weights are stored in, wherever it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from pipeline.__main__ import compose_jobs
from pipeline.errors import UserError
from pipeline.models.checkpoint_dtype import dtype_to_write, resolve_dtype
from pipeline.models.hub import fetch_snapshot
from pipeline.models.source import resolve
from pipeline.planning import prepare
from pipeline.planning.checks import refuse_blocked
from tests.fake_hub import COMMIT, REPO, serve
from tests.plain_settings import model_at
from tests.tiny_gguf import write_gguf


def _own_dtype(path: object) -> str:
    model = model_at(path, dtype="auto")
    return resolve_dtype(model, resolve(model)).dtype


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def _cast(model: Path, dtype: torch.dtype, norms: torch.dtype | None = None) -> None:
    tensors = load_file(model / "model.safetensors")
    cast = {name: tensor.to(norms or dtype if "norm" in name else dtype) for name, tensor in tensors.items()}
    save_file(cast, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_directory_keeps_its_dtype_whatever_its_config_says(model: Path, dtype: str) -> None:
    _cast(model, getattr(torch, dtype))
    assert _own_dtype(model) == dtype


def test_the_dtype_to_write_most_elements_counts(model: Path) -> None:
    _cast(model, torch.bfloat16, norms=torch.float32)
    assert _own_dtype(model) == "bfloat16"


def test_a_dtype_that_is_not_supported_is_refused(model: Path) -> None:
    _cast(model, torch.float64)
    with pytest.raises(UserError, match=r"model.dtype = auto: .*float64.*Set model.dtype=float32"):
        _own_dtype(model)


@pytest.mark.parametrize(("type_", "dtype"), [("F32", "float32"), ("F16", "float16"), ("Q8_0", "bfloat16")])
def test_a_gguf_file_keeps_its_dtype_unless_it_is_quantized(
    tiny_llama_dir: Path, tmp_path: Path, type_: str, dtype: str
) -> None:
    write_gguf(tiny_llama_dir, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType[type_])
    assert _own_dtype(tmp_path / "tiny.gguf") == dtype


def test_fp8_becomes_bfloat16() -> None:
    assert dtype_to_write({"F32": 3, "F8_E4M3": 9}) == "bfloat16"


def test_the_hub_reports_it_before_anything_is_downloaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _cast(model, torch.float16)
    with serve(model, tmp_path / "cache", monkeypatch) as hub:
        assert _own_dtype(REPO) == "float16"
    assert not [path for path in hub.requests if "/resolve/" in path]


def _keys(path: object, output_dir: Path, *overrides: str) -> dict[str, str]:
    arguments = ["+experiment=quickstart", "model=hub", f"model.path={path}", "action=plan", f"output_dir={output_dir}"]
    (job,) = compose_jobs([*arguments, *overrides], False, None)
    (prepared,) = prepare([job.settings])
    return {name: node.artifact.key for name, node in prepared.nodes.items()}


@pytest.mark.parametrize("reports", [True, False])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_keys_are_the_same_online_and_offline(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reports: bool, is_sharded: bool
) -> None:
    _cast(model, torch.float16, norms=torch.float32)
    if is_sharded:
        _shard(model)
    with serve(model, tmp_path / "cache", monkeypatch) as hub:
        hub.reports_elements = reports
        online = _keys(REPO, tmp_path)
        assert not (tmp_path / "cache").exists()  # a plan changes nothing
        fetch_snapshot(REPO, COMMIT, ["*"])
        (tmp_path / f"cache/models--{REPO.replace('/', '--')}/refs").mkdir(exist_ok=True)
        (tmp_path / f"cache/models--{REPO.replace('/', '--')}/refs/main").write_text(COMMIT)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        asked = len(hub.requests)
        assert _keys(REPO, tmp_path) == online == _keys(REPO, tmp_path, "model.dtype=float16")
        assert len(hub.requests) == asked


def _shard(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    weight_map = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, model / file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_dtype_that_cannot_be_read_must_be_set(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    with serve(model, tmp_path / "cache", monkeypatch) as hub:
        hub.reports_elements = False
        with pytest.raises(UserError, match=r"model.dtype = auto: the Hub does not report.*Set model.dtype=bfloat16"):
            _own_dtype(REPO)
        settings = compose_jobs(
            ["+experiment=quickstart", "model=hub", f"model.path={REPO}", f"output_dir={tmp_path}"], False, None
        )[0].settings
        with pytest.raises(UserError, match=r"model.dtype = auto"):
            refuse_blocked(prepare([settings])[0])


def test_no_file_is_read_if_the_dtype_is_given(model: Path) -> None:
    source = resolve(model_at(model))
    (model / "model.safetensors").unlink()
    assert resolve_dtype(model_at(model, dtype="float16"), source).dtype == "float16"


def test_artifacts_have_the_keys_of_the_dtype_itself(model: Path, tmp_path: Path) -> None:
    """So that those of models in bfloat16, which was the default, are still found."""
    _cast(model, torch.bfloat16)

    keys = _keys(model, tmp_path)
    assert keys == _keys(model, tmp_path, "model.dtype=bfloat16")
    assert keys["load"] != _keys(model, tmp_path, "model.dtype=float32")["load"]

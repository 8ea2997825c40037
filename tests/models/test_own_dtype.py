"""``model.dtype=auto`` is the dtype that most of a checkpoint's weights are stored in, wherever it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.__main__ import compose_jobs
from pipeline.errors import UserError
from pipeline.models.own_dtype import known_elements, with_own_dtype
from pipeline.models.source import resolve
from pipeline.planning import prepare
from tests.fake_hub import REPO, serve
from tests.plain_settings import model_at
from tests.tiny_gguf import write_gguf


def _own_dtype(path: object) -> str:
    model = model_at(path, dtype="auto")
    return with_own_dtype(model, known_elements(resolve(model))).dtype


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


def test_the_dtype_of_most_elements_counts(model: Path) -> None:
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
    assert with_own_dtype(model_at("any", dtype="auto"), {"F32": 3, "F8_E4M3": 9}).dtype == "bfloat16"


def test_the_hub_says_it_before_anything_is_downloaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _cast(model, torch.float16)
    with serve(model, tmp_path / "cache", monkeypatch) as hub:
        assert _own_dtype(REPO) == "float16"
    assert not [path for path in hub.requests if "/resolve/" in path]


def test_artifacts_have_the_keys_of_the_dtype_itself(model: Path, tmp_path: Path) -> None:
    """So that those of models in bfloat16, which was the default, are still found."""
    _cast(model, torch.bfloat16)

    def keys(*dtype: str) -> dict[str, str]:
        arguments = ["+experiment=quickstart", "model=hub", f"model.path={model}", *dtype, "action=plan"]
        job = compose_jobs([*arguments, f"output_dir={tmp_path}"], False, None)[0]
        (prepared,) = prepare([job.settings])
        return {name: node.artifact.key for name, node in prepared.nodes.items()}

    assert keys() == keys("model.dtype=bfloat16")
    assert keys()["load"] != keys("model.dtype=float32")["load"]

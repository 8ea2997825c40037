"""The load stage: converts a Hub model, a local directory or a GGUF file into a safetensors directory of one dtype.

Safetensors are cast tensor by tensor. Only a GGUF file is loaded into memory as a complete model, because transformers
dequantizes it. Nothing is unpickled, and no code of the model runs unless ``model.trust_remote_code`` is set.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from pipeline.artifacts.task import Metrics, StageTask
from pipeline.config import Model
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.models import hub
from pipeline.models.families import FAMILIES
from pipeline.models.reading import ModelDirectory, copy_side_files
from pipeline.models.source import ModelSource, check_shape, config_of, resolve, wanted_files
from pipeline.models.tensors import DTYPES, TensorSpec, is_finite
from pipeline.models.weight_files import refuse_quantized
from pipeline.models.writing import ShardWriter, remove_weights
from pipeline.progress import progress


def run(task: StageTask) -> Metrics:
    """Writes the base model to ``task.out``.

    Raises:
        UserError: there is no such model, or it cannot be used.
    """
    model = task.settings
    assert isinstance(model, Model)
    source = resolve(model)
    directory = _fetch(source, model)
    check_shape(model, config_of(source))
    if source.gguf_file is None:
        copy_safetensors(directory, task.out, model)
    else:
        unpack_gguf(directory, source.gguf_file, task.out, model)
    written = ModelDirectory(task.out)
    AutoTokenizer.from_pretrained(task.out, **_trust(model))  # a broken tokenizer fails here, not stages later
    return {
        "source": source.identity or source.kind,
        "commit": source.commit,
        "model_type": written.config["model_type"],
        "num_hidden_layers": written.config["num_hidden_layers"],
        "parameters": sum(spec.numel for spec in written.specs.values()),
        "dtype": model.dtype,
    }


def _fetch(source: ModelSource, model: Model) -> Path:
    if source.directory is not None:
        return source.directory
    assert source.repo is not None and source.commit is not None
    return hub.fetch_snapshot(source.repo, source.commit, wanted_files(model))


def _trust(model: Model) -> dict[str, bool]:
    return {"trust_remote_code": True} if model.trust_remote_code else {}


def copy_safetensors(directory: Path, out: Path, model: Model) -> None:
    """Casts a safetensors directory tensor by tensor, and copies its other files.

    Args:
        directory: the model to read.
        out: an existing directory.
        model: the settings, for the dtype and for remote code.

    Raises:
        UserError: the weights are quantized or not finite, or contradict the config about tied embeddings.
    """
    base = ModelDirectory(directory)
    refuse_quantized(base.config, model.path)
    dropped = _redundant(base)
    specs = {name: _cast_spec(spec, model) for name, spec in base.specs.items() if name not in dropped}
    with ShardWriter(out, specs) as writer, progress("load", total=len(specs)) as bar:
        for name, spec in specs.items():
            writer.write(name, _cast(name, base.read(name), spec, model))
            bar.advance(1, note=name)
    write_json(out / "config.json", _clean_config(base.config, model))
    copy_side_files(directory, out)
    if model.trust_remote_code:
        for code in directory.glob("*.py"):
            shutil.copyfile(code, out / code.name)


def _cast_spec(spec: TensorSpec, model: Model) -> TensorSpec:
    return TensorSpec(DTYPES[model.dtype] if spec.dtype.is_floating_point else spec.dtype, spec.shape)


def _cast(name: str, stored: Tensor, spec: TensorSpec, model: Model) -> Tensor:
    cast = stored.to(spec.dtype)
    if not is_finite(cast):
        raise _too_large(name, model) if is_finite(stored) else _not_finite(name, model)
    return cast


def _too_large(name: str, model: Model) -> UserError:
    return UserError(
        setting="model.dtype",
        value=model.dtype,
        rule=f"{name} has values that are too large for this dtype",
        remedy="Set model.dtype=bfloat16 or model.dtype=float32.",
    )


def _not_finite(name: str, model: Model) -> UserError:
    return UserError(
        setting="model.path",
        value=model.path,
        rule=f"{name} contains NaN or infinity, which every model made from it would inherit",
        remedy="Download the model again. If it was saved that way, use an earlier checkpoint.",
    )


def _redundant(base: ModelDirectory) -> set[str]:
    """Returns the tensors that need not be stored: derived buffers, and a head that is tied to the embeddings."""
    family = FAMILIES.get(base.config["model_type"])
    if family is None:
        return set()
    names = {name for name in base.specs if family.is_derived(name)}
    if base.config.get("tie_word_embeddings") and {family.embeddings, family.stored_lm_head} <= set(base.specs):
        if not torch.equal(base.read(family.embeddings), base.read(family.stored_lm_head)):
            raise UserError(
                setting="model.path",
                value=base.path,
                rule=f"config.json ties {family.stored_lm_head} to the embeddings, but their weights differ",
                remedy="Set tie_word_embeddings to false in its config.json if they are meant to differ.",
            )
        names.add(family.stored_lm_head)
    return names


def _clean_config(config: dict[str, Any], model: Model) -> dict[str, Any]:
    """Returns the config with the dtype of the written weights, and without entries about its origin."""
    dropped = {"_name_or_path", "torch_dtype"} | (set() if model.trust_remote_code else {"auto_map"})
    return {**{name: value for name, value in config.items() if name not in dropped}, "dtype": model.dtype}


def unpack_gguf(directory: Path, gguf_file: str, out: Path, model: Model) -> None:
    """Dequantizes a GGUF file with transformers, with the complete model in memory in ``model.dtype``.

    Args:
        directory: the directory of the file.
        gguf_file: its name.
        out: an existing directory.
        model: the settings, for the dtype and for remote code.

    Raises:
        UserError: the weights are not finite.
    """
    unpacked = AutoModelForCausalLM.from_pretrained(
        directory,
        gguf_file=gguf_file,
        dtype=DTYPES[model.dtype],
        quantization_config=GgufConfig(dequantize=True),  # without it, some GGUF types stay packed
        **_trust(model),
    )
    for name, parameter in unpacked.named_parameters():
        assert type(parameter.data) is torch.Tensor and parameter.dtype == DTYPES[model.dtype], f"{name} is packed"
        if not is_finite(parameter.detach()):
            raise _not_finite(name, model)
    if hasattr(unpacked.config, "quantization_config"):
        del unpacked.config.quantization_config  # the weights are plain now, and saving would try to pack them
    remove_weights(out)
    unpacked.save_pretrained(out)
    AutoTokenizer.from_pretrained(directory, gguf_file=gguf_file, **_trust(model)).save_pretrained(out)

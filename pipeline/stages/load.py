"""The load stage: converts a Hub model, a local directory or a GGUF file into a safetensors directory of one dtype.

Safetensors are dequantized and cast tensor by tensor. Only a GGUF file that transformers dequantizes is loaded into
memory as a complete model. Nothing is unpickled, and no code of the model runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.artifacts.task import Metrics, StageTask
from pipeline.config import Model
from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError
from pipeline.files import read_json, write_json
from pipeline.models import hub
from pipeline.models.checkpoint_dtype import resolve_dtype
from pipeline.models.config_json import as_nested, depth_of, is_nested, with_language_config
from pipeline.models.families import INFERRED, check_stored, family_for, weights_disagree
from pipeline.models.fp8 import Fp8Directory
from pipeline.models.gguf import UNREAD, Metadata, read_metadata
from pipeline.models.gguf_weights import GgufWeights
from pipeline.models.layer_config import complete_config
from pipeline.models.loading import build_on_meta, is_tied, weight_faults
from pipeline.models.quantization import check_quantization, is_fp8
from pipeline.models.reading import ModelDirectory, StoredWeights, copy_side_files
from pipeline.models.source import ModelSource, check_shape, config_of, refuse_code, resolve, wanted_files
from pipeline.models.tensors import DTYPES, SAFETENSORS_DTYPES, TensorSpec, is_finite
from pipeline.models.tokenizer_files import check_tokenizer_files
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
    model = resolve_dtype(model, source, directory)
    config = config_of(source)
    refuse_code(model, config)
    check_shape(model, config)
    if source.gguf_file is None:
        warnings = copy_safetensors(directory, task.out, model)
    else:
        warnings = unpack_gguf(directory, source.gguf_file, task.out, model)
    written = ModelDirectory(task.out)
    return {
        "source": source.identity or source.kind,
        "commit": source.commit,
        "model_type": written.config["model_type"],
        "num_hidden_layers": depth_of(written.config),
        **_inferred(written.config, warnings),
        "parameters": sum(spec.numel for spec in written.specs.values()),
        "dtype": model.dtype,
    }


def _inferred(config: dict[str, Any], warnings: list[str]) -> Metrics:
    """Returns the warnings of the manifest and the log, among them that a family was inferred. Empty if none."""
    if family_for(config).inference is None:
        return {"warnings": warnings} if warnings else {}
    told = f"the family {config['model_type']} has no row in the table of families: roles are inferred from its modules"
    return {"family": INFERRED, "warnings": [told, *warnings]}


def _fetch(source: ModelSource, model: Model) -> Path:
    if source.directory is not None:
        return source.directory
    assert source.repo is not None and source.commit is not None
    return hub.fetch_snapshot(source.repo, source.commit, wanted_files(model))


def copy_safetensors(directory: Path, out: Path, model: Model) -> list[str]:
    """Casts a safetensors directory tensor by tensor, and copies its other files.

    Everything that headers, config and tokenizer show is checked before the first weight is read.

    Args:
        directory: the model to read.
        out: an existing directory.
        model: the settings, for the dtype and for remote code.

    Returns:
        A warning if some weights are rounded.

    Raises:
        UserError: the weights are quantized and may not be dequantized, are not finite, or are not those of the
            config's model; or the tokenizer does not fit the model.
    """
    config = as_nested(read_json(directory / "config.json"))
    check_quantization(config, model)
    base = Fp8Directory(directory) if is_fp8(config) else ModelDirectory(directory)
    write_json(out / "config.json", _clean_config(config, model))
    if is_nested(config):  # such a config may leave out even the size of the vocabulary
        write_json(out / "config.json", with_language_config(read_json(out / "config.json"), complete_config(out)))
    copy_side_files(directory, out, with_code=model.trust_remote_code)
    sources = _weights_to_write(base, config, out, model)
    _write_weights(base, sources, out, model)
    return _rounding(Counter(base.specs[stored].dtype for stored in sources.values()), model)


def _write_weights(base: StoredWeights, sources: Mapping[str, str], out: Path, model: Model) -> None:
    """Casts and writes tensors, given by their names in ``base`` by those to write, one at a time."""
    specs = {name: _cast_spec(base.specs[stored], model) for name, stored in sources.items()}
    with ShardWriter(out, specs) as writer, progress("load", total=len(specs)) as bar:
        for name, spec in specs.items():
            writer.write(name, _cast(name, base.read(sources[name]), spec, model))
            bar.advance(1, note=name)


def _rounding(tensors: Mapping[torch.dtype, int], model: Model) -> list[str]:
    """Returns a warning for every dtype, of ``tensors`` stored in it, that ``model.dtype`` cannot hold exactly."""
    written = DTYPES[model.dtype]
    return [
        f"{count} tensors are stored in {str(dtype).removeprefix('torch.')} and rounded to {model.dtype}"
        for dtype, count in tensors.items()
        if dtype.is_floating_point and dtype.itemsize > 1 and torch.promote_types(dtype, written) != written
    ]


def _check_tokenizer(out: Path, model: Model) -> None:
    """Loads the tokenizer as later stages do.

    Raises:
        UserError: it cannot be loaded, or does not fit the model.
    """
    check_tokenizer_files([file.name for file in out.iterdir()], model.path, out)  # those of a Hub model as well
    try:
        TextTokenizer(out)
    except UserError as error:
        raise UserError(setting=error.setting, value=model.path, rule=error.rule, remedy=error.remedy) from error


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


def _weights_to_write(base: StoredWeights, config: dict[str, Any], out: Path, model: Model) -> dict[str, str]:
    """Decides which tensors the artifact consists of, by the model that transformers builds from its config.

    Derived buffers are left out, and so is a head that is tied to the embeddings and equal to them. If a tied model
    stores only its head, that becomes the embeddings.

    Args:
        base: the model to read.
        config: its config.
        out: the directory with its cleaned config.json.
        model: the settings, for messages.

    Returns:
        The name in ``base`` of every tensor, by the name to write.

    Raises:
        UserError: the weights are not those of the config's model, or the tokenizer does not fit it.
    """
    family = family_for(config)
    built = build_on_meta(out, model.path)
    _check_tokenizer(out, model)
    check_stored(config, {name: spec.shape for name, spec in base.specs.items()}, model.path)
    sources = {name: stored for name, stored in family.stored_as(base.specs).items() if not family.is_derived(name)}
    if is_tied(built) and family.stored_lm_head in sources:
        head = sources.pop(family.stored_lm_head)
        embeddings = sources.setdefault(family.embeddings, head)
        if base.specs[head].shape != base.specs[embeddings].shape or not torch.equal(
            base.read(head), base.read(embeddings)
        ):
            raise UserError(
                setting="model.path",
                value=model.path,
                rule=f"its config ties {head} to the embeddings (tie_word_embeddings, by default or as given), but "
                "their weights differ",
                remedy="Set tie_word_embeddings to false in its config.json if they are meant to differ.",
            )
    if faults := weight_faults(built, {name: base.specs[stored] for name, stored in sources.items()}):
        raise weights_disagree(model.path, "; ".join(faults))
    return sources


def _clean_config(config: dict[str, Any], model: Model) -> dict[str, Any]:
    """Returns the config with the dtype of the written weights, and without its origin, its use and quantization.

    The implementation of attention is chosen where the model is loaded, and a saved choice may not be installed there.
    """
    dropped = {"_name_or_path", "torch_dtype", "attn_implementation", "_attn_implementation", "quantization_config"} | (
        set() if model.trust_remote_code else {"auto_map"}
    )
    kept = {name: value for name, value in config.items() if name not in dropped}
    parts = {name: _clean_config(value, model) for name, value in kept.items() if _is_config(value)}
    return {**kept, **parts, "dtype": model.dtype}


def _is_config(value: object) -> bool:
    """Returns whether an entry is the config of a model inside the model."""
    return isinstance(value, dict) and "model_type" in value


def unpack_gguf(directory: Path, gguf_file: str, out: Path, model: Model) -> list[str]:
    """Dequantizes a GGUF file: with transformers, with the complete model in memory, or else tensor by tensor.

    Args:
        directory: the directory of the file.
        gguf_file: its name.
        out: an existing directory.
        model: the settings, for the dtype.

    Returns:
        A warning if some weights are rounded. Quantized ones do not count.

    Raises:
        UserError: a tensor is missing, is not read or is not finite, or the tokenizer does not fit the model.
    """
    metadata = read_metadata(directory / gguf_file)
    plain = {SAFETENSORS_DTYPES[name]: n for name, n in metadata.tensors.items() if name in SAFETENSORS_DTYPES}
    if metadata.is_read_here:
        _unpack_here(directory / gguf_file, metadata, out, model)
    else:
        _unpack_with_transformers(directory, gguf_file, metadata, out, model)
    return _rounding(plain, model)


def _unpack_here(file: Path, metadata: Metadata, out: Path, model: Model) -> None:
    config = {name: value for name, value in metadata.config().items() if name != "has_chat_template"}
    architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[metadata.family]]
    write_json(out / "config.json", {**config, "architectures": architectures, "dtype": model.dtype})
    # AutoTokenizer would ask transformers for the config that is in the file.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    tokenizer.save_pretrained(out)
    weights = GgufWeights(file, metadata)
    _write_weights(weights, _weights_to_write(weights, config, out, model), out, model)


def _unpack_with_transformers(directory: Path, gguf_file: str, metadata: Metadata, out: Path, model: Model) -> None:
    config = AutoConfig.from_pretrained(directory, gguf_file=gguf_file, trust_remote_code=False)
    _complete(config, metadata)
    config.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=gguf_file, trust_remote_code=False)
    tokenizer.save_pretrained(out)
    _check_tokenizer(out, model)
    unpacked, report = AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        gguf_file=gguf_file,
        dtype=DTYPES[model.dtype],
        quantization_config=GgufConfig(dequantize=True),  # without it, some GGUF types stay packed
        trust_remote_code=False,
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            setting="model.gguf_file",
            value=gguf_file,
            rule=f"it lacks {', '.join(missing[:3])}, which {type(unpacked).__name__} has",
            remedy="Download the file again, or set model.gguf_file to another one.",
        )
    _check_number_of_weights(unpacked, metadata, gguf_file)
    for name, parameter in unpacked.named_parameters():
        assert type(parameter.data) is torch.Tensor and parameter.dtype == DTYPES[model.dtype], f"{name} is packed"
        if not is_finite(parameter.detach()):
            raise _not_finite(name, model)
    if hasattr(unpacked.config, "quantization_config"):
        del unpacked.config.quantization_config  # the weights are plain now, and saving would try to pack them
    remove_weights(out)
    unpacked.save_pretrained(out)


def _complete(config: PreTrainedConfig, metadata: Metadata) -> None:
    """Sets what a GGUF file says about its model but transformers does not read, which would be the class's default."""
    stated = {name: value for name, value in metadata.config().items() if name in UNREAD and hasattr(config, name)}
    rotary, rope = metadata.rotary, getattr(config, "rope_parameters", None) or {}
    config.update({**stated, "rope_parameters": {**rope, **{name: rotary[name] for name in rotary if name in rope}}})


def _check_number_of_weights(unpacked: PreTrainedModel, metadata: Metadata, gguf_file: str) -> None:
    """Checks that every weight of a GGUF file is in the model. transformers ignores tensors that it does not know.

    Raises:
        UserError: it is not.
    """
    stored = sum(metadata.elements.values())
    if is_tied(unpacked) and "output.weight" in metadata.tensor_names:  # the head of falcon and bloom
        stored -= unpacked.get_input_embeddings().weight.numel()
    distinct = {tensor.data_ptr(): tensor.numel() for tensor in unpacked.state_dict().values()}
    read = sum(distinct.values())
    if stored > read:
        raise UserError(
            setting="model.gguf_file",
            value=gguf_file,
            rule=f"it has {stored:,} weights, but {type(unpacked).__name__} as transformers builds it only {read:,}",
            remedy="Use the model's safetensors, for example from the Hugging Face Hub.",
        )

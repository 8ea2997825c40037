"""Methods on tiny random models of all families, from directory to directory, verified with plain transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.artifacts.task import Metrics
from pipeline.config import METHODS, AnyExpand
from pipeline.files import read_json, write_json
from pipeline.stages import expand
from tests.stages.one_task import make_task
from tests.tiny_families import TINY_CONFIGS, layers_by_role, save_tiny

ExpandSettings = Callable[..., AnyExpand]
NEW_LAYERS = 2
TINY_LESA = {"epochs": 1, "hidden_size": 8, "batch_size": 256}
KEEPS_LOGITS = ("llama_pro", "opt_deus", "random_init", "lesa zeroed", "none")
CASES = [*METHODS, "lesa zeroed"]
# Every method on one family of each kind, and on every family one method that copies, one that averages and one that
# predicts. What a method and a family have in common is only the list of a layer's tensors.
KINDS = ("llama", "gemma2", "phi3", "mixtral")  # plain, windows and more norms, fused, experts
EVERYWHERE = ("llama_pro", "average", "lesa")
PAIRS = [(family, case) for family in TINY_CONFIGS for case in CASES if family in KINDS or case in EVERYWHERE]
TOKENS = torch.randint(3, 384, (2, 24), generator=torch.Generator().manual_seed(1))  # longer than the windows


class Deeper(NamedTuple):
    """An expanded model and its base."""

    base: Path
    path: Path
    model: PreTrainedModel
    rows: list[dict[str, Any]]  # of expansion.json
    metrics: Metrics


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[[str], Path]:
    """Returns the directory of a family's tiny model, which is made once."""
    return cache(lambda family: save_tiny(family, tmp_path_factory.mktemp(family), tiny_tokenizer))


@pytest.fixture
def base(request: pytest.FixtureRequest, base_of: Callable[[str], Path]) -> Path:
    """A tiny model of the requested family."""
    return base_of(request.param)


def _settings(expand_settings: ExpandSettings, case: str, position: object = "interleaved") -> AnyExpand:
    method, _, zeroed = case.partition(" ")
    own = {**TINY_LESA, "zero_init": bool(zeroed)} if method == "lesa" else {}
    return expand_settings(method, new_layers=NEW_LAYERS, position=position, **own)


def _grow(base: Path, settings: AnyExpand, out: Path) -> Deeper:
    metrics = expand.run(make_task("expand", settings, out, {"load": base}))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    return Deeper(base, out, model, read_json(out / "expansion.json")["layers"], metrics)


def _loss(model: PreTrainedModel) -> Tensor:
    loss: Tensor = model(TOKENS, labels=TOKENS, use_cache=False).loss
    return loss


@pytest.mark.parametrize("base, case", PAIRS, indirect=["base"])
def test_methods_on_families(base: Path, case: str, expand_settings: ExpandSettings, tmp_path: Path) -> None:
    _check(_grow(base, _settings(expand_settings, case), tmp_path / "out"), case)


@pytest.mark.parametrize("by_index", [False, True])
def test_adding_layers_that_changes_those_of_the_base_is_a_warning(
    by_index: bool, expand_settings: ExpandSettings, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """GPT-2 can divide the scores of attention by the number of the layer."""
    base = save_tiny("gpt2", tmp_path / "base", tiny_tokenizer, scale_attn_by_inverse_layer_idx=by_index)
    changed = _grow(base, expand_settings("copy", new_layers=1, position=[0]), tmp_path / "copy").metrics["warnings"]
    assert ["change the base's own layers" in warning for warning in changed] == [True] * by_index
    assert not _grow(base, expand_settings("none"), tmp_path / "none").metrics["warnings"]


@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("none", "solar", "stack")])
def test_every_method_after_the_first_and_after_the_last_layer(
    base: Path, case: str, expand_settings: ExpandSettings, tmp_path: Path
) -> None:
    """A method sees gaps, whatever names them (see test_layer_plan.py). The last one has no upper neighbor."""
    _check(_grow(base, _settings(expand_settings, case, [0, 3]), tmp_path / "out"), case)


def _check(deeper: Deeper, case: str) -> None:
    _check_kinds_of_layers(deeper)
    if case == "llama_pro":  # how a model decodes depends on its layers' kinds, not on their values
        _check_generation(deeper.model)
    if case in KEEPS_LOGITS:
        original = AutoModelForCausalLM.from_pretrained(deeper.base, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(deeper.model(TOKENS).logits, original(TOKENS).logits)
        if case != "none":
            _check_first_step(deeper)


def _check_kinds_of_layers(deeper: Deeper) -> None:
    """All values are finite, embeddings are tied as in the base, and layers have the kind of their lower source."""
    for name, parameter in deeper.model.named_parameters():
        assert torch.isfinite(parameter).all(), name
    before, after = (AutoConfig.from_pretrained(path).to_dict() for path in (deeper.base, deeper.path))
    sources = [row["from"][0] for row in deeper.rows]
    for name in ("layer_types", "no_rope_layers"):
        if before.get(name):
            assert after[name] == [before[name][source] for source in sources]
    if before.get("max_window_layers") in (1, 2):
        assert after["max_window_layers"] == sum(source < before["max_window_layers"] for source in sources)
    tied = deeper.model.get_output_embeddings().weight is deeper.model.get_input_embeddings().weight
    assert tied == before["tie_word_embeddings"]


def _check_generation(model: PreTrainedModel) -> None:
    cached, uncached = (
        model.generate(
            TOKENS[:1, :12], max_new_tokens=6, do_sample=False, use_cache=use_cache, output_logits=True,
            return_dict_in_generate=True, eos_token_id=None,
        )
        for use_cache in (True, False)
    )  # fmt: skip
    assert torch.isfinite(torch.stack(uncached.logits)).all()
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-4, rtol=1e-4)


def _check_first_step(deeper: Deeper) -> None:
    """One AdamW step on the new layers reaches all of them and hardly changes the loss."""
    model = deeper.model
    before = _loss(model).item()
    new = {f"layers.{row['layer']}." for row in deeper.rows if row["new"]}
    trained = {name: p for name, p in model.named_parameters() if any(layer in name for layer in new)}
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-4)
    _loss(model).backward()
    moving = {name for name, p in trained.items() if p.grad is not None and p.grad.any()}
    optimizer.step()
    assert len({name.partition("layers.")[2].partition(".")[0] for name in moving}) == NEW_LAYERS
    assert _loss(model).item() == pytest.approx(before, rel=0.01)


# ------------------------------------------------------------------------ fused tensors and experts


@pytest.fixture(scope="module")
def fused_and_plain(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, tuple[Path, Path]]:
    """Pairs of the same model: with fused tensors on disk, and with one tensor per matrix."""
    folder = tmp_path_factory.mktemp("pairs")
    phi3 = save_tiny("phi3", folder / "phi3", tiny_tokenizer)
    moe = save_tiny("qwen3_moe", folder / "moe", tiny_tokenizer)
    stacked = save_tiny("qwen3_moe", folder / "stacked", tiny_tokenizer, save_original_format=False)
    return {"phi3": (phi3, _as_llama(phi3, folder / "llama")), "qwen3_moe": (stacked, moe)}


def _as_llama(phi3: Path, llama: Path) -> Path:
    """Writes a Phi-3 with its matrices stored as Llama stores them."""
    shutil.copytree(phi3, llama)
    stored = load_file(phi3 / "model.safetensors")
    outside = {name: tensor for name, tensor in stored.items() if "layers" not in name}
    inside = {
        f"model.layers.{layer}.{name}": tensor.contiguous()
        for layer, tensors in enumerate(layers_by_role(phi3))
        for name, tensor in tensors.items()
    }
    save_file({**outside, **inside}, llama / "model.safetensors", metadata={"format": "pt"})
    changes = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "sliding_window": None}
    write_json(llama / "config.json", {**read_json(phi3 / "config.json"), **changes})
    return llama


@pytest.mark.parametrize("case", ["lesa", "llama_pro", "opt_deus", "average"])
@pytest.mark.parametrize("pair", ["phi3", "qwen3_moe"])
def test_fused_tensors_are_expanded_like_separate_ones(
    pair: str, case: str, fused_and_plain: Any, expand_settings: ExpandSettings, tmp_path: Path
) -> None:
    made = []
    for name, base in zip(("fused", "plain"), fused_and_plain[pair], strict=True):
        made.append(layers_by_role(_grow(base, _settings(expand_settings, case), tmp_path / name).path))
    for fused, plain in zip(*made, strict=True):
        assert set(fused) == set(plain)
        for name, tensor in plain.items():
            torch.testing.assert_close(fused[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", ["qwen2_moe", "gpt_oss"], indirect=True)
@pytest.mark.parametrize("case", ["lesa", "average", "opt_deus"])
def test_routers_and_experts_keep_the_order_of_experts(
    base: Path, case: str, expand_settings: ExpandSettings, tmp_path: Path
) -> None:
    deeper = _grow(base, _settings(expand_settings, case, position=[1, 2]), tmp_path / "out")
    before, after = layers_by_role(base), layers_by_role(deeper.path)
    lower, made, upper = before[1], after[2], before[2]
    routers = [name for name in made if "router" in name or name.removesuffix(".weight").endswith("gate")]
    for name in routers:
        if case == "lesa":
            assert torch.equal(made[name], lower[name])
        elif case == "average" or name.endswith("bias"):
            torch.testing.assert_close(made[name], (lower[name] + upper[name]) / 2)
        else:  # a soft permutation of the input, so each row keeps its sum
            moved = 2 * made[name] - upper[name]
            torch.testing.assert_close(moved.sum(dim=1), lower[name].sum(dim=1), rtol=0.02, atol=0.02)
    if case == "average":
        assert all(torch.equal(tensor, (lower[name] + upper[name]) / 2) for name, tensor in made.items())
    if case == "opt_deus":
        outputs = [tensor for name, tensor in made.items() if "down_proj" in name or "o_proj" in name]
        assert len(outputs) > 3 and not any(tensor.any() for tensor in outputs)


@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize("case", ["lesa zeroed", "llama_pro", "average"])
def test_four_new_layers_per_base_layer(base: Path, case: str, expand_settings: ExpandSettings, tmp_path: Path) -> None:
    settings = _settings(expand_settings, case).model_copy(update={"new_layers": 16})
    deeper = _grow(base, settings, tmp_path / "out")
    _check_kinds_of_layers(deeper)
    assert [row["new"] for row in deeper.rows] == [False, *[True] * 4] * 4
    assert sum("3 times the parameters" in warning for warning in deeper.metrics["warnings"]) == ("lesa" in case)
    if case in KEEPS_LOGITS:
        assert deeper.metrics["check"]["logit_difference"] == 0.0

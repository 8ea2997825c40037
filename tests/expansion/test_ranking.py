"""Rankings of layers against whole forward passes of transformers' models; streaming, resumption, the chosen gaps."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.config import AnyExpand
from pipeline.expansion import ranking
from pipeline.expansion.layerwise import Blocks, LayerwiseModel
from pipeline.expansion.method import in_memory, method_of
from pipeline.expansion.ranking import Ranking, rank_layers, read_probe
from pipeline.models.families import shape_of
from pipeline.models.family_inference.decoder import decoder_of
from pipeline.models.forward import packed_mask
from tests.tiny_families import TINY_CONFIGS, save_tiny, tiny_model
from tests.training.small import write_blocks

CPU = torch.device("cpu")
ALL, NOTHING = 10**12, 0  # bytes of memory


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blocks(tmp_path_factory.mktemp("ranking"), blocks=6)


def _rank(position: str, base: Path, probe: Blocks, out: Path, memory: int = ALL) -> Ranking:
    out.mkdir(exist_ok=True)
    return rank_layers(position, base, probe, CPU, memory, out, in_memory)


# ------------------------------------------------------------------------------------ naive measures


@torch.inference_mode()
def _losses(model: PreTrainedModel, probe: Blocks) -> Tensor:
    found = []
    for ids, positions, targets in zip(probe.ids, probe.positions, probe.targets, strict=True):
        mask = packed_mask(model, positions[None])  # compared with documents alone below
        logits = model(ids[None], mask, position_ids=positions[None], use_cache=False).logits[0].double()
        log = logits.log_softmax(-1)
        found += [-log[t - 1, ids[t]] for t in range(1, len(ids)) if targets[t]]
    return torch.stack(found)


@contextmanager
def _hook(layer: nn.Module, change: Callable[[Any, Any], Any]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        tensor = output if isinstance(output, Tensor) else output[0]
        changed = change(given, tensor)
        return None if changed is None else changed if isinstance(output, Tensor) else (changed, *output[1:])

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    yield
    handle.remove()


def _naive_increases(model: PreTrainedModel, probe: Blocks) -> list[float]:
    base, increases = _losses(model, probe), []
    for layer in decoder_of(model).layers:
        with _hook(layer, lambda given, output: given):
            increases.append(float((_losses(model, probe) - base).mean()))
    return increases


def _naive_angles(model: PreTrainedModel, probe: Blocks) -> list[float]:
    layers = decoder_of(model).layers
    pairs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    with ExitStack() as hooks:
        for layer, seen in zip(layers, pairs, strict=True):
            hooks.enter_context(_hook(layer, lambda given, output, seen=seen: seen.append((given[0], output[0]))))
        _losses(model, probe)
    angles = []
    for seen in pairs:
        of_layer = []
        for (given, output), targets in zip(seen, probe.targets, strict=True):
            for x, y, wanted in zip(given.double(), output.double(), targets, strict=True):
                if wanted:
                    of_layer.append(math.acos(min(1.0, float(x @ y / (x.norm() * y.norm())))) / math.pi)
        angles.append(sum(of_layer) / len(of_layer))
    return angles


NAIVE = {"least_important": _naive_increases, "most_similar": _naive_angles}


# -------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_rankings_are_those_of_whole_forward_passes(
    family: str, blocks: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Windows, caps, scaled embeddings and logits, parallel blocks and experts are the family's own."""
    base, probe = save_tiny(family, tmp_path / "base", tiny_tokenizer), read_probe(blocks, 64)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for position, naive in NAIVE.items():
        found = _rank(position, base, probe, tmp_path / position)
        assert list(found.values) == pytest.approx(naive(model, probe), abs=2e-5)
        assert found.tokens == int(probe.targets.sum())
        if position == "least_important":
            assert found.loss == pytest.approx(float(_losses(model, probe).mean()), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_a_streamed_model_gives_the_same_ranking(
    family: str, blocks: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any time at most one layer has weights."""
    base, probe = save_tiny(family, tmp_path / "base", tiny_tokenizer), read_probe(blocks, 64)
    most = 0
    run = LayerwiseModel.layer

    @contextmanager
    def counted(self: LayerwiseModel, index: int) -> Any:
        nonlocal most
        with run(self, index) as function:
            loaded = [layer for layer in self._layers if any(not p.is_meta for p in layer.parameters())]
            most = max(most, len(loaded))
            yield function

    for position in NAIVE:
        whole = _rank(position, base, probe, tmp_path / f"{position} whole")
        with monkeypatch.context() as patch:
            patch.setattr(LayerwiseModel, "layer", counted)
            streamed = _rank(position, base, probe, tmp_path / f"{position} streamed", NOTHING)
        assert streamed == whole
    assert most == 1


@pytest.mark.parametrize("layers", [1, 3])
def test_an_interrupted_ranking_resumes_after_the_saved_layers(
    layers: int, blocks: Path, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = read_probe(blocks, 64)
    whole = _rank("least_important", tiny_llama_dir, probe, tmp_path / "whole")
    run, ran = LayerwiseModel.layer, list[int]()

    def interrupted(self: LayerwiseModel, index: int) -> Any:
        ran.append(index)
        if len(ran) == layers + 1:
            raise KeyboardInterrupt
        return run(self, index)

    monkeypatch.setattr(ranking, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(LayerwiseModel, "layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _rank("least_important", tiny_llama_dir, probe, tmp_path / "out")
    assert _rank("least_important", tiny_llama_dir, probe, tmp_path / "out") == whole
    assert ran == [*range(layers + 1), *range(layers, 4)]
    monkeypatch.setattr(LayerwiseModel, "__init__", None)  # a finished ranking is not made again
    assert _rank("least_important", tiny_llama_dir, probe, tmp_path / "out") == whole
    ranking.remove_ranking_records(tmp_path / "out")
    assert not [*(tmp_path / "out").iterdir()]


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_documents_of_a_block_do_not_attend_to_each_other(family: str, tmp_path: Path) -> None:
    """Given only positions that restart, gpt_oss would let them."""
    model = tiny_model(family).float().eval()
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 60, (1, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(11), torch.arange(13)])[None]
    layerwise = LayerwiseModel(tmp_path, Blocks(ids, positions, positions > 0), CPU, True, str(tmp_path))
    states = layerwise.inputs()
    for index in range(layerwise.num_layers):
        with layerwise.layer(index) as run:
            states = run(0, states[0])[None]
    alone = []
    for document in (ids[:, :11], ids[:, 11:]):
        with torch.no_grad():
            logits = model(document, use_cache=False).logits[0, :-1]
        alone.append(torch.nn.functional.cross_entropy(logits, document[0, 1:], reduction="none"))
    torch.testing.assert_close(layerwise.losses(states), torch.cat(alone), rtol=0, atol=1e-4)


def test_the_probe_is_training_text_spread_over_all_blocks(blocks: Path) -> None:
    stored = np.load(blocks / "train.input_ids.npy")
    assert read_probe(blocks, 64).ids.tolist() == stored[[0, 5]].tolist()
    assert read_probe(blocks, 100).ids.tolist() == stored[[0, 2, 5]].tolist()
    assert read_probe(blocks, 10).ids.tolist() == stored[:1, :10].tolist()
    assert read_probe(blocks, 10**6).ids.tolist() == stored.tolist()


def test_new_layers_go_after_the_layers_with_the_smallest_values() -> None:
    ranking = Ranking("least_important", "", (0.5, 0.1, 0.3, 0.2, 0.9), (0.0,) * 5, 1, 1.0)
    assert ranking.gaps(2, range(5)) == [1, 3]
    assert ranking.gaps(7, range(5)) == [0, 1, 1, 2, 3, 3, 4]
    assert ranking.gaps(2, [0, 2, 4]) == [0, 2]


def test_only_gaps_between_like_layers_are_possible_for_methods_that_mix_them(
    expand_settings: Callable[..., AnyExpand],
) -> None:
    config = {"model_type": "qwen2_moe", "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
              "shared_expert_intermediate_size": 20, "vocab_size": 384, "hidden_size": 16, "intermediate_size": 24,
              "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_only_layers": [1]}  # fmt: skip
    shape = shape_of(config)
    for method, possible in (("average", [2, 3]), ("copy", [0, 1, 2, 3])):
        settings = method_of(expand_settings(method, position="least_important"))
        settings.check_layers(shape)
        assert settings.possible_gaps(shape) == possible

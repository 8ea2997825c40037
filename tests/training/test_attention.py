"""Attention by document equals attention with a dense mask, in values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig

from pipeline.errors import UserError
from pipeline.training.attention import DOCUMENTS, attend_by_document, document_bounds, resolve_attention
from pipeline.training.loss import SummedLoss, loss_and_gradient
from tests.tiny_families import TINY_CONFIGS, tiny_model
from tests.training.small import train_settings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BATCH, LENGTH, HEADS, GROUPS, SIZE = 3, 24, 6, 2, 8
# The document lengths of three blocks. Some documents have a single token.
BLOCKS = [[24], [9, 1, 13, 1], [1, 1, 22]]


def positions(blocks: list[list[int]], device: torch.device = CPU) -> torch.Tensor:
    rows = [torch.cat([torch.arange(length) for length in block]) for block in blocks]
    return torch.stack(rows).to(device)


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Computes masked attention over all pairs of tokens: [B, S, H, D]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    documents = (position_ids == 0).cumsum(1)
    seen = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def random_heads(dtype: torch.dtype, device: torch.device = CPU, size: int = SIZE) -> list[torch.Tensor]:
    """Returns query, key and value as layers pass them: views of [B, S, heads, size]."""
    torch.manual_seed(0)
    made = [torch.randn(BATCH, LENGTH, heads, size).to(device, dtype) for heads in (HEADS, GROUPS, GROUPS)]
    return [x.transpose(1, 2).requires_grad_() for x in made]


def results(function, heads: list[torch.Tensor]) -> list[torch.Tensor]:
    out = function(*heads)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), heads)]


@pytest.mark.parametrize("blocks", [BLOCKS, [[24]] * 3, [[12, 12]] * 3], ids=["ragged", "whole", "even"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "traced"])
def test_equals_a_dense_mask_in_float64(blocks: list[list[int]], compiled: bool):
    position_ids, heads = positions(blocks), random_heads(torch.float64)
    bounds = document_bounds(position_ids)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend_by_document(torch.nn.Module(), q, k, v, None, document_bounds=bounds)[0]

    function = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
    for mine, theirs in zip(results(function, heads), results(lambda *x: naive(*x, position_ids), heads), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_equals_a_dense_mask_on_a_gpu():
    position_ids, heads = positions(BLOCKS, CUDA), random_heads(torch.bfloat16, CUDA, size=64)
    bounds = document_bounds(position_ids)
    mine = results(lambda *x: attend_by_document(torch.nn.Module(), *x, None, document_bounds=bounds)[0], heads)
    wide = [x.detach().double().requires_grad_() for x in heads]
    for ours, theirs in zip(mine, results(lambda *x: naive(*x, position_ids), wide), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=3e-2, atol=3e-2)


def test_documents_begin_where_positions_restart():
    bounds = document_bounds(positions(BLOCKS))
    assert bounds.tolist() == [0, 24, 33, 34, 47, 48, 49, 50, 72] and bounds.dtype == torch.int32


def test_a_model_has_the_same_loss_and_gradients_as_with_a_mask(tiny_llama_dir):
    position_ids = positions(BLOCKS)
    ids = torch.randint(0, 384, position_ids.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for attention in (DOCUMENTS, "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float64, attn_implementation=attention)
        loss = SummedLoss(model)(ids, position_ids, position_ids > 0)
        found.append((loss, *torch.autograd.grad(loss, list(model.base_model.layers.parameters()))))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_every_family_has_the_same_loss_as_with_a_mask(family: str, monkeypatch: pytest.MonkeyPatch):
    """Tests what ``auto`` chooses for blocks that no sliding window is shorter than."""
    if "sliding_window" in TINY_CONFIGS[family]:
        monkeypatch.setitem(TINY_CONFIGS[family], "sliding_window", LENGTH)
    if family == "stablelm":  # a quarter of such a small head is a single number, which cannot be rotated
        monkeypatch.setitem(TINY_CONFIGS[family], "partial_rotary_factor", 0.5)
    model = tiny_model(family)
    position_ids = positions(BLOCKS)
    ids = torch.randint(3, 384, position_ids.shape, generator=torch.Generator().manual_seed(0))
    chosen = resolve_attention("pretrain", train_settings(sequence_length=LENGTH), model.config, "float32", CPU)
    assert (chosen == "eager") == (family in ("gemma2", "gpt_oss")) and chosen != "sdpa"
    losses = []
    for attention in (chosen, "eager"):
        model.set_attn_implementation(attention)
        losses.append(SummedLoss(model)(ids, position_ids, position_ids > 0))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0.0)


def test_no_mask_over_pairs_of_tokens_is_created(tiny_llama_dir, monkeypatch: pytest.MonkeyPatch):
    """No tensor saved for the backward pass grows with the square of the block's length."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32, attn_implementation=DOCUMENTS)
    saved: list[torch.Size] = []
    position_ids = positions([[200, 56]])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        SummedLoss(model)(torch.zeros_like(position_ids), position_ids, position_ids > 0)
    assert saved and not [shape for shape in saved if list(shape).count(256) > 1]


def test_layers_are_not_recompiled_for_every_number_of_documents(tiny_llama_dir, monkeypatch: pytest.MonkeyPatch):
    """The number of documents differs by batch. Recompiling for each would soon reach the recompile limit."""
    torch._dynamo.reset()
    monkeypatch.setattr("pipeline.training.loss.compiled_chunk_loss", lambda: loss_and_gradient)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, attn_implementation=DOCUMENTS)
    compilations = CompileCounter()
    for layer in model.base_model.layers:
        layer.compile(dynamic=False, backend=compilations)
    summed, counts = SummedLoss(model, compiled=True), []
    for documents in range(1, 24):
        position_ids = positions([[*(documents - 1) * [1], 25 - documents]])
        summed(torch.zeros_like(position_ids), position_ids, position_ids > 0).backward()
        counts.append(compilations.frame_count)
    torch._dynamo.reset()
    assert 0 < counts[0] == counts[-1]


# -------------------------------------------------------------------------------------- resolution


def test_auto_attends_by_document_on_cpus_and_gpus_can_opt_in():
    config = LlamaConfig()
    auto = train_settings(attention="auto")
    assert resolve_attention("pretrain", auto, config, "float32", CPU) == DOCUMENTS
    assert resolve_attention("pretrain", auto, config, "bfloat16", CUDA) == "sdpa"
    asked = train_settings(attention=DOCUMENTS)
    assert resolve_attention("pretrain", asked, config, "bfloat16", CUDA) == DOCUMENTS
    assert resolve_attention("pretrain", auto, config, "float32", CUDA) == "sdpa"
    assert resolve_attention("pretrain", train_settings(attention="sdpa"), config, "float32", CPU) == "sdpa"


def test_a_sliding_window_shorter_than_the_block_requires_a_mask():
    capped = Gemma2Config()
    assert resolve_attention("pretrain", train_settings(), capped, "float32", CPU) == "eager"
    short, long = MistralConfig(sliding_window=16), MistralConfig(sliding_window=64)
    assert resolve_attention("pretrain", train_settings(), short, "float32", CPU) == "sdpa"
    assert resolve_attention("pretrain", train_settings(), long, "float32", CPU) == DOCUMENTS
    with pytest.raises(UserError, match=r"pretrain.attention.*sliding window is 16 tokens"):
        resolve_attention("pretrain", train_settings(attention=DOCUMENTS), short, "float32", CPU)

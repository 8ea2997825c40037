"""Attention by document equals attention with a dense mask, in values and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
)

from pipeline.errors import UserError
from pipeline.models.families import FAMILIES
from pipeline.training.attention import (
    DOCUMENTS,
    FLEX,
    _on_gpu,
    attend_by_document,
    avoid_cudnn_attention,
    block_masks,
    document_bounds,
    resolve_attention,
)
from pipeline.training.attention_support import obstacle_to_documents
from pipeline.training.batches import TokenIndices
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


def loss_of(model: SummedLoss, ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Computes the loss of all tokens but the first of each document."""
    return model(ids, position_ids, TokenIndices.of(ids, position_ids, position_ids > 0))


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
        loss = loss_of(SummedLoss(model), ids, position_ids)
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
        losses.append(loss_of(SummedLoss(model), ids, position_ids))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0.0)


def test_no_mask_over_pairs_of_tokens_is_created(tiny_llama_dir, monkeypatch: pytest.MonkeyPatch):
    """No tensor saved for the backward pass grows with the square of the block's length."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32, attn_implementation=DOCUMENTS)
    saved: list[torch.Size] = []
    position_ids = positions([[200, 56]])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        loss_of(SummedLoss(model), torch.zeros_like(position_ids), position_ids)
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
        loss_of(summed, torch.zeros_like(position_ids), position_ids).backward()
        counts.append(compilations.frame_count)
    torch._dynamo.reset()
    assert 0 < counts[0] == counts[-1]


def test_grouped_heads_are_repeated_only_where_torch_cannot_share_them(monkeypatch: pytest.MonkeyPatch):
    """``varlen_attn`` has no ``enable_gqa`` in torch 2.11."""
    heads = random_heads(torch.float64)
    bounds = document_bounds(positions(BLOCKS))
    called: list[tuple[int, ...]] = []

    def old(q, k, v, bounds_q, bounds_k, longest_q, longest_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        assert window_size == (-1, 0) and longest_q == longest_k == LENGTH and bounds_q is bounds_k
        called.append((q.shape[1], k.shape[1]))
        rows = [x.view(BATCH, LENGTH, -1, SIZE).transpose(1, 2) for x in (q, k, v)]
        return naive(*rows, positions(BLOCKS)).flatten(0, 1)

    def new(*tensors, enable_gqa=False, **others):
        assert enable_gqa
        return old(*tensors, **others)

    expected = naive(*heads, positions(BLOCKS))
    for kernel in (old, new):
        monkeypatch.setattr("pipeline.training.attention.varlen_attn", kernel)
        monkeypatch.setattr("pipeline.training.attention.VARLEN_SHARES_KEYS", kernel is new)
        torch.testing.assert_close(_on_gpu(*heads, bounds, SIZE**-0.5), expected)
    assert called == [(HEADS, HEADS), (HEADS, GROUPS)]


# -------------------------------------------------------------------------------------------- flex


def blocks_of(length: int) -> list[list[int]]:
    """Returns document lengths of three blocks: one document, many short ones, and long ones beside single tokens."""
    short = [7] * (length // 7) + [length % 7] * bool(length % 7)
    return [[length], short, [1, length // 2, 1, length - length // 2 - 2]]


@pytest.mark.parametrize("length", [96, 128, 300, 640])
@pytest.mark.parametrize("window", [None, 1, 50, 130, 1000])
def test_masks_of_blocks_equal_those_that_torch_finds_in_a_dense_mask(length: int, window: int | None):
    position_ids = positions(blocks_of(length))
    documents = (position_ids == 0).cumsum(1)

    def is_visible(b, h, q, k):
        return (documents[b, q] == documents[b, k]) & (q >= k) & (q - k < (window or length))

    expected = create_block_mask(is_visible, 3, None, length, length, device="cpu")
    found = block_masks(position_ids, {window})[window]
    assert found.shape == expected.shape
    for side in ("kv", "q"):
        for kind in ("", "full_"):
            numbers, lists = f"{kind}{side}_num_blocks", f"{kind}{side}_indices"
            assert torch.equal(getattr(found, numbers), getattr(expected, numbers))
            for mine, theirs in zip(listed(found, numbers, lists), listed(expected, numbers, lists), strict=True):
                assert mine == theirs
    every = torch.meshgrid(*(torch.arange(size) for size in (3, length, length)), indexing="ij")
    assert torch.equal(found.mask_mod(every[0], 0, *every[1:]), is_visible(every[0], 0, *every[1:]))


def listed(mask: BlockMask, numbers: str, lists: str) -> Iterator[list[int]]:
    """Yields the numbers of the blocks that every block sees, without the unused ends of the lists."""
    for count, numbered in zip(getattr(mask, numbers).flatten(), getattr(mask, lists).flatten(0, 2), strict=True):
        yield numbered[:count].tolist()


@pytest.fixture
def cpu_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets flex_attention differentiate its reference implementation on CPUs, which it refuses to do by default."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


NOT_PLAIN = [name for name, config in TINY_CONFIGS.items() if "sliding_window" in config]  # with caps or sinks too


@pytest.mark.parametrize("family", NOT_PLAIN)
def test_flex_attention_has_the_losses_and_gradients_of_eager_attention(family: str, cpu_backward: None):
    """Windows of 8 tokens, capped scores and sinks, in documents of up to 150 tokens, which are two blocks of keys.

    Eager attention gets one document at a time.
    """
    model = tiny_model(family, max_position_embeddings=256)
    blocks = [[150], [100, 1, 49]]
    position_ids = positions(blocks)
    ids = torch.randint(3, 384, position_ids.shape, generator=torch.Generator().manual_seed(0))
    documents = [document for row, lengths in zip(ids, blocks, strict=True) for document in row.split(lengths)]
    attention = [p for name, p in model.named_parameters() if "attn" in name and p.requires_grad]

    def alone(document: torch.Tensor) -> torch.Tensor:
        places = torch.arange(len(document))[None]
        return loss_of(SummedLoss(model), document[None], places)

    found = []
    for implementation in (FLEX, "eager"):
        model.set_attn_implementation(implementation)
        packed = implementation == FLEX
        loss = loss_of(SummedLoss(model), ids, position_ids) if packed else sum(map(alone, documents))
        found.append((loss, *torch.autograd.grad(loss, attention)))
    assert len(attention) >= 2 * 4
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0.0)
    for mine, theirs in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_masked_attention_has_the_losses_of_documents_on_their_own(family: str):
    """Whether or not the model would separate packed documents by itself: gpt_oss does not."""
    model, lengths = tiny_model(family), [20, 1, 19]
    ids = torch.randint(3, 384, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    for implementation in ("sdpa", "eager") if model._supports_sdpa else ("eager",):
        model.set_attn_implementation(implementation)
        packed = loss_of(SummedLoss(model), ids, positions([lengths]))
        alone = [loss_of(SummedLoss(model), d, torch.arange(d.shape[1])[None]) for d in ids.split(lengths, dim=1)]
        torch.testing.assert_close(packed, sum(alone), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_compiled_layers_with_flex_attention_are_not_recompiled_for_other_documents(
    family: str, cpu_backward: None, monkeypatch: pytest.MonkeyPatch
):
    torch._dynamo.reset()
    monkeypatch.setattr("pipeline.training.loss.compiled_chunk_loss", lambda: loss_and_gradient)
    model = tiny_model(family, max_position_embeddings=256)
    model.set_attn_implementation(FLEX)
    layouts = [positions(blocks) for blocks in ([[150], [100, 1, 49]], [[50, 100], [149, 1]], [[30] * 5, [10] * 15])]
    ids = torch.randint(3, 384, (2, 150), generator=torch.Generator().manual_seed(0))
    expected = [loss_of(SummedLoss(model), ids, layout).item() for layout in layouts]
    compilations = CompileCounter()
    for layer in model.base_model.layers:
        layer.compile(dynamic=False, backend=compilations)
    summed, counts = SummedLoss(model, compiled=True), []
    for layout, value in zip(layouts, expected, strict=True):
        loss = loss_of(summed, ids, layout)
        loss.backward()
        assert loss.item() == pytest.approx(value, rel=1e-6)
        counts.append(compilations.frame_count)
    torch._dynamo.reset()
    assert 0 < counts[0] == counts[-1] <= 2  # with and without a window


def test_the_families_with_windows_include_those_with_caps_and_sinks():
    assert {"gemma2", "gemma3_text", "gpt_oss", "mistral"} <= set(NOT_PLAIN)


# -------------------------------------------------------------------------------------- resolution


def test_auto_needs_no_mask_on_cpus_and_gpus():
    config = LlamaConfig()
    auto = train_settings(attention="auto")
    assert resolve_attention("pretrain", auto, config, "float32", CPU) == DOCUMENTS
    assert resolve_attention("pretrain", auto, config, "bfloat16", CUDA) == DOCUMENTS
    assert resolve_attention("pretrain", auto, config, "float32", CUDA) == FLEX
    large_heads = LlamaConfig(head_dim=512)
    assert resolve_attention("pretrain", auto, large_heads, "bfloat16", CUDA) == FLEX
    assert resolve_attention("pretrain", train_settings(attention="sdpa"), config, "float32", CPU) == "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
def test_without_torch_the_obstacles_are_those_that_transformers_knows(family: str):
    """A config.json leaves out the entries that equal the class's defaults."""
    config = AutoConfig.for_model(family)
    long, short = (obstacle_to_documents({"model_type": family}, length) for length in (2**20, 1))
    assert long == obstacle_to_documents(config.to_dict(), 2**20)
    has_window = (getattr(config, "sliding_window", None) or 0) > 1
    assert (long is not None) == (has_window or short is not None)
    assert (short is None) == MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_auto_never_builds_a_mask_on_gpus(family: str):
    config = tiny_model(family).config
    chosen = resolve_attention("pretrain", train_settings(), config, "bfloat16", CUDA)
    has_window = config.model_type in NOT_PLAIN
    assert chosen == (FLEX if has_window else DOCUMENTS)


def test_a_mask_on_a_gpu_is_announced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("CC", "no-such-compiler")
    windows = MistralConfig(sliding_window=16)
    assert resolve_attention("pretrain", train_settings(), windows, "bfloat16", CUDA) == "sdpa"
    (line,) = capsys.readouterr().out.splitlines()
    assert "compares all pairs of tokens" in line and "no-such-compiler was not found" in line
    assert resolve_attention("pretrain", train_settings(), Gemma2Config(), "bfloat16", CUDA) == "eager"


def test_cudnn_computes_no_attention_with_a_mask(monkeypatch: pytest.MonkeyPatch):
    """Its gradients may be NaN (pytorch#196678)."""
    switched: list[bool] = []
    monkeypatch.setattr("torch.backends.cuda.enable_cudnn_sdp", switched.append)
    for attention, device in ((DOCUMENTS, CUDA), (FLEX, CUDA), ("eager", CUDA), ("sdpa", CPU)):
        avoid_cudnn_attention(attention, device)
    assert not switched
    avoid_cudnn_attention("sdpa", CUDA)
    assert switched == [False]


def test_flex_attention_is_refused_where_it_has_no_backward_pass():
    with pytest.raises(UserError, match=r"pretrain.attention = flex.*no backward pass.*attention=sdpa"):
        resolve_attention("pretrain", train_settings(attention=FLEX), LlamaConfig(), "float32", CPU)


@pytest.mark.parametrize("family", ["granite", "starcoder2"])
def test_dropout_of_attention_weights_requires_a_mask(family: str):
    """Granite 3.0 and StarCoder2 were published with attention_dropout=0.1."""
    config = tiny_model(family).config
    config.attention_dropout = 0.1
    assert [resolve_attention("pretrain", train_settings(), config, "bfloat16", device) for device in (CPU, CUDA)] == [
        "sdpa", "sdpa",
    ]  # fmt: skip
    for attention in (DOCUMENTS, FLEX):
        with pytest.raises(UserError, match=r"attention_dropout is 0\.1.*attention=sdpa"):
            resolve_attention("pretrain", train_settings(attention=attention), config, "bfloat16", CUDA)


def test_a_model_with_dropout_of_attention_weights_trains():
    config = tiny_model("granite").config
    config.attention_dropout = 0.5
    attention = resolve_attention("pretrain", train_settings(), config, "float32", CPU)
    torch.manual_seed(0)
    model = SummedLoss(AutoModelForCausalLM.from_config(config, attn_implementation=attention))
    ids, position_ids = torch.randint(0, config.vocab_size, (1, LENGTH)), positions([[9, 15]])
    losses = {loss_of(model.train(), ids, position_ids).item() for _ in range(2)}
    assert len(losses) == 2
    loss_of(model, ids, position_ids).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert len({loss_of(model.eval(), ids, position_ids).item() for _ in range(2)}) == 1


def test_a_sliding_window_shorter_than_the_block_requires_a_mask():
    capped = Gemma2Config()
    assert resolve_attention("pretrain", train_settings(), capped, "float32", CPU) == "eager"
    short, long = MistralConfig(sliding_window=16), MistralConfig(sliding_window=64)
    assert resolve_attention("pretrain", train_settings(), short, "float32", CPU) == "sdpa"
    assert resolve_attention("pretrain", train_settings(), long, "float32", CPU) == DOCUMENTS
    with pytest.raises(UserError, match=r"pretrain.attention.*sliding window is 16 tokens"):
        resolve_attention("pretrain", train_settings(attention=DOCUMENTS), short, "float32", CPU)

from pathlib import Path
from weakref import finalize

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pipeline.models.families import shape_of
from pipeline.training.attention import DOCUMENTS
from pipeline.training.batches import TokenIndices
from pipeline.training.loss import (
    ChunkLoss,
    LogitTransform,
    SummedLoss,
    chunked_cross_entropy,
    compiled_chunk_loss,
    loss_and_gradient,
)
from pipeline.training.precision import chunk_rows
from pipeline.training.selection import select_parameters
from tests.tiny_families import tiny_model
from tests.training.naive_loop import naive_loss

N, H, V = 37, 12, 51


def plain(x_NH, w_VH, targets_N, transform: LogitTransform, b_V=None):
    """The textbook computation: all logits at once, differentiated by torch."""
    logits = (x_NH @ w_VH.T + (0 if b_V is None else b_V)) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return cross_entropy(logits, targets_N, reduction="sum")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.loss.chunk_rows", lambda device, vocabulary, is_capped: 5)


@pytest.mark.parametrize(
    "transform", [LogitTransform(), LogitTransform(scale=0.25), LogitTransform(softcap=3.0), LogitTransform(2.0, 5.0)]
)
def test_chunked_equals_plain_in_float64(small_chunks: None, transform: LogitTransform):
    check_equals_plain(transform, loss_and_gradient)


def test_a_compiled_chunk_equals_plain_in_float64(small_chunks: None):
    check_equals_plain(LogitTransform(2.0, 5.0), compiled_chunk_loss())


def check_equals_plain(transform: LogitTransform, chunk_loss: ChunkLoss) -> None:
    def chunked(*arguments):
        return chunked_cross_entropy(*arguments, chunk_loss)

    torch.manual_seed(0)
    x, w = torch.randn(N, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    targets = torch.randint(0, V, (N,))
    results = []
    for function in (chunked, plain):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        value = function(*leaves, targets, transform)
        (value * 0.37).backward()
        results.append((value, leaves[0].grad, leaves[1].grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trained", ["xwb", "x", "b"])
def test_a_head_with_a_bias_equals_plain_in_float64(small_chunks: None, trained: str):
    torch.manual_seed(0)
    targets, transform, results = torch.randint(0, V, (N,)), LogitTransform(0.5, 4.0), []
    drawn = {"x": torch.randn(N, H).double(), "w": torch.randn(V, H).double(), "b": torch.randn(V).double()}
    for function in (chunked_cross_entropy, plain):
        x, w, b = (tensor.clone().requires_grad_(name in trained) for name, tensor in drawn.items())
        value = function(x, w, targets, transform, b_V=b)
        (value * 0.37).backward()
        results.append([value, *(leaf.grad for leaf in (x, w, b) if leaf.requires_grad)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_bias_of_a_models_head_is_used_and_trained():
    model = tiny_model("phi")
    ids, positions = torch.randint(0, 384, (2, 24)), torch.arange(24).expand(2, 24)
    losses = []
    for summed in (True, False):
        model.zero_grad()
        if summed:
            loss = SummedLoss(model)(ids, positions, TokenIndices.of(ids, positions, positions > 0)) / (2 * 23)
        else:
            loss = naive_loss(model, ids, positions, positions > 0)
        loss.backward()
        losses.append((loss.detach(), model.lm_head.bias.grad.clone(), model.model.embed_tokens.weight.grad.clone()))
    for ours, theirs in zip(*losses, strict=True):
        assert theirs.abs().max() > 0 and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    chosen = select_parameters("pretrain", "head", shape_of(model.config.to_dict()), {})
    assert chosen == {"lm_head.weight", "lm_head.bias"}
    assert not any(name.startswith("lm_head") for name in shape_of(model.config.to_dict()).norms)


def test_a_frozen_head_gets_no_gradient_and_float32_is_accurate(small_chunks: None):
    torch.manual_seed(0)
    x, w, targets = torch.randn(N, H, requires_grad=True), torch.randn(V, H), torch.randint(0, V, (N,))
    chunked_cross_entropy(x, w, targets).backward()
    expected = torch.autograd.grad(plain(x, w, targets, LogitTransform()), x)[0]
    assert w.grad is None and torch.allclose(x.grad, expected, atol=1e-5)


def test_without_supervised_tokens_loss_and_gradient_are_zero():
    x = torch.randn(0, H, requires_grad=True)
    value = chunked_cross_entropy(x, torch.randn(V, H), torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert value == 0 and x.grad.shape == (0, H)


def test_logits_are_computed_in_chunks(small_chunks: None, monkeypatch: pytest.MonkeyPatch):
    rows = []

    def spy(x, w, b):
        rows.append(x.shape[0])
        return x @ w.T

    monkeypatch.setattr("pipeline.training.loss.linear", spy)
    chunked_cross_entropy(torch.randn(N, H, requires_grad=True), torch.randn(V, H), torch.zeros(N, dtype=torch.int64))
    assert sum(rows) == N and max(rows) <= 5


def test_chunks_on_gpus_are_whole_tiles_large_enough_to_hide_the_reading_of_the_head():
    assert chunk_rows("cpu", 128_256) == 130 and chunk_rows("cpu", 2**30) == 1
    assert chunk_rows("cuda", 128_256) == 2048 and chunk_rows("cuda", 128_256, is_capped=True) == 1024
    assert chunk_rows("cuda", 2**30) == 128


def test_the_gradient_of_the_head_is_scaled_in_place_without_a_copy():
    x, w = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    saved: list[int] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        loss = chunked_cross_entropy(x, w, torch.zeros(N, dtype=torch.int64))
    gradients = torch.autograd.grad(loss * 0.5, (x, w))
    assert {gradient.data_ptr() for gradient in gradients} == set(saved)


# -------------------------------------------------------------------------- in the complete model


@pytest.fixture(scope="module")
def tiny_llama(tiny_llama_dir: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float64, attn_implementation="sdpa")


def test_equals_the_loss_of_transformers(tiny_llama: nn.Module):
    ids = torch.randint(0, 384, (2, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(24).expand(2, 24)
    mask = positions > 0
    ours = SummedLoss(tiny_llama)(ids, positions, TokenIndices.of(ids, positions, mask))
    theirs = tiny_llama(input_ids=ids, labels=ids).loss * mask.sum()
    # transformers computes the cross entropy in float32 for any dtype of the model
    assert torch.allclose(ours, theirs.double(), rtol=1e-6)


def test_documents_in_one_block_do_not_see_each_other(tiny_llama: nn.Module):
    """The loss of a packed block is the sum of its documents' losses, and likewise for gradients."""
    random = torch.Generator().manual_seed(1)
    documents = [torch.randint(0, 384, (length,), generator=random) for length in (9, 5, 1, 17)]
    weight = tiny_llama.base_model.layers[1].mlp.up_proj.weight
    model = SummedLoss(tiny_llama)

    def alone(ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(len(ids))[None]
        return model(ids[None], positions, TokenIndices.of(ids[None], positions, positions > 0))

    packed = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(ids)) for ids in documents])[None]
    ids, both = packed.expand(2, -1), positions.expand(2, -1)
    together = model(ids, both, TokenIndices.of(ids, both, both > 0))
    apart = 2 * sum(alone(ids) for ids in documents)
    assert torch.allclose(together, apart, rtol=1e-10)
    gradients = [torch.autograd.grad(value, weight)[0] for value in (together, apart)]
    assert torch.allclose(*gradients, rtol=1e-8, atol=1e-12)


def test_only_tokens_in_the_loss_mask_are_targets(tiny_llama: nn.Module):
    ids = torch.randint(0, 384, (1, 12), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(12)[None]
    model = SummedLoss(tiny_llama)
    single = [model(ids, positions, TokenIndices.of(ids, positions, positions == place)) for place in range(1, 12)]
    together = model(ids, positions, TokenIndices.of(ids, positions, positions > 0))
    assert torch.allclose(sum(single), together, rtol=1e-12)


def test_the_loss_by_sequence_is_that_of_each_sequence_alone(small_chunks: None, tiny_llama: nn.Module):
    random = torch.Generator().manual_seed(3)
    ids, positions = torch.randint(0, 384, (3, 12), generator=random), torch.arange(12).expand(3, 12)
    mask = (positions > 0) & (torch.rand(3, 12, generator=random) < 0.5)
    mask[1] = False
    model = SummedLoss(tiny_llama)
    found = model(ids, positions, TokenIndices.of(ids, positions, mask), by_sequence=True)
    rows = [slice(row, row + 1) for row in range(3)]
    alone = [model(ids[row], positions[row], TokenIndices.of(ids[row], positions[row], mask[row])) for row in rows]
    assert found.dtype == torch.float64 and not found.requires_grad and found[1] == 0
    assert torch.allclose(found, torch.stack(alone), rtol=1e-12)


# ----------------------------------------------------------------------- below the lowest trainable layer


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages that operations allocate, excluding the model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def partly_frozen(below: int, attention: str, trained: int = 1) -> SummedLoss:
    """Builds a model of ``below`` frozen layers, ``trained`` trainable layers and one frozen layer."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=below + trained + 1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention)
    model.requires_grad_(False)
    model.base_model.layers[below : below + trained].requires_grad_(True)
    return SummedLoss(model)


IDS, POSITIONS = torch.zeros(2, 32, dtype=torch.int64), torch.arange(32).repeat(2, 1)
INDICES = TokenIndices.of(IDS, POSITIONS, POSITIONS > 0)


def stored_bytes(model: SummedLoss) -> int:
    stored = []
    with saved_tensors_hooks(lambda tensor: stored.append(tensor.nbytes) or tensor, lambda tensor: tensor):
        model(IDS, POSITIONS, INDICES)
    return sum(stored)


def peak_bytes(model: SummedLoss) -> int:
    with LiveBytes(model) as memory:
        model(IDS, POSITIONS, INDICES).backward()
    return memory.peak


@pytest.mark.parametrize("attention", [DOCUMENTS, "sdpa"])
@pytest.mark.parametrize("measure", [stored_bytes, peak_bytes])
def test_frozen_layers_below_the_lowest_trainable_layer_need_no_activation_memory(measure, attention: str):
    few, many = (measure(partly_frozen(below, attention)) for below in (1, 9))
    assert few == many > 0
    assert measure(partly_frozen(1, attention, trained=4)) > few  # trainable layers do


def test_the_backward_pass_ends_at_the_lowest_trainable_layer():
    model = partly_frozen(below=3, attention=DOCUMENTS)
    layers = model.model.base_model.layers
    outputs: list[torch.Tensor] = []
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model(IDS, POSITIONS, INDICES).backward()
    assert [output.requires_grad for output in outputs] == [False, False, False, True, True]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        name for name, _ in model.named_parameters() if ".layers.3." in name
    ]

"""LESA as its authors implement it: all weights in memory, a full SVD, PyTorch's data loader and batches of 64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.method import LayerWeights, NewTensor, Workspace
from pipeline.expansion.methods.lesa import Lesa
from pipeline.expansion.surgery import TensorNames, write_weights


def publish_lesa(names: TensorNames, settings: Lesa, seed: int, device: torch.device, out: Path) -> None:
    """Writes the weights of a model whose new layers are copies of layer 0 with seven predicted matrices."""

    def method(layers: list[LayerWeights], plan: LayerPlan, work: Workspace) -> Iterator[NewTensor]:
        torch.manual_seed(seed)
        for tensor in layers[0]:
            if tensor.role.kind != "matrix":
                yield from (NewTensor(planned.layer, tensor, layers[0][tensor]) for planned in plan.new_layers)
                continue
            matrices = [layer[tensor].float() for layer in layers]
            for planned, matrix in zip(plan.new_layers, _predicted(matrices, plan, settings), strict=True):
                yield NewTensor(planned.layer, tensor, matrix)

    write_weights(names, method, device, out)


def _predicted(matrices: list[Tensor], plan: LayerPlan, settings: Lesa) -> list[Tensor]:
    """Predicts one matrix for each new layer. No gap may get more than one layer."""
    left, values, right = torch.linalg.svd(torch.cat(matrices, dim=1), full_matrices=False)
    blocks = list(right.split(matrices[0].shape[1], dim=1))
    inner = range(1, len(blocks) - 1)
    inputs = torch.cat([torch.cat([blocks[i - 1], blocks[i + 1]], dim=1) for i in inner])
    targets = torch.cat([blocks[i] for i in inner])
    predictor = _train(inputs, targets, settings)
    predicted = []
    with torch.no_grad():
        for planned in plan.new_layers:
            lower, upper = planned.base[0], planned.base[-1]
            predicted.append(left @ torch.diag(values) @ predictor(torch.cat([blocks[lower], blocks[upper]], dim=1)))
    return predicted


def _train(inputs: Tensor, targets: Tensor, settings: Lesa) -> nn.Module:
    hidden = settings.hidden_size
    predictor = nn.Sequential(
        nn.Linear(inputs.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
        nn.Linear(hidden, targets.shape[1]),
    ).to(inputs.device)  # fmt: skip
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=settings.learning_rate)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=settings.batch_size, shuffle=True)
    weight = settings.norm_loss_weight
    for _ in range(settings.epochs):
        for batch, target in loader:
            output = predictor(batch)
            loss = (1 - weight) * nn.functional.mse_loss(output, target)
            loss = loss + weight * nn.functional.mse_loss(output.norm(), target.norm())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return predictor

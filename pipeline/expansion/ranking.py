"""Ranks the layers of a base by how little they do on a probe text, to insert new layers after those that do least.

- ``least_important`` (ADEPT, arXiv 2510.10071, section 3.1): by how much the loss rises if the layer is bypassed. That
  takes a forward pass for every layer and one more. They share all layers below the bypassed one, so that half the
  work remains, and all go through one layer before the next is needed, so that weights are read once.
- ``most_similar`` (The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887, equation 7, for one layer
  and averaged over all tokens): by the angle between a layer's input and its output, divided by pi.

The probe text is a part of the training blocks; held-out text is never read.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.data.blocks import open_blocks
from pipeline.expansion.layerwise import Blocks, LayerwiseModel
from pipeline.expansion.method import Scratch
from pipeline.files import is_intact, read_record, seal, temporary_path, write_json
from pipeline.models.reading import ModelDirectory
from pipeline.progress import ProgressBar, progress

SAVE_SECONDS = 60.0  # how much an interruption can cost
RANKING_FILE = ".ranking.json"  # the result, for an expansion that is interrupted later
STATES_FILE = ".ranking.safetensors"  # hidden states of all forward passes after some layers
STATES_SEAL = ".ranking.sha256"
RANKING_WORK_PREFIX = ".ranking-"  # of temporary directories
MEASURES = {
    "least_important": "increase of the loss if the layer is bypassed, nats per token",
    "most_similar": "angle between the layer's input and output, divided by pi",
}


@dataclass(frozen=True)
class Ranking:
    """What was measured for every layer of the base.

    Attributes:
        position: the setting that asked for it.
        measure: the measure, in words.
        values: by layer. New layers go after the layers with the smallest.
        errors: standard errors over the tokens.
        tokens: the number of tokens that the measure is averaged over.
        loss: of the base on the probe text, in nats per token; None if it was not needed.
    """

    position: str
    measure: str
    values: tuple[float, ...]
    errors: tuple[float, ...]
    tokens: int
    loss: float | None

    def gaps(self, new_layers: int, possible: Collection[int]) -> list[int]:
        """Returns the gaps after the layers with the smallest values, in ascending order.

        Args:
            new_layers: the number of gaps. If there are fewer possible ones, all are used equally often, and then again
                those with the smallest values.
            possible: the gaps to choose from.
        """
        ranked = sorted(possible, key=lambda layer: (self.values[layer], layer))
        times, rest = divmod(new_layers, len(ranked))
        return sorted([*ranked * times, *ranked[:rest]])


def read_probe(directory: Path, tokens: int) -> Blocks:
    """Reads about as many tokens from the training blocks of a tokenize artifact, in blocks spread over all of them."""
    arrays = open_blocks(directory, "train")
    count, length = arrays["input_ids"].shape
    wanted = min(count, max(1, tokens // length))
    chosen = np.linspace(0, count - 1, wanted).round().astype(int) if wanted > 1 else np.zeros(1, int)
    ids, positions, mask = (torch.from_numpy(array[chosen, :tokens].astype(np.int64)) for array in arrays.values())
    return Blocks(ids, positions, mask.bool())


def rank_layers(
    position: str, base: Path, blocks: Blocks, device: torch.device, memory: int, out: Path, scratch: Scratch
) -> Ranking:
    """Measures every layer of a model on a probe text. Resumes what an interrupted attempt has saved in ``out``.

    Args:
        position: a key of ``MEASURES``.
        base: the model directory.
        blocks: the probe text.
        device: where layers are run.
        memory: bytes. A model that needs more in float32 is streamed from disk, layer by layer.
        out: where progress is saved.
        scratch: allocates the hidden states of all forward passes.

    Raises:
        UserError: the layers of this model cannot be run one at a time.
    """
    for stale in out.glob(f"{RANKING_WORK_PREFIX}*"):  # of an attempt that was killed
        shutil.rmtree(stale)
    if (saved := read_record(out / RANKING_FILE, lambda value: value["position"] == position)) is not None:
        return Ranking(**{**saved, "values": tuple(saved["values"]), "errors": tuple(saved["errors"])})
    size = sum(spec.numel for spec in ModelDirectory(base).specs.values()) * torch.float32.itemsize
    with TemporaryDirectory(prefix=RANKING_WORK_PREFIX, dir=out) as work_dir:
        model = LayerwiseModel(base, blocks, device, size <= memory, work_dir)
        if position == "least_important":
            ranking = _by_bypassing(position, model, scratch, out)
        else:
            ranking = _by_angle(position, model, blocks)
    write_json(out / RANKING_FILE, asdict(ranking))
    return ranking


def remove_ranking_records(out: Path) -> None:
    """Removes what is only kept to resume."""
    for file in (out / RANKING_FILE, out / STATES_SEAL, *out.glob(f"*{STATES_FILE}*")):
        file.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------- angles


def _by_angle(position: str, model: LayerwiseModel, blocks: Blocks) -> Ranking:
    states, angles = model.inputs(), []
    with progress("rank layers", total=model.num_layers) as bar:
        for index in range(model.num_layers):
            with model.layer(index) as run:
                outputs = torch.stack([run(block, states[block]) for block in range(len(states))])
            angles.append(_angles(states, outputs)[blocks.targets])
            states = outputs
            bar.advance(1, note=f"layer {index}", angle=float(angles[-1].mean()))
    return _ranking(position, angles, None)


def _angles(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Returns the angles between vectors in the last dimension, divided by pi."""
    cosine = torch.nn.functional.cosine_similarity(inputs.double(), outputs.double(), dim=-1)
    return cosine.clamp(-1, 1).acos() / torch.pi


def _ranking(position: str, measured: Sequence[Tensor], loss: float | None) -> Ranking:
    """Averages what was measured of every layer and token."""
    values = tuple(float(each.double().mean()) for each in measured)
    tokens = len(measured[0])
    errors = tuple(float(each.double().std()) / tokens**0.5 if tokens > 1 else 0.0 for each in measured)
    return Ranking(position, MEASURES[position], values, errors, tokens, loss)


# ---------------------------------------------------------------------------------------- bypassing


def _by_bypassing(position: str, model: LayerwiseModel, scratch: Scratch, out: Path) -> Ranking:
    depth = model.num_layers
    with progress("rank layers", total=depth * (depth + 3) / 2 + 1) as bar:
        states = _outputs_of_all_passes(model, scratch, out, bar)
        losses = []
        for outputs in states:
            losses.append(model.losses(outputs))
            bar.advance(1, note="losses", loss=float(losses[-1].mean()))
    base = losses.pop()
    return _ranking(position, [bypassed - base for bypassed in losses], float(base.double().mean()))


def _outputs_of_all_passes(model: LayerwiseModel, scratch: Scratch, out: Path, bar: ProgressBar) -> Tensor:
    """Runs the forward passes together, layer by layer.

    Returns:
        The outputs of the last layer ``[layers + 1, blocks, tokens, hidden]``: pass i bypasses layer i, and the last
        one none.
    """
    inputs, depth = model.inputs(), model.num_layers
    states = scratch((depth + 1, *inputs.shape), torch.device("cpu"))
    states[depth] = inputs
    begin, last_saved = _load(states, out), time.monotonic()
    bar.move_to(begin * (begin + 1) / 2)
    for index in range(begin, depth):
        states[index] = states[depth]  # the pass that bypasses this layer has been the unchanged one so far
        with model.layer(index) as run:
            for number in (*range(index), depth):
                for block in range(len(inputs)):
                    states[number, block] = run(block, states[number, block])
                bar.advance(1, note=f"layer {index}")
        if time.monotonic() - last_saved > SAVE_SECONDS:
            _save(states, index + 1, out)
            last_saved = time.monotonic()
    return states


def _save(states: Tensor, layers_done: int, out: Path) -> None:
    """Replaces the saved states by those after ``layers_done`` layers."""
    differing = states[[*range(layers_done), len(states) - 1]]
    temporary = temporary_path(out / STATES_FILE)
    save_file({"states": differing}, temporary)
    (out / STATES_SEAL).unlink(missing_ok=True)
    temporary.replace(out / STATES_FILE)
    seal(out / STATES_SEAL, [out / STATES_FILE])


def _load(states: Tensor, out: Path) -> int:
    """Fills in what an interrupted attempt has saved. Returns the number of layers that are done."""
    if not is_intact(out / STATES_SEAL):
        return 0
    saved = load_file(out / STATES_FILE)["states"]
    layers_done = len(saved) - 1
    states[:layers_done], states[-1] = saved[:-1], saved[-1]
    return layers_done

"""Resuming: the newest intact checkpoint, and whether it belongs to this run.

Rank 0 chooses the checkpoint and broadcasts its choice. If every rank chose for itself, a damaged file could make them
disagree. A checkpoint belongs to a model, data, settings and a seed. The number of ranks, the ZeRO stage and the
micro-batch may change between saving and resuming; losses then agree up to rounding.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from pipeline.artifacts.store import MANIFEST
from pipeline.config import Train
from pipeline.errors import UserError
from pipeline.files import read_json, sha256_file, sha256_text
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.process_group import wait_for_all
from pipeline.training.snapshots import is_damaged

NO_CHECKPOINT = -1  # the step that rank 0 broadcasts if there is no intact checkpoint


def newest_checkpoint(directory: Path, device: torch.device) -> tuple[Checkpoint | None, list[str]]:
    """Returns the newest intact checkpoint, and on rank 0 what is wrong with newer ones. Collective."""
    step, faults = torch.full((), NO_CHECKPOINT, dtype=torch.int64, device=device), list[str]()
    if distributed.get_rank() == 0 and (found := checkpoint.newest(directory, faults.append)) is not None:
        step.fill_(found.step)
    wait_for_all("choosing a checkpoint")
    distributed.broadcast(step, src=0)
    if step == NO_CHECKPOINT:
        restart = ["no intact checkpoint is left; training restarts from the beginning"] if faults else []
        return None, [*faults, *restart]
    return Checkpoint(directory / checkpoint.directory_name(int(step))), faults


def damaged_snapshots(directories: Sequence[Path], device: torch.device) -> list[Path]:
    """Returns those snapshots whose files differ from what was saved. Collective."""
    damaged = torch.zeros(len(directories), dtype=torch.uint8, device=device)
    if distributed.get_rank() == 0:  # they may be large, so only one rank hashes them
        damaged.copy_(torch.tensor([is_damaged(directory) for directory in directories], dtype=torch.uint8))
    wait_for_all("hashing snapshots")
    if directories:
        distributed.broadcast(damaged, src=0)
    return [directory for directory, flag in zip(directories, damaged.tolist(), strict=True) if flag]


def identity(
    model_dir: Path, data_dirs: Sequence[Path], settings: Train, seed: int, device: torch.device, read_weights: bool
) -> dict[str, Any]:
    """Returns what a checkpoint belongs to. Collective.

    Args:
        model_dir: the model to train.
        data_dirs: the token blocks to train on, and those to mix in.
        settings: the stage's settings.
        seed: the stage's seed.
        device: for the broadcast.
        read_weights: hash the model's weight files, including frozen weights, instead of trusting its manifest. This
            matters when resuming: the checkpoint holds only the trained weights.
    """
    hashes = torch.zeros(2, 32, dtype=torch.uint8, device=device)  # two SHA-256 digests of 32 bytes
    if distributed.get_rank() == 0:  # the model may be large, so only one rank hashes it
        model = content_hash(model_dir, "*.safetensors", trust_manifest=not read_weights)
        several = [content_hash(directory, "*.npy", trust_manifest=True) for directory in data_dirs]
        data = several[0] if len(several) == 1 else sha256_text("\n".join(several))
        hashes.copy_(torch.tensor([list(bytes.fromhex(digest)) for digest in (model, data)], dtype=torch.uint8))
    wait_for_all("hashing the model")
    distributed.broadcast(hashes, src=0)
    model, data = (bytes(row).hex() for row in hashes.tolist())
    return {"model": model, "data": data, "settings": settings.key_settings(), "seed": seed}


def content_hash(directory: Path, pattern: str, trust_manifest: bool) -> str:
    """Returns one hash over the matching files of a directory.

    Args:
        directory: an artifact or any other directory.
        pattern: a shell pattern for the names of files. Subdirectories are not searched.
        trust_manifest: use the hashes that an artifact's manifest records instead of reading the files.
    """
    manifest = directory / MANIFEST
    if trust_manifest and manifest.is_file():
        files = {name: entry["sha256"] for name, entry in read_json(manifest)["files"].items() if "/" not in name}
    else:
        files = {path.name: sha256_file(path) for path in directory.glob(pattern)}
    lines = [f"{name} {files[name]}" for name in sorted(files) if fnmatch.fnmatch(name, pattern)]
    return sha256_text("\n".join(lines))


def check_identity(found: Checkpoint, current: Mapping[str, Any], stage: str) -> None:
    """Refuses a checkpoint of another model, dataset, seed or other settings.

    Raises:
        UserError: something differs. The message lists the differences, with both values of each setting.
    """
    saved = found.content()["identity"]
    differing = [
        *(f"the {name}'s files" for name in ("model", "data") if saved[name] != current[name]),
        *_differences(saved["settings"], current["settings"], f"{stage}."),
        *([f"seed (checkpoint: {saved['seed']}, now: {current['seed']})"] if saved["seed"] != current["seed"] else []),
    ]
    if differing:
        raise UserError(
            setting="output_dir",
            value=found.path,
            rule=f"this checkpoint belongs to another run, which differs in {', '.join(differing)}",
            remedy=f"Undo the change, or restart the stage with force=[{stage}].",
        )


def rounding_note(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str | None:
    """Returns a note if sums will be computed in another order than before the interruption, and None otherwise."""
    changes = _differences(saved, current, "")
    if not changes:
        return None
    return (
        f"resuming with changed {', '.join(changes)}: the result will match an uninterrupted run's up to rounding, "
        "not bitwise"
    )


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str) -> list[str]:
    names = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    return [f"{prefix}{name} (checkpoint: {saved.get(name)}, now: {current.get(name)})" for name in names]

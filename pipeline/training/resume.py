"""Where training begins: with the model's own weights, or at the newest checkpoint that is whole and belongs here.

One rank looks and the others are told, or a damaged file could part them. A checkpoint belongs to a model, data,
settings and a seed; ranks, ZeRO stage and micro-batch may change, and then losses agree to rounding, not to the bit.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from pipeline.artifacts.store import MANIFEST
from pipeline.config import Train
from pipeline.errors import UserError
from pipeline.files import read_json, sha256_file
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Checkpoint

NONE = -1


def newest_checkpoint(directory: Path, device: torch.device) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, as the first rank finds it, and there what was wrong with others. Collective."""
    step, faults = torch.full((), NONE, dtype=torch.int64, device=device), list[str]()
    if distributed.get_rank() == 0 and (found := checkpoint.newest(directory, faults.append)) is not None:
        step.fill_(found.step)
    distributed.broadcast(step, src=0)
    if step == NONE:
        return None, [*faults, *(["no whole checkpoint is left; training starts anew"] if faults else [])]
    return Checkpoint(directory / checkpoint.directory_name(int(step))), faults


def identity(
    model_dir: Path, data_dir: Path, settings: Train, seed: int, device: torch.device, read_weights: bool
) -> dict[str, Any]:
    """What a checkpoint belongs to. Collective.

    Args:
        read_weights: hash the model's files themselves, frozen weights and all, rather than believe its manifest.
    """
    hashes = torch.zeros(2, 32, dtype=torch.uint8, device=device)
    if distributed.get_rank() == 0:
        model = content_hash(model_dir, "*.safetensors", believe_manifest=not read_weights)
        data = content_hash(data_dir, "*.npy", believe_manifest=True)
        hashes.copy_(torch.tensor([list(bytes.fromhex(digest)) for digest in (model, data)], dtype=torch.uint8))
    distributed.broadcast(hashes, src=0)
    model, data = (bytes(row).hex() for row in hashes.tolist())
    return {"model": model, "data": data, "settings": settings.key_settings(), "seed": seed}


def content_hash(directory: Path, pattern: str, believe_manifest: bool) -> str:
    """One hash over a directory's files of that name; an artifact's manifest knows theirs already."""
    manifest = directory / MANIFEST
    if believe_manifest and manifest.is_file():
        files = {name: entry["sha256"] for name, entry in read_json(manifest)["files"].items() if "/" not in name}
    else:
        files = {path.name: sha256_file(path) for path in directory.glob(pattern)}
    lines = [f"{name} {files[name]}" for name in sorted(files) if fnmatch.fnmatch(name, pattern)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_belongs(found: Checkpoint, mine: Mapping[str, Any], stage: str) -> None:
    """Refuses a checkpoint of another model, other data, other settings or another seed.

    Raises:
        UserError: it says what differs, and for settings from what to what.
    """
    theirs = found.content()["identity"]
    differing = [
        *(f"the {name}'s files" for name in ("model", "data") if theirs[name] != mine[name]),
        *_differing_settings(theirs["settings"], mine["settings"], f"{stage}."),
        *([f"seed ({theirs['seed']} there, {mine['seed']} here)"] if theirs["seed"] != mine["seed"] else []),
    ]
    if differing:
        raise UserError(
            setting="output_dir",
            value=found.path,
            rule=f"this checkpoint belongs to another run; what differs: {', '.join(differing)}",
            remedy=f"Undo the change, or start the stage anew with force=[{stage}].",
        )


def _differing_settings(theirs: Mapping[str, Any], mine: Mapping[str, Any], prefix: str) -> list[str]:
    names = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
    return [f"{prefix}{name} ({theirs.get(name)} there, {mine.get(name)} here)" for name in names]


def rounding_note(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> str | None:
    """One line where the same numbers will be summed in another order than before; None where they will not."""
    changes = _differing_settings(saved, mine, "")
    if not changes:
        return None
    return f"spread otherwise than before: {', '.join(changes)}; losses go on to rounding, not to the bit"

"""Seconds by stage, as the artifacts' manifests recorded them when they were built."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.comparison.run_artifacts import ROLES, RunArtifacts, roles

STAGES = tuple(dict.fromkeys(role.partition("/")[0] for role in ROLES))


def seconds_by_stage(run: RunArtifacts) -> dict[str, float]:
    """Stage -> seconds; a stage of several artifacts (tokenize, evaluate) is their sum. Absent stages are left out."""
    seconds: dict[str, float] = {}
    for role in roles([run]):
        manifest = run.manifest(role)
        if manifest is not None:
            stage = role.partition("/")[0]
            seconds[stage] = seconds.get(stage, 0.0) + manifest["seconds"]
    return seconds


def is_shared(runs: Sequence[RunArtifacts], stage: str) -> bool:
    """Whether all runs use the very same artifacts of that stage, so that its time was spent once."""
    keys = [
        [
            manifest["key"]
            for role in roles(runs)
            if role.partition("/")[0] == stage and (manifest := run.manifest(role))
        ]
        for run in runs
    ]
    return len(runs) > 1 and all(of_run == keys[0] for of_run in keys)

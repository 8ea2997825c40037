"""The real small model, made once a session by the load stage from the installed package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as the quickstart's load artifact: float32 safetensors with tokenizer and template."""
    from pipeline.config import Launch, Model, Tracking
    from pipeline.stage import StageTask, TrackingTarget
    from pipeline.stages import load

    directory = tmp_path_factory.mktemp("smollm2")
    model = yaml.safe_load((CONF / "model" / "smollm2.yaml").read_text())
    load.run(
        StageTask(
            name="load",
            settings=Model.model_validate_json(json.dumps(model)),
            parents={},
            out=directory,
            seed=0,
            launch=Launch(device="cpu", processes=1, threads="auto", nodes=1, utilization=0.4),
            tracking=TrackingTarget(
                Tracking(wandb="disabled", project="test", entity=None), "test", "load", "test", directory / "wandb"
            ),
        )
    )
    return directory

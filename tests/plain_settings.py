"""Settings shared by tests that do not depend on their values."""

from __future__ import annotations

from typing import Literal

from pipeline.config import Launch, Model, Tracking

NO_TRACKING = Tracking(backend="none", log_model=False, notify=None, wandb="disabled", project="tests", entity=None)


def cpu_launch(processes: int = 1, threads: int | Literal["auto"] = 1) -> Launch:
    """Returns launch settings for this machine's CPU."""
    return Launch(
        device="cpu", processes=processes, threads=threads, nodes=1, collective_timeout_seconds=900,
        wait_policy="passive", utilization=0.4,
    )  # fmt: skip


def model_at(path: object, **changes: object) -> Model:
    """Returns model settings for a directory or a name on the Hub, in float32."""
    settings = {
        "revision": None,
        "gguf_file": None,
        "package": None,
        "dtype": "float32",
        "dequantize": False,
        "trust_remote_code": False,
        "shape": None,
    }
    return Model.model_validate({"path": str(path), **settings, **changes})

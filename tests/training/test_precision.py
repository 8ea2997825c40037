from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from pipeline.launch.machine import bfloat16_flags
from pipeline.training import engine, precision
from tests.training.small import train_settings


@pytest.mark.parametrize(
    "flags, expected",
    [("fpu avx512f avx512_bf16", "bfloat16"), ("fpu amx_bf16", "bfloat16"), ("fpu avx512f avx2", "float32")],
)
def test_auto_depends_on_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, expected: str):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
    found = bfloat16_flags(cpuinfo)
    monkeypatch.setattr(precision, "bfloat16_flags", lambda: found)
    assert precision.resolve_precision("auto", "cpu") == expected


@pytest.mark.parametrize("native, expected", [(True, "bfloat16"), (False, "float32")])
def test_auto_depends_on_the_gpu(monkeypatch: pytest.MonkeyPatch, native: bool, expected: str):
    monkeypatch.setattr(precision, "bfloat16_flags", lambda: ["avx512_bf16"])  # of the host, which does not matter
    assert precision.resolve_precision("auto", "cuda", native) == expected


def test_a_plan_assumes_that_gpus_support_bfloat16(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "bfloat16_flags", list)
    assert precision.resolve_precision("auto", "cuda") == "bfloat16"


def test_a_system_without_cpuinfo_computes_in_float32(tmp_path: Path):
    assert bfloat16_flags(tmp_path / "missing") == []


def test_an_explicit_precision_is_used_as_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "bfloat16_flags", list)
    assert precision.resolve_precision("bfloat16", "cpu") == "bfloat16"
    assert precision.resolve_precision("float32", "cpu") == "float32"


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"zero_stage": 0}, ("float32", False)),
        ({"zero_stage": 3}, ("float32", False)),
        ({"zero_stage": 1}, ("bfloat16", True)),
        ({"zero_stage": 2, "float32_products": False}, ("float32", False)),
        ({"zero_stage": 2, "precision": "bfloat16"}, ("bfloat16", True)),
        ({"zero_stage": 0, "precision": "bfloat16"}, ("bfloat16", False)),
        ({"zero_stage": 2, "precision": "bfloat16", "float32_products": False}, ("bfloat16", False)),
        ({"zero_stage": 2, "precision": "float32"}, ("float32", False)),
    ],
)
@pytest.mark.parametrize("is_slow", [True, False])
def test_a_measurement_decides_what_the_settings_leave_open(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], expected: tuple[str, bool], is_slow: bool
):
    monkeypatch.setattr(precision, "bfloat16_flags", lambda: ["avx512_bf16"])
    monkeypatch.setattr(engine, "prefers_float32_units", lambda: is_slow)
    monkeypatch.setattr(distributed, "broadcast", lambda tensor, src: None)
    changes = {"precision": "auto", "float32_products": "auto", **settings}
    deepspeed = {"zero_stage": changes.pop("zero_stage")}
    train, cpu = train_settings(deepspeed=deepspeed, **changes), torch.device("cpu")
    chosen = engine.choose_precision(train, cpu)
    assert chosen == (expected if is_slow else (settings.get("precision", "bfloat16"), False))
    monkeypatch.setattr(engine, "prefers_float32_units", lambda: not is_slow)
    assert engine.choose_precision(train, cpu, earlier=chosen) == chosen  # a resumed training does not change


def test_what_the_settings_exclude_is_not_chosen_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "bfloat16_flags", lambda: ["avx512_bf16"])
    monkeypatch.setattr(engine, "prefers_float32_units", lambda: True)
    monkeypatch.setattr(distributed, "broadcast", lambda tensor, src: None)
    train = train_settings(deepspeed={"zero_stage": 0}, precision="auto", float32_products="auto")
    assert engine.choose_precision(train, torch.device("cpu"), earlier=("bfloat16", True)) == ("float32", False)

from pathlib import Path

import pytest

from pipeline.launch.machine import bfloat16_flags
from pipeline.training import precision


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

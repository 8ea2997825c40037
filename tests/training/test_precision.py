from pathlib import Path

import pytest
import torch

from pipeline.training import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "flags, expected",
    [("fpu avx512f avx512_bf16", "bfloat16"), ("fpu amx_bf16", "bfloat16"), ("fpu avx512f avx2", "float32")],
)
def test_auto_follows_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, expected: str):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
    found = precision.cpu_flags(cpuinfo)
    monkeypatch.setattr(precision, "cpu_flags", lambda: found)
    assert precision.resolve_precision("auto", CPU) == expected


def test_a_system_without_cpuinfo_computes_in_float32(tmp_path: Path):
    assert precision.cpu_flags(tmp_path / "missing") == set()


def test_what_is_set_is_obeyed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "cpu_flags", set)
    assert precision.resolve_precision("bfloat16", CPU) == "bfloat16"
    assert precision.resolve_precision("float32", CPU) == "float32"


@pytest.mark.parametrize("bfloat16, noted", [(1e11, True), (4e11, False)])
def test_slow_bfloat16_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, bfloat16: float, noted: bool):
    rates = {torch.bfloat16: bfloat16, torch.float32: 2e11}
    monkeypatch.setattr(precision, "matrix_rate", lambda dtype, device: rates[dtype])
    note = precision.slow_bfloat16_note("pretrain")
    assert (note is not None) == noted
    assert note is None or "pretrain.precision=float32" in note


def test_the_measured_rate_is_a_rate():
    assert precision.matrix_rate(torch.float32, CPU, size=64) > 1e6

"""Every function whose first call MKL may get wrong is called once, by one thread, before anything computes."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.models.vector_math import FLOAT_DTYPES, FUNCTIONS, initialize_vector_math

REPOSITORY = Path(__file__).resolve().parents[2]

# The names in MKL of all its real functions of one argument, with their names in torch.
MKL_FUNCTIONS = {
    name: name.lower()
    for name in (
        "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cbrt", "Ceil", "Cos", "Cosh", "Erf", "Erfc", "ErfInv",
        "Exp", "Exp2", "Expm1", "Floor", "Log10", "Log1p", "Log2", "Round", "Sin", "Sinh", "Sqrt", "Tan", "Tanh",
        "Trunc",
    )
} | {"Ln": "log", "InvSqrt": "rsqrt", "LGamma": "lgamma"}  # fmt: skip

# Processes are forked because importing torch takes seconds. The operations before make both threads arrive together.
FIRST_COSINES = """
import hashlib, os
import torch
from pipeline.models.vector_math import initialize_vector_math

torch.set_num_threads(1)
angles = torch.linspace(0.0, 128.0, 16384)
for _ in range(60):
    if os.fork() == 0:
        torch.set_num_threads(2)
        initialize_vector_math()
        torch.ones(512, 512) @ torch.ones(512, 512)
        torch.ones(8000, 576, dtype=torch.bfloat16).float() + 1.0
        cosines = (angles + 0.0).cos()
        print(hashlib.sha256(cosines.numpy().tobytes()).hexdigest(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_all_functions_that_torch_takes_from_mkl_are_covered() -> None:
    if not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL")
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    linked = {torch_name for name, torch_name in MKL_FUNCTIONS.items() if hasattr(library, f"vms{name}")}
    assert linked == set(FUNCTIONS)


def test_every_function_is_called_on_one_element_of_every_dtype() -> None:
    seen = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in FUNCTIONS:
                assert args[0].numel() == 1
                seen.add((func.overloadpacket.__name__, args[0].dtype))
            return func(*args, **(kwargs or {}))

    with Recorder():
        initialize_vector_math()
    assert seen == {(name, dtype) for name in FUNCTIONS for dtype in FLOAT_DTYPES}


def test_first_cosines_by_two_threads_are_the_same_in_sixty_processes() -> None:
    """Without the calls, about 5 of 100 processes are wrong on a machine with two cores."""
    answer = subprocess.run(
        [sys.executable, "-c", FIRST_COSINES], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    lines = answer.stdout.split()
    assert len(lines) == 60, answer.stderr
    assert len(set(lines)) == 1

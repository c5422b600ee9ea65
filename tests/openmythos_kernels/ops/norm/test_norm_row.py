"""The bits of a row do not depend on where its arrays are in memory.

Compilers make several versions of a loop and choose one by the addresses of its arrays. With contracted multiply-adds
(`-ffp-contract`) the versions round differently, so prompts gave other last bits now and then.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.cpp_extension import include_paths

from building.recipe import extension

ROOT = Path(__file__).parents[4]
COMPILER = os.environ.get("CXX", "g++")
SOURCE = """
#include "cpu/norm/norm_row.h"
extern "C" float squares(const float* x, float* s, long n) {
  return openmythos::norm::enter<float>(x, nullptr, nullptr, s, n);
}
"""


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}")
@pytest.mark.usefixtures("needs_extension")
def test_squares_have_the_same_bits_wherever_the_row_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "row.cpp").write_text(SOURCE)
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", *extension().extra_compile_args["cxx"], "-Icsrc"]
        + [f"-isystem{path}" for path in include_paths()]
        + [str(tmp_path / "row.cpp"), "-o", str(tmp_path / "row.so")]
        + [f"-L{torch.__path__[0]}/lib", "-lc10", "-ltorch_cpu"],
        check=True,
    )  # fmt: skip
    squares = ctypes.CDLL(str(tmp_path / "row.so")).squares
    squares.restype = ctypes.c_float
    rng = np.random.default_rng(0)
    for _ in range(500):
        n = int(rng.integers(1, 16))
        memory = np.zeros(256, np.float32)
        memory[64 : 64 + n] = rng.standard_normal(n)

        def result(place, memory=memory, n=n):
            """The sum of squares of the row at 64, which is copied to `place`."""
            copy = memory.copy()
            start = copy.ctypes.data
            return squares(ctypes.c_void_p(start + 4 * 64), ctypes.c_void_p(start + 4 * place), ctypes.c_long(n))

        assert len({result(place) for place in (200, 64 + n, 65 + n, 64 - n)}) == 1

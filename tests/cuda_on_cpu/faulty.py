"""Runs kernels with one text replaced. It needs a process of its own, which a fault may crash.

    python -m tests.cuda_on_cpu.faulty JOB MODE ORDER FILE OLD NEW

Exits with 0 if the results are right, 3 if they are wrong or a launch fails (printed), and with a sanitizer's own
status if that stops it. Without FILE nothing is replaced.
"""

from __future__ import annotations

import ctypes
import sys

from tests.cuda_on_cpu import build

WRONG = 3


def samples(mode, order, edit) -> bool:
    import numpy

    library = ctypes.CDLL(str(build.kernels([build.HERE / "samples" / "samples.cu"], mode, edit)))
    library.cudaGetErrorString.restype = ctypes.c_char_p
    library.cuda_on_cpu_set_order(order, ctypes.c_uint64(1))
    random = numpy.random.default_rng(0)

    def address(array) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    def launched(function, *arguments) -> bool:
        status = function(*arguments)
        if status:
            print(library.cudaGetErrorString(status).decode(), file=sys.stderr)
        return status == 0

    values, counts = random.integers(0, 5, 1000, dtype=numpy.int32), numpy.zeros(5, numpy.int32)
    right = launched(library.histogram, address(values), 1000, 5, address(counts))
    right &= (counts == numpy.bincount(values, minlength=5)).all()
    x, out = random.integers(0, 99, 128, dtype=numpy.int32), numpy.zeros(128, numpy.int32)
    right &= launched(library.reverse64, address(x), 2, address(out))
    right &= (out == x.reshape(2, 64)[:, ::-1].reshape(-1)).all()
    right &= launched(library.warp_sum, address(x), address(out))
    return bool(right & (out[:64] == x[:64].reshape(2, 32).sum(1).repeat(32)).all())


def ours(mode, order, edit) -> bool:
    """The loop step with its gradients, and compaction, against the CPU kernels."""
    import torch

    from openmythos_kernels.runtime import backends
    from tests.cuda_on_cpu import cases, harness

    device = harness.Device(mode, edit)
    names = {number: name for name, number in harness.ORDERS.items()}
    right = True
    for make, compare in ((cases.step_results, cases.close), (cases.compaction_results, cases.equal)):
        for sizes in cases.FAULTS[make]:
            expected = make(**sizes)
            try:
                with backends.forcing("cuda"), device.order(names[order], 1):
                    got = make(**sizes)
            except RuntimeError as error:
                print(error, file=sys.stderr)
                return False
            right &= compare(got, expected)
    assert torch.is_tensor(expected[0])
    return right


def main(job: str, mode: str, order: str, file: str = "", old: str = "", new: str = "") -> int:
    def edit(name: str, text: str) -> str:
        if name != file:
            return text
        if old not in text:
            raise SystemExit(f"{file} does not contain {old!r}")
        return text.replace(old, new, 1)

    right = {"samples": samples, "ours": ours}[job](mode, int(order), edit)
    return 0 if right else WRONG


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

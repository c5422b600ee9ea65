"""On a GPU, every backend of every op, not only the chosen one, in all cases and dtypes of the specifications."""

import pytest
import torch

from openmythos_kernels.runtime import backends, unproven
from openmythos_kernels.verify.check import check
from openmythos_kernels.verify.specs import specifications

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
RUNS = [
    pytest.param(d, backend, dtype, sizes, id=f"{d.name}-{backend}-{str(dtype).removeprefix('torch.')}-{case}")
    for d in specifications()
    for backend in d.backends
    if backend != "cpu"
    for dtype in d.dtypes
    for case, sizes in d.cases.items()
]


@pytest.mark.parametrize("specification, backend, dtype, sizes", RUNS)
def test_within_the_error_budget(specification, backend, dtype, sizes):
    with backends.forcing(backend):
        check(specification, sizes, dtype, torch.device("cuda"))


LAYER = dict(
    dim=2048,
    heads=16,
    latent=256,
    q_rank=512,
    nope=64,
    rope=32,
    v=64,
    capacity=4096,
    held=3000,
    blocks=1,
    experts=8,
    topk=4,
    shared=2,
    inner=2048,
    shared_inner=2048,
    loops=2,
    rank=8,
    depths=16,
    halting="second",
    spend_remainder=False,
    residual=False,
    act=True,
)
STEPS = {  # widths whose rows are whole packs, with an embedding of a multiple of 16 elements
    "mythos_1b": dict(tokens=515, dim=2048, rank=8),
    "last loop": dict(tokens=9, dim=384, rank=3, enter=False, spend_remainder=True, loop=3),
}
LAYERS = {  # of mythos_1b's sizes, with fewer experts
    "one row": LAYER | dict(rows=1),
    "16 rows": LAYER | dict(rows=16),
    "dense": LAYER | dict(rows=1, experts=0, topk=0, shared_inner=2730),
}
ATTENTION = {  # heads of mythos_1b: several blocks of keys, of which the last is not whole
    "mla_attention": dict(
        rows=2, tokens=515, keys=530, heads=16, nope=64, rope=32, v=64, start=[15, 0], held=[530, 500]
    ),
    "mla_attention_rows": dict(rows=3, keys=530, heads=16, nope=64, rope=32, v=64, counts=[530, 0, 211]),
}
UNPROVEN = [
    *(("loop_step", backend, case) for backend in ("cuda", "triton") for case in STEPS),
    *((op, "triton", case) for op in sorted(backends.UNPROVEN) for case in LAYERS),
    *((op, "triton", op) for op in ATTENTION),
]


@pytest.mark.parametrize("op, backend, case", UNPROVEN)
def test_kernels_that_no_gpu_has_run(op, backend, case):
    (specification,) = (d for d in specifications() if d.name == op)
    with backends.forcing(backend), unproven.allowing():
        for dtype in specification.dtypes:
            check(specification, (STEPS | LAYERS | ATTENTION)[case], dtype, torch.device("cuda"))

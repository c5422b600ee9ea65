"""SwiGLU as one op."""

import pytest
import torch

from openmythos_kernels.ops.moe.ffn import swiglu_ffn


def test_bad_input_is_one_clear_error():
    x, up, down = torch.randn(2, 8), torch.randn(4, 8), torch.randn(8, 4)
    for match, arguments in (
        (r"x: got torch.int64 \(2, 8\)", (x.long(), up, up, down)),
        (r"up: got torch.float32 \(4, 7\)", (x, up, up[:, :7], down)),
        ("down: got torch.float64", (x, up, up, down.double())),
    ):
        with pytest.raises(ValueError, match=match):
            swiglu_ffn(*arguments)

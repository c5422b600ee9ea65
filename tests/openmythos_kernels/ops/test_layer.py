"""The names of weights, which Python and C++ write down once each, and the schemas made of them."""

import pytest

from openmythos_kernels.ops.layer import BlockWeights
from openmythos_kernels.ops.layer.block_decode import BLOCK_DECODE
from openmythos_kernels.ops.layer.loop_decode import LOOP_DECODE
from openmythos_kernels.ops.layer.weights import NAMES
from openmythos_kernels.runtime import extension


def test_the_extension_has_the_same_names_in_the_same_order():
    assert extension.module is not None, extension.reason
    assert extension.module.layer_weight_names() == NAMES


@pytest.mark.parametrize("op", [BLOCK_DECODE, LOOP_DECODE], ids=lambda op: op.name)
def test_the_schema_has_the_fields_of_block_weights(op):
    arguments = [argument.name for argument in op.overload._schema.arguments]
    first = arguments.index("attention")
    assert tuple(arguments[first : first + len(BlockWeights._fields)]) == BlockWeights._fields

"""The error budget accepts about twice the error of eager PyTorch, and nothing worse."""

import pytest
import torch

from openmythos_kernels.verify.budget import assert_within_budget

EPS = torch.finfo(torch.float32).eps


def drawn():
    truth = torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth[4, 7] = 5.0
    return truth, truth.float()


def test_eager_itself_and_twice_its_error_pass():
    truth, eager = drawn()
    assert_within_budget(eager, eager, truth)
    noisy = eager + 1e-3
    assert_within_budget(truth.float() + 1.9e-3, noisy, truth)


@pytest.mark.parametrize("spoil", [lambda x: x * (1 + 4 * EPS), lambda x: x + 4e-6, lambda x: x.bfloat16().float()])
def test_a_small_error_everywhere_is_seen(spoil):
    truth, eager = drawn()
    with pytest.raises(AssertionError, match="relative Frobenius error"):
        assert_within_budget(spoil(eager), eager, truth)


def test_one_wrong_element_is_found_where_it_is_with_eagers_value():
    truth, eager = drawn()
    fast = eager.clone()
    fast[4, 7] += 2e-5
    message = r"y: .*largest error 2e-05 at \[4, 7\] \(fast 5\.0000\d*, eager 5, fp64 5\), eager's largest .*e-0"
    with pytest.raises(AssertionError, match=message):
        assert_within_budget({"x": eager, "y": fast}, {"x": eager, "y": eager}, {"x": truth, "y": truth})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_must_be_so_in_both(value):
    truth, eager = drawn()
    spoiled = eager.clone()
    spoiled[2, 3] = value
    with pytest.raises(AssertionError, match=r"inf/nan masks differ in 1 elements, first \[2, 3\]"):
        assert_within_budget(spoiled, eager, truth)
    with pytest.raises(AssertionError, match="inf/nan masks differ"):
        assert_within_budget(eager, spoiled, truth)
    assert_within_budget(spoiled, spoiled, spoiled.double())


def test_shapes_dtypes_and_numbers_of_tensors_must_agree():
    truth, eager = drawn()
    for fast, message in (
        (eager[:5], "shapes differ"),
        (eager.half(), "dtypes differ"),
        ([eager, eager], "cannot pair 2"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_within_budget(fast, eager, truth)
    with pytest.raises(AssertionError, match="relative Frobenius"):  # a missing gradient counts as zeros
        assert_within_budget([None], [eager], [truth])

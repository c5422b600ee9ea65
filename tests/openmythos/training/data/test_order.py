import numpy as np
import pytest

from openmythos.training.data.order import shuffled


@pytest.mark.parametrize("length", [*range(1, 40), 255, 256, 257, 1000, 4097])
def test_it_is_a_permutation(length):
    found = shuffled(np.arange(length), length, 7, 3)
    assert found.dtype == np.uint64 and sorted(found.tolist()) == list(range(length))


def test_any_place_can_be_asked_alone():
    whole = shuffled(np.arange(1000), 1000, 1, 2)
    for places in ([5], [999, 0, 5], []):
        assert (shuffled(np.array(places, np.int64), 1000, 1, 2) == whole[places]).all()


def test_each_key_has_an_order_of_its_own():
    orders = {tuple(shuffled(np.arange(50), 50, seed, epoch).tolist()) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


@pytest.mark.parametrize("length", [2, 3, 5, 10, 37])
def test_every_place_gets_every_value_equally_often(length):
    orders = np.array([shuffled(np.arange(length), length, key) for key in range(1500)]).astype(int)
    for place in (0, length // 2, length - 1):
        counts = np.bincount(orders[:, place], minlength=length)
        expected = 1500 / length
        assert ((counts - expected) ** 2 / expected).sum() < length + 5 * (2 * length) ** 0.5  # chi-squared, 5 sigma


def test_neighbours_are_torn_apart():
    order = shuffled(np.arange(10_000), 10_000, 0).astype(int)
    assert (
        abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04 and abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.04
    )
    assert (np.abs(np.diff(order)) == 1).mean() < 0.002


def test_lengths_beyond_memory():
    length = 10**15 + 7
    places = np.arange(length - 1000, length)
    found = shuffled(places, length, 4)
    assert len(set(found.tolist())) == 1000 and int(found.max()) < length and int(found.max()) > length // 2


def test_the_numbers_are_pinned():
    """A resumed run must get its windows again, whatever has changed in this package."""
    assert shuffled(np.arange(6), 1000, 3, 1).tolist() == [127, 578, 444, 727, 450, 365]

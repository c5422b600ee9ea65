"""The ragged cache against a plain list of what every token keeps."""

import random

import pytest
import torch

from openmythos.ragged import PAGE, RaggedCache


def fill(cache, places, last, value):
    """Appends tokens to the sequences `places` whose latents say which token and slot they are of."""
    cache.extend(last, places)
    rows, values = [], []
    for b, numbers in zip(places, last):
        for i, n in enumerate(numbers):
            j = cache.lengths[b] - len(numbers) + i
            for t in range(n + 1):
                rows.append(int(cache.first[b, j]) + cache.slot(t))
                values.append([value, b, j, t])
    cache.put("", torch.tensor(rows), latent=torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize("keep", [None, 1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_rows_by_definition(keep, seed):
    """Growth, truncation, reuse of pages, sequences of different length: every loop finds its own latent."""
    r = random.Random(seed)
    batch = r.randint(1, 4)
    cache = RaggedCache(keep)
    cache.start(batch, torch.device("cpu"))
    tokens = [[] for _ in range(batch)]  # of each sequence: (value, last)
    for value in range(60):
        if r.random() < 0.25:
            lengths = [r.randint(0, len(row)) for row in tokens]
            cache.truncate(lengths)
            tokens = [row[:n] for row, n in zip(tokens, lengths)]
        elif r.random() < 0.3 and all(tokens) and keep is None:
            ran = [r.randint(0, row[-1][1]) for row in tokens]
            cache.settle(ran)
            tokens = [[*row[:-1], (row[-1][0], n)] for row, n in zip(tokens, ran)]
        else:
            places = sorted(r.sample(range(batch), r.randint(1, batch)))
            last = [[r.randint(0, 15) for _ in range(1 + value % 3)] for _ in places]
            fill(cache, places, last, float(value))
            for b, numbers in zip(places, last):
                tokens[b] += [(value, n) for n in numbers]
        assert cache.lengths == [len(row) for row in tokens]
        for t in (0, 1, 5, 15):
            rows = cache.row(t)
            for b, row in enumerate(tokens):
                for j, (v, last) in enumerate(row):
                    found = cache.pools[""]["latent"][rows[b, j]].tolist()
                    reads = min(t, last)
                    wrote = max((s for s in range(last + 1) if cache.slot(s) == cache.slot(reads)), default=reads)
                    assert found == [v, b, j, wrote], (t, b, j)


def test_bytes_follow_depth():
    sizes = {}
    for depth in (0, 3, 15):
        cache = RaggedCache()
        cache.start(2, torch.device("cpu"))
        fill(cache, [0, 1], [[depth] * 512] * 2, 1.0)
        sizes[depth] = cache.nbytes() - 2 * cache.first.nbytes
    assert sizes[3] == pytest.approx(4 * sizes[0], rel=0.05) and sizes[15] == pytest.approx(16 * sizes[0], rel=0.05)


def test_settled_tokens_give_back_the_rows_behind_them():
    cache = RaggedCache()
    cache.start(1, torch.device("cpu"))
    for _ in range(PAGE):
        cache.extend([[15]])
        cache.settle([0])
    assert cache.first[0, :PAGE].tolist() == sorted(set(cache.first[0, :PAGE].tolist()))
    assert cache.rows <= 2 * PAGE  # the last rows of a page have no room for a token that may run all loops


def test_pages_come_back():
    cache = RaggedCache()
    cache.start(1, torch.device("cpu"))
    fill(cache, [0], [[15] * 40], 1.0)
    rows = cache.rows
    for _ in range(20):
        cache.truncate([0])
        fill(cache, [0], [[15] * 40], 2.0)
    assert cache.rows == rows


def test_errors():
    cache = RaggedCache()
    cache.start(2, torch.device("cpu"))
    with pytest.raises(ValueError, match="holds 2 sequences, the call has 3"):
        cache.start(3, torch.device("cpu"))
    cache.extend([[1], [1]])
    with pytest.raises(ValueError, match="lengths = "):
        cache.truncate([2, 0])
    with pytest.raises(ValueError, match="n_loops = 200"):
        cache.extend([[199], [199]])

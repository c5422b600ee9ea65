"""Pointer chasing: a sequence lists the edges of a graph in random order, then nodes to start from.

An edge is one token, of which there is one for each pair of nodes. Its first embedding is the sum of a key's and a
value's (`prepare`), as if each had an embedding of its own. A sequence asks for several start nodes at once, since
one question a sequence takes many times as long to learn from.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from openmythos.model import LanguageModel


class Questions(NamedTuple):
    """Sequences of a task.

    Attributes:
        ids: (B, T) int64. asked: how many of the last positions are questions, Q.
        path: (B, Q, K + 1) int64, the nodes reached after 0 .. K hops.
        hops: (B, Q) int64, how many are asked for, or, for chains, how far the end is.
    """

    ids: Tensor
    asked: int
    path: Tensor
    hops: Tensor

    @property
    def answers(self) -> Tensor:
        """(B, Q) int64, the node after `hops` hops."""
        return self.path.gather(-1, self.hops.unsqueeze(-1)).squeeze(-1)


class Vocabulary(NamedTuple):
    """Tokens of a task with `nodes` nodes: nodes, edges, one mark for a hop in unary, numbers of hops.

    Attributes:
        hops: largest number of hops that a token stands for; 0: none does.
    """

    nodes: int
    hops: int = 0

    @property
    def size(self) -> int:
        return self.mark + 1 + self.hops

    @property
    def mark(self) -> int:
        return self.nodes * (1 + self.nodes)

    def edge(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The token of an edge from a to b."""
        return self.nodes + a * self.nodes + b

    def number(self, hops: np.ndarray) -> np.ndarray:
        """The token of a number of hops >= 1."""
        return self.mark + hops

    @torch.no_grad()
    def prepare(self, model: LanguageModel, generator: torch.Generator) -> None:
        """Makes the first embedding of an edge the sum of its key's and its value's, the value's being its node's; and
        the head one of nodes alone. A head of all tokens would push the edges' embeddings away from the answers."""
        weight, n = model.embed.weight, self.nodes
        key = torch.randn(n, weight.shape[1], generator=generator).to(weight) * weight[:n].std()
        weight[n : self.mark] = (key.unsqueeze(1) + weight[:n]).flatten(0, 1)
        model.head = NodeHead(model.head, n)


class NodeHead(nn.Linear):
    """A language model's head that gives logits of the first `nodes` tokens, (..., dim) -> (..., nodes)."""

    def __init__(self, head: nn.Linear, nodes: int):
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight, self.nodes = head.weight, nodes

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[: self.nodes])


def cycle(
    words: Vocabulary,
    rows: int,
    hops: int,
    rng: np.random.Generator,
    unary: bool = False,
    asks: bool = False,
    least: int = 1,
) -> Questions:
    """One random cycle through all nodes per sequence, in which every node is asked for.

    Args:
        hops: how many every question asks for; with `asks` the largest number, of which each sequence draws its own.
        unary: put `hops` marks before the questions.
        asks: put the token of the sequence's number there. least: of these numbers.
    """
    n = words.nodes
    order = _shuffled(rng, rows, n)  # the node at each place of the cycle
    edges = _shuffled(rng, rows, n)
    start = _shuffled(rng, rows, n)
    take = np.take_along_axis
    pairs = words.edge(take(order, edges, 1), take(order, (edges + 1) % n, 1))
    wanted = rng.integers(least, hops + 1, size=(rows, 1)) if asks else np.full((rows, 1), hops)
    said = words.number(wanted) if asks else np.full((rows, hops if unary else 0), words.mark)
    steps = start[:, :, None] + np.arange(hops + 1)
    path = take(order[:, None], steps % n, 2)
    return _questions([pairs, said, take(order, start, 1)], n, path, np.repeat(wanted, n, 1))


def chains(words: Vocabulary, rows: int, lengths: tuple[int, ...], asked: int, rng: np.random.Generator) -> Questions:
    """Chains of the given numbers of nodes; each ends in a node that points to itself, and so do the nodes left over.

    Questions are nodes that are not an end; the answer is the end of their chain, whose distance is not given. Each
    distance is as likely as another.
    """
    n, longest = words.nodes, max(lengths) - 1
    place = np.arange(n)
    ends = np.concatenate([np.cumsum(lengths) - 1, np.arange(sum(lengths), n)])
    follow = np.where(np.isin(place, ends), place, place + 1)
    distance = np.zeros(n, dtype=np.int64)
    for end, length in zip(np.cumsum(lengths) - 1, lengths):
        distance[end - length + 1 : end + 1] = np.arange(length)[::-1]
    order, edges = _shuffled(rng, rows, n), _shuffled(rng, rows, n)
    take = np.take_along_axis
    pairs = words.edge(take(order, edges, 1), take(order, follow[edges], 1))
    at = [np.flatnonzero(distance == d) for d in range(1, longest + 1)]
    wanted = rng.integers(1, longest + 1, size=(rows, asked))
    start = np.vectorize(lambda d: rng.choice(at[d - 1]), otypes=[np.int64])(wanted)
    steps = [start]
    for _ in range(longest):
        steps.append(follow[steps[-1]])
    path = take(order[:, None], np.stack(steps, -1), 2)
    return _questions([pairs, take(order, start, 1)], asked, path, wanted)


def _shuffled(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    return rng.permuted(np.tile(np.arange(n), (rows, 1)), axis=1)


def _questions(parts: list[np.ndarray], asked: int, path: np.ndarray, hops: np.ndarray) -> Questions:
    ids = np.concatenate(parts, axis=1)
    return Questions(torch.from_numpy(ids), asked, torch.from_numpy(path), torch.from_numpy(hops))

"""The memory that requests may claim."""

from __future__ import annotations

from openmythos.ragged import GROWTH, PAGE
from openmythos_kernels.serve.request import Request
from openmythos_kernels.serve.weights import Weights


class Budget:
    """Bytes of latents for the requests under way.

    A request claims what it needs if every token runs every loop, in whole pages: claims that fit never run out, so no
    request is ever interrupted. Pools grow with what is used, not with what is claimed.

    Args:
        limit: bytes in all; None: no limit but the number of slots.
        keep: as of `openmythos.ragged.RaggedCache`.
    """

    def __init__(self, weights: Weights, limit: int | None, keep: int | None):
        row = (weights.latent + weights.rope) * weights.dtype.itemsize
        self._looped = row * weights.cores
        self._outer = row * (len(weights.prelude) + len(weights.coda))
        self._limit, self._keep = limit, keep
        self.claimed = 0

    def claim_of(self, request: Request) -> int:
        """Bytes that a request claims.

        Raises:
            ValueError: naming n_loops or max_new_tokens: it could never run.
        """
        room = min(request.n_loops, self._keep or request.n_loops)
        if room > PAGE:
            raise ValueError(f"n_loops = {request.n_loops}: a token keeps at most {PAGE} loops; must be <= {PAGE}")
        pages = -(-request.tokens // (PAGE // room)) * self._looped + -(-request.tokens // PAGE) * self._outer
        claim = int(pages * PAGE * (1 + GROWTH))
        if self._limit is not None and claim > self._limit:
            raise ValueError(
                f"max_new_tokens = {request.max_new_tokens}: with a prompt of {len(request.prompt)} tokens and "
                f"{request.n_loops} loops it needs {claim} bytes of cache; the engine's budget is {self._limit}"
            )
        return claim

    def fits(self, claim: int) -> bool:
        """Whether a claim can be taken now."""
        return self._limit is None or self.claimed + claim <= self._limit

"""Which code of `open_mythos` is known, so that a fast module may take its place."""

from openmythos_kernels.upstream.recognise import ACCEPTED, Judgement, judge, patched

__all__ = ["ACCEPTED", "Judgement", "judge", "patched"]

"""Recognizes the code of `open_mythos`, so that fast modules replace only what is known."""

from openmythos_kernels.upstream.recognise import ACCEPTED, Judgement, judge, patched

__all__ = ["ACCEPTED", "Judgement", "judge", "patched"]

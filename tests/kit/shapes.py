"""Random sizes for described ops. The same ones at every run; HYPOTHESIS_PROFILE=explore draws others and more."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from openmythos_kernels.verify.specification import Sizes, Specification

settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("explore", settings.get_profile("repeatable"), derandomize=False, max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def sizes(specification: Specification) -> st.SearchStrategy[Sizes]:
    """The first case with every size that has a range drawn from it."""
    first = next(iter(specification.cases.values()))
    drawn = {name: st.integers(least, most) for name, (least, most) in specification.ranges.items()}
    return st.fixed_dictionaries(drawn).map(lambda found: {**first, **found})

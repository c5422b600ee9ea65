"""Which experiments there are: the modules of `openmythos.lab.experiments`."""

from __future__ import annotations

import importlib
import pkgutil

from openmythos.lab import experiments as folder
from openmythos.lab.experiment import Experiment


def catalog() -> dict[str, Experiment]:
    """All experiments by name, in the order of their numbers.

    Raises:
        ValueError: a module has no EXPERIMENT, or two have one of the same name.
    """
    found: dict[str, Experiment] = {}
    for module in pkgutil.iter_modules(folder.__path__):
        experiment = getattr(importlib.import_module(f"{folder.__name__}.{module.name}"), "EXPERIMENT", None)
        if not isinstance(experiment, Experiment):
            raise ValueError(f"{folder.__name__}.{module.name}: must have an Experiment named EXPERIMENT")
        if experiment.name in found:
            raise ValueError(f"{folder.__name__}.{module.name}: a second experiment named {experiment.name}")
        found[experiment.name] = experiment
    return dict(sorted(found.items(), key=lambda item: int(item[1].number.lstrip("E"))))


def chosen(names: list[str]) -> list[Experiment]:
    """The experiments of these names; all if there are none.

    Raises:
        ValueError: an unknown name.
    """
    known = catalog()
    for name in names:
        if name not in known:
            raise ValueError(f"NAME = {name}: must be one of {', '.join(known)}")
    return [known[name] for name in names or known]

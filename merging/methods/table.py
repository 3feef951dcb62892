"""The table of merge methods: the entries of every module here whose name ends in `_methods`. Numpy-free.

Flags, help pages, keys of merge files, pipeline stages, mergekit's names and docs/merging.md follow from it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pkgutil import iter_modules

from .method import Method

__all__ = ["METHODS", "PANELS"]

PANELS = (
    "WARP",
    "Averages",
    "Averages on a sphere",
    "Sums of task vectors",
    "Two models",
    "Layers",
)  # the order of the list


def _found() -> dict[str, Method]:
    """Every method, by panel and in the order of its module. Raises ValueError for a name that two modules give."""
    methods: dict[str, Method] = {}
    package = __name__.rpartition(".")[0]
    for module in iter_modules(sys.modules[package].__path__):
        if module.name.endswith("_methods"):
            for name, method in import_module(f"{package}.{module.name}").METHODS.items():
                if name in methods:
                    raise ValueError(f"two modules have a merge method {name}")
                methods[name] = method
    panels = [*PANELS, *(method.panel for method in methods.values() if method.panel not in PANELS)]
    return dict(sorted(methods.items(), key=lambda item: panels.index(item[1].panel)))


METHODS = _found()

"""Every method by name, ours first.

Owns the list. Importing it imports no peer's package: a method does that when it is used. A new
method is a class of some twenty lines in the module of its kind.
"""

from __future__ import annotations

from benchmarks.holdfast_methods import HOLDFAST
from benchmarks.method import Method
from benchmarks.package_methods import PACKAGES
from benchmarks.torch_methods import TORCH

METHODS: dict[str, type[Method]] = {each.name: each for each in [*HOLDFAST, *TORCH, *PACKAGES]}

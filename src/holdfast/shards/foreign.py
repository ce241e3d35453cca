"""The files of a checkpoint that torch.distributed.checkpoint wrote without holdfast.

Owns reading model and optimizer from such files through torch's own reader. Promises what can be
promised without digests: nothing read from disk runs code, and no file outside the directory is
opened. Bytes that are wrong but well-formed are not noticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from holdfast.shards.reader import RegionPlanner, ShardReader
from holdfast.shards.regions import Region


@dataclass(frozen=True)
class ForeignReader(ShardReader):
    """The tensors and values under `model` and `optimizer`; whatever else is there is left out."""

    _unlisted: ClassVar[str] = "is not in the directory"

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """As its base."""
        found = super().tensors()
        return {name: each for name, each in found.items() if self._is_of_use(name)}

    def value_names(self) -> list[str]:
        """As its base."""
        return [name for name in super().value_names() if self._is_of_use(name)]

    def _is_of_use(self, name: str) -> bool:
        path = self.key_path(name)
        if path[:2] in (("optimizer", "state"), ("optimizer", "param_groups")):
            return len(path) > 3
        return path[0] == "model" and len(path) > 1

    def read_values(self) -> dict[str, Any]:
        """Return everything that is no tensor, by flat name."""
        values: dict[str, Any] = dict.fromkeys(self.value_names())
        planner, plan = self._plan(values)
        for name, items in self._by_file(plan.items).items():
            self._read_through_torch(name, items, planner)
        return values

    def _read_regions_of(self, name: str, regions: Sequence[Region]) -> None:
        self._read_through_torch(name, [each.item for each in regions], RegionPlanner(regions))

"""The files of a checkpoint that torch.distributed.checkpoint wrote without holdfast.

Owns reading model and optimizer from such files through torch's own reader. Promises what can be
promised without digests: nothing read from disk runs code, and no file outside the directory is
opened. Bytes that are wrong but well-formed are not noticed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from holdfast.shards.landing import Wanted
from holdfast.shards.reader import RegionPlanner, SafePlanner, ShardReader
from holdfast.shards.regions import Region


@dataclass(frozen=True)
class ForeignReader(ShardReader):
    """The tensors and values under `model` and `optimizer`; whatever else is there is left out."""

    _unlisted: ClassVar[str] = "is not in the directory"
    _derives_keys: ClassVar[bool] = True

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
        planner = SafePlanner()
        planner.set_up_planner(values, self.metadata, is_coordinator=True)
        files: dict[str, list[ReadItem]] = {}
        for item in planner.finish_plan(planner.create_local_plan()).items:
            files.setdefault(self.place_of(item.storage_index).relative_path, []).append(item)
        for name, items in files.items():
            self._read_through_torch(name, items, planner)
        return values

    def _sort(self, region: Region, place: Any, wanted: Wanted) -> None:
        wanted.foreign.append((region, range(place.offset, place.offset + place.length)))

    def _read_from(self, name: str, wanted: Wanted) -> None:
        planner = RegionPlanner(region for region, _ in wanted.foreign)
        self._read_through_torch(name, planner.items, planner)

"""The public kit for tests of what plugs into holdfast; it needs pytest.

`StorageContract` holds the promises of the storage protocol: derive a test class from it for each
implementation. `MemoryStorage` is the smallest one, for tests that need no disk. `TierContract`
holds those of the tier protocol in the same way; it needs torch, which is imported with it alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.testing.memory import MemoryStorage
from holdfast.testing.storage import StorageContract

if TYPE_CHECKING:
    from holdfast.testing.tier import StartedTier, TierContract

__all__ = ["MemoryStorage", "StartedTier", "StorageContract", "TierContract"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from holdfast.testing import tier

        return getattr(tier, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

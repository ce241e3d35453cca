"""The public kit for tests of what plugs into holdfast; it needs pytest.

`StorageContract` holds the promises of the storage protocol: derive a test class from it for each
implementation. `MemoryStorage` is the smallest one, for tests that need no disk. `TierContract`
holds those of the tier protocol in the same way.
"""

from __future__ import annotations

from holdfast.testing.memory import MemoryStorage
from holdfast.testing.storage import StorageContract
from holdfast.testing.tier import StartedTier, TierContract

__all__ = ["MemoryStorage", "StartedTier", "StorageContract", "TierContract"]

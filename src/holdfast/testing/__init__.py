"""The public kit for tests of what plugs into holdfast; it needs pytest.

`StorageContract` holds the promises of the storage protocol: derive a test class from it for each
implementation. `MemoryStorage` is the smallest one, for tests that need no disk.
"""

from __future__ import annotations

from holdfast.testing.memory import MemoryStorage
from holdfast.testing.storage import StorageContract

__all__ = ["MemoryStorage", "StorageContract"]

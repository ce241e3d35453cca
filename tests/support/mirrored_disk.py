"""What a real disk would hold after a power cut, for files that a program really writes.

Owns the translation of watched kernel calls into the model of durability in `crash_filesystem`.
Promises that the model sees every call in order; a test compares it with what is really there.
Mappings are none of its business: on a disk nothing is written through one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.crash_filesystem import CrashFilesystem, Image
from tests.support.kernel_calls import Call


class MirroredDisk:
    """A directory that exists, durably and empty, and what is done below it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._model = CrashFilesystem()
        self._model.make_directory(root)
        for each in (root, *root.parents):
            self._model.sync_directory(each)
        self.ignores: Callable[[Call], bool] = lambda call: False
        """Asked of each sync; True: it reports success and does nothing."""

    @property
    def image(self) -> Image:
        """Everything at this instant."""
        return self._model.image

    def note(self, call: Call) -> None:
        """Do to the model what was done to the disk."""
        model, path = self._model, Path(call.path)
        match call.kind:
            case "mkdir":
                model.make_directory(path)
            case "rmdir":
                model.remove_directory(path)
            case "unlink":
                model.remove_file(path)
            case "rename":
                model.rename(Path(call.source), path)
            case "link":
                model.link(Path(call.source), path)
            case "create":
                model.open_new(path).close()
            case "write":
                model.overwrite(path, call.offset, call.content)
            case "truncate" | "allocate":
                model.resize(path, call.size_bytes)
            case "sync_file" if not self.ignores(call):
                model.sync_file(path)
            case "sync_directory" if not self.ignores(call):
                model.sync_directory(path)

    def tree(self, image: Image) -> dict[str, bytes | None]:
        """Return what is below the directory in an image, by relative name."""
        start = f"{self.root}/"
        found: dict[str, bytes | None] = {}
        for path, content in image.tree().items():
            if path.startswith(start):
                assert not isinstance(content, str), "there are no links here"
                found[path.removeprefix(start)] = content
        return found

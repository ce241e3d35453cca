"""What says where names are: the index of a shard file, read from the file itself, and `.metadata`.

Promises of an index that every block which holds a part of it matched its digest, and that it was
not changed while it was read; of `.metadata`, whose bytes the caller has verified, that nothing in
it runs code.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.checkpoint.metadata import Metadata

from holdfast.blame import is_process_failure
from holdfast.errors import CheckpointError, CorruptCheckpointError, FormatTooNewError
from holdfast.format.dcp import read_metadata
from holdfast.format.inventory import TAIL, list_names, names_in_body
from holdfast.format.layout import Entry, locate_index, parse_index
from holdfast.read.direct import Part, read_expected, read_verified
from holdfast.storage.backend import ObjectReader, Storage, as_stream, open_stream
from holdfast.storage.digests import Blocks, FileRecord, body_bytes_of


@dataclass(frozen=True)
class Index:
    """The verified index of one shard file."""

    content: bytes
    offset: int
    """Of the index in the file."""
    digests: tuple[str, ...]
    """Of the body's blocks."""

    def entries(self, path: str) -> list[Entry]:
        """Return the items.

        Raises:
            CorruptCheckpointError: it is inconsistent.
            FormatTooNewError: a later version of holdfast wrote it.
        """
        try:
            return parse_index(self.content, self.offset, path)
        except FormatTooNewError:
            raise
        except ValueError as error:
            raise CorruptCheckpointError(path, str(error)) from error


def read_index(files: Storage, name: str, record: FileRecord) -> Index:
    """Read the index of a shard file, verified against the digests of its blocks.

    Raises:
        CorruptCheckpointError: it is damaged or missing.
        OSError: it cannot be read.
    """
    where = files.where(name)
    glimpse, end = bytearray(TAIL.size), bytearray(TAIL.size)
    try:
        with files.open(name) as source:
            blocks = read_expected(source, where, record)
            body_bytes = _body_bytes(source, where, record, blocks)
            tail_place = body_bytes - TAIL.size
            source.get_into(max(tail_place, 0), [memoryview(glimpse)])
    except FileNotFoundError as error:
        raise CorruptCheckpointError(where, "is missing") from error
    try:
        place = locate_index(bytes(glimpse), body_bytes)
    except ValueError as error:
        raise CorruptCheckpointError(where, str(error)) from error
    content = bytearray(len(place))
    parts = [Part(place.start, memoryview(content)), Part(tail_place, memoryview(end))]
    try:
        read_verified(files, name, record, parts)
    except CorruptCheckpointError as error:
        if error.byte_range is None:
            raise
        with open_stream(files, name) as stream:
            names = list_names(names_in_body(stream, body_bytes, error.byte_range))
        raise CorruptCheckpointError(where, error.reason + names, error.byte_range) from error
    if end != glimpse:
        raise CorruptCheckpointError(where, "is changed while it is read")
    return Index(bytes(content), place.start, tuple(blocks.digests))


def _body_bytes(source: ObjectReader, where: str, record: FileRecord, blocks: Blocks) -> int:
    """Return the size of the body; what is read there is verified later."""
    if record.blocks is None:
        return blocks.covered_bytes
    found = body_bytes_of(as_stream(source))  # the digests in the manifest cover the footer too
    if found is None:
        raise CorruptCheckpointError(where, "has no footer, and so no index")
    return found


def parse_metadata(content: bytes, where: str, *, derive_keys: bool = False) -> Metadata:
    """Return what `.metadata` holds; whether the files that it names are listed is not checked.

    Raises:
        CorruptCheckpointError: it is not metadata, or requires running code.
    """
    try:
        metadata = read_metadata(content, derive_keys=derive_keys)
    except CheckpointError:  # this torch cannot read it
        raise
    except Exception as error:  # a hostile or torn pickle can raise anything
        if is_process_failure(error):
            raise
        raise CorruptCheckpointError(where, f"cannot be read: {error}") from error
    if metadata is None:
        raise CorruptCheckpointError(where, "is not the metadata of a checkpoint")
    assert metadata.planner_data is not None
    if nameless := sorted(metadata.state_dict_metadata.keys() - metadata.planner_data.keys()):
        raise CorruptCheckpointError(where, f"has no place for {nameless[0]!r}")
    return metadata

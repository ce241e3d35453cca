"""The commit record and the digests in it."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import xxhash

from holdfast.errors import CorruptCheckpointError, FormatTooNewError
from holdfast.storage.digests import BLOCK_BYTES, FileRecord, describe_content, find_difference
from holdfast.storage.manifest import Manifest
from tests.support.stores import manifest_of

_FILES = tuple(
    describe_content(name, content)
    for name, content in ((".metadata", b"m" * 10), ("state/rank_00000.pt", b""))
)
MANIFEST = manifest_of(40, 3, "run", 2, _FILES)


def _sealed(values: object) -> bytes:
    body = json.dumps(values).encode() + b"\n"
    return body + xxhash.xxh3_128_hexdigest(body).encode() + b"\n"


def test_a_manifest_is_read_back_exactly() -> None:
    """What is written is read back equal, the file records included."""
    assert Manifest.from_bytes(MANIFEST.to_bytes(), "m") == MANIFEST
    assert MANIFEST.size_bytes == 10


def test_ranks_that_are_told_no_files_know_the_digest_of_all() -> None:
    """A base is recorded by it, and each rank is told the records of few files."""
    told = dataclasses.replace(MANIFEST.without_files(), files=_FILES[:1])
    assert told.files == _FILES[:1]
    assert told.content_digest == MANIFEST.content_digest
    assert dataclasses.replace(MANIFEST, files=_FILES[:1]).content_digest != told.content_digest


def test_the_last_line_is_the_digest_of_all_before() -> None:
    """A manifest is JSON for people and one more line: xxh3-128 of the bytes before that line."""
    body, last = MANIFEST.to_bytes().rstrip(b"\n").rsplit(b"\n", 1)
    assert last.decode() == xxhash.xxh3_128_hexdigest(body + b"\n")
    assert json.loads(body)["iteration"] == 40


def test_every_torn_manifest_is_refused() -> None:
    """Cut anywhere but at its final newline, a manifest is refused, naming the file."""
    content = MANIFEST.to_bytes()
    for length in range(len(content) - 1):
        with pytest.raises(CorruptCheckpointError, match=r"^m: does not match the digest"):
            Manifest.from_bytes(content[:length], "m")


def test_every_altered_byte_is_refused() -> None:
    """One flipped bit in any byte of the record is refused."""
    content = MANIFEST.to_bytes()
    for position in range(len(content) - 1):
        altered = bytearray(content)
        altered[position] ^= 1
        with pytest.raises(CorruptCheckpointError):
            Manifest.from_bytes(bytes(altered), "m")


def _values(**changes: object) -> dict[str, object]:
    return {**dataclasses.asdict(MANIFEST), **changes}


def _file(**changes: object) -> list[dict[str, object]]:
    return [{**dataclasses.asdict(_FILES[0]), **changes}]


REFUSED = [
    (_values(format=None), "m: is not a manifest: format is None"),
    (_values(format=0), "m: is not a manifest: format is 0"),
    (_values(format=True), "m: is not a manifest: format is True"),
    (_values(format="2"), "m: is not a manifest: format is '2'"),
    (_values(requires="all"), "m: is not a manifest: requires is 'all'"),
    (_values(parent="base"), "m: is not a manifest: parent is no mapping"),
    ([], "m: is not a manifest"),
    ({}, "m: is not a manifest"),
    (_values(files=[{"path": "a"}]), "m: is not a manifest"),
    (_values(files=None), "m: is not a manifest"),
    (_values(iteration="40"), "m: is not a manifest"),
    (_values(sequence=None), "m: is not a manifest"),
    (_values(files=_file(size_bytes="1")), "m: is not a manifest"),
    (_values(files=_file(blocks=["no digest"])), "m: is not a manifest"),
    *[
        (_values(files=_file(path=path)), "outside the checkpoint")
        for path in ("../a", "/a", "a/../../b", "", "a\\b", "a//b", "./a", "a\0", "a/", "\ud800")
    ],
    (_values(files=_file(path=7)), "m: "),
]


@pytest.mark.parametrize(("values", "reason"), REFUSED)
def test_a_record_that_is_no_manifest_is_refused(values: object, reason: str) -> None:
    """Missing or wrong fields, and paths that leave the checkpoint, are refused."""
    with pytest.raises(CorruptCheckpointError, match=r"^m: ") as caught:
        Manifest.from_bytes(_sealed(values), "m")
    assert reason in str(caught.value)


LATER = [
    (_values(format=3), "m is of format 3; this version of holdfast reads up to format 2"),
    (_values(format=10**6, files=None), "format 1000000"),
    (_values(requires=["chunked", "sparse"]), "format 2 and requires 'chunked', 'sparse'"),
]


@pytest.mark.parametrize(("values", "reason"), LATER)
def test_a_record_of_a_later_version_is_no_damage(values: object, reason: str) -> None:
    """A later format, or a feature that a reader must know, is told with both versions."""
    with pytest.raises(FormatTooNewError) as caught:
        Manifest.from_bytes(_sealed(values), "m")
    assert reason in str(caught.value)
    assert caught.value.sequence == MANIFEST.sequence


def test_a_later_record_may_be_sealed_in_another_way() -> None:
    """A whole record of a later format is no damage, whatever it ends with; ours always is."""
    for content in (json.dumps(_values(format=3)).encode(), json.dumps({"format": 4}).encode()):
        with pytest.raises(FormatTooNewError):
            Manifest.from_bytes(content, "m")
    for content in (json.dumps(_values()).encode(), b"{}", b'{"format": "2"}', b"[2]"):
        with pytest.raises(CorruptCheckpointError, match="digest in its last line"):
            Manifest.from_bytes(content, "m")


def test_fields_of_a_later_version_are_ignored() -> None:
    """A field that this version does not know, of the record or of a file in it, is left out."""
    files = [{**each, "colour": "red"} for each in _values()["files"]]  # type: ignore[attr-defined]
    values = _values(colour="red", files=files, requires=[])
    assert Manifest.from_bytes(_sealed(values), "m") == MANIFEST


def test_a_record_keeps_the_checkpoint_that_its_run_began_from() -> None:
    """The parent of a run is given back; without one nothing is written of it."""
    parent = {"path": "/base/iter_0000010", "run_id": "base", "iteration": 10, "what": "weights"}
    began = dataclasses.replace(MANIFEST, parent=parent)
    assert Manifest.from_bytes(began.to_bytes(), "m") == began
    assert b"parent" not in MANIFEST.to_bytes()


def test_a_deeply_nested_record_is_refused() -> None:
    """A hostile record that exhausts the JSON parser is refused like any other."""
    body = b"[" * 100_000 + b"\n"
    content = body + xxhash.xxh3_128_hexdigest(body).encode() + b"\n"
    with pytest.raises(CorruptCheckpointError, match="is not a manifest"):
        Manifest.from_bytes(content, "m")


SIZES = [(0, 0), (1, 1), (BLOCK_BYTES, 1), (BLOCK_BYTES + 1, 2), (2 * BLOCK_BYTES, 2)]


@pytest.mark.parametrize(("size_bytes", "blocks"), SIZES)
def test_a_file_digest_is_that_of_its_block_digests(size_bytes: int, blocks: int) -> None:
    """A digest is xxh3-128 over the xxh3-128 digests of 8 MiB blocks, none for an empty file."""
    content = bytes(range(251)) * (size_bytes // 251 + 1)
    content = content[:size_bytes]
    record = describe_content("a", content)
    parts = [content[at : at + BLOCK_BYTES] for at in range(0, size_bytes, BLOCK_BYTES)]
    digests = [xxhash.xxh3_128_digest(part) for part in parts]
    expected = xxhash.xxh3_128_hexdigest(b"".join(digests))
    assert record == FileRecord("a", size_bytes, expected, tuple(each.hex() for each in digests))
    assert len(record.blocks) == blocks
    assert find_difference(record, io.BytesIO(content)) is None


def test_format_1_is_pinned() -> None:
    """The digest of 8 MiB and one byte is the one that format 1 has had from the beginning."""
    record = describe_content("a", bytes((8 << 20) + 1))
    assert (record.digest, len(record.blocks)) == (PINNED_DIGEST, 2)


PINNED_DIGEST = "5ef1ff9df1b564502e5e926e4846c003"


class _Trickle(io.RawIOBase):
    """A stream that gives a few bytes at a time, as a network file system may."""

    def __init__(self, content: bytes) -> None:
        self._content = self._left = memoryview(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == io.SEEK_SET
        self._left = self._content[offset:]
        return offset

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = min(len(buffer), len(self._left), 1_000_003)
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def test_short_reads_change_no_digest() -> None:
    """Blocks are 8 MiB of the file, however few bytes a read returns."""
    content = bytes(2 * BLOCK_BYTES + 5)
    assert find_difference(describe_content("a", content), _Trickle(content)) is None


_CONTENT = bytes(BLOCK_BYTES) + b"second block"
_END = len(_CONTENT)


DIFFERENCES = [
    (b"\x01" + _CONTENT[1:], f"block 0 (bytes 0-{BLOCK_BYTES - 1}) does not match its digest"),
    (_CONTENT[:-1] + b"K", f"block 1 (bytes {BLOCK_BYTES}-{_END - 1}) does not match its digest"),
    (_CONTENT[:-1], f"block 1 (bytes {BLOCK_BYTES}-{_END - 2}) does not match its digest"),
    (_CONTENT[:BLOCK_BYTES], f"has {BLOCK_BYTES} bytes, {_END} were committed"),
    (b"", f"has 0 bytes, {_END} were committed"),
    (_CONTENT + b"x", f"block 1 (bytes {BLOCK_BYTES}-{_END}) does not match its digest"),
]


@pytest.mark.parametrize(("content", "reason"), DIFFERENCES, ids=range(len(DIFFERENCES)))
def test_a_difference_is_named_by_block_and_bytes(content: bytes, reason: str) -> None:
    """A changed, shorter or longer file is told with the first place that differs."""
    record = describe_content("a", _CONTENT)
    assert str(find_difference(record, io.BytesIO(content))) == reason


def test_bytes_behind_full_blocks_are_seen() -> None:
    """A file that goes on behind its last full block is told to be longer."""
    record = describe_content("a", bytes(BLOCK_BYTES))
    longer = io.BytesIO(bytes(BLOCK_BYTES + 1))
    assert (
        str(find_difference(record, longer)) == f"is longer than the {BLOCK_BYTES} bytes committed"
    )


def test_blocks_and_digest_must_agree() -> None:
    """A record whose block digests fit the file and whose digest does not is a difference."""
    record = dataclasses.replace(describe_content("a", b"x"), digest="0" * 32)
    expected = "its block digests do not match its digest"
    assert str(find_difference(record, io.BytesIO(b"x"))) == expected

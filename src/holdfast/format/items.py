"""One rank's side of a plan: the items of its state, what it proposes, and what it is to write.

Owns how a tensor or value is described: whole or a chunk, dense or pickled by torch, its own bytes
or an alias of another name. The description is of the current state: what is cached between saves
is compared with the live tensors each time, never assumed. Tensor types that it cannot take apart
are refused. Copies only small values.

Also owns what a rank sends about its items: the digest of their structure, which changes whenever a
plan for them would; the fixed-size record before each save; and the compact, canonical proposal, in
which what data-parallel ranks have in common is stored apart from each rank's own part. Rank 0's
side is in `plan`. Names that are per rank are proposed as such: their copies are neither divided
nor compared.
"""

from __future__ import annotations

import io
import json
import operator
import pickle
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
import xxhash
from torch.distributed.tensor import DTensor

from holdfast.format.chunks import Cut
from holdfast.format.layout import Item, containers_of, leaders_of
from holdfast.format.nondense import PLAIN_TENSORS, expanded_dims, is_dense, pickle_tensor
from holdfast.format.values import capacity_for, fill
from holdfast.torch_internals import chunks_of, local_and_spec

Source = torch.Tensor | bytes
"""A plain tensor to copy, or bytes that are a container already."""
CutOf = Callable[[str, torch.Tensor], Cut | None]
"""How a plain tensor of this name lies in a global one; None: it is the whole tensor."""


def _is_whole(_: str, __: torch.Tensor) -> None:
    return None


@dataclass(frozen=True)
class Inventory:
    """Every item that this rank could write, with its current source."""

    items: Sequence[Item]
    sources: Sequence[Source]
    """One for each item."""
    structure: bytes
    """16 bytes that stay equal as long as the items do."""


class Itemizer:
    """Describes one state at every save; descriptions of unchanged leaves are reused."""

    def __init__(self, kind_of: Callable[[Any], str] = lambda _: "") -> None:
        """`kind_of`: returns what is recorded of the kind of a leaf."""
        self._kind_of = kind_of
        self._per_rank: Collection[str] = frozenset()
        self._known: dict[str, _Known] = {}
        self._values: dict[str, _Encoded] = {}
        self._aliased: dict[tuple[str, str], Item] = {}
        self._last = _Last((), (), (), (), ())
        self._paths: Mapping[str, tuple[str | int, ...]] = {}
        self._cut_of: CutOf = _is_whole
        self._structure = b""
        self._proved: set[tuple[type, torch.layout, torch.dtype]] = set()
        """Forms of tensors that were read back from their bytes."""

    def describe(
        self,
        leaves: Mapping[str, Any],
        paths: Mapping[str, tuple[str | int, ...]],
        check: Callable[[Mapping[str, Any]], None] = lambda _: None,
        per_rank: Collection[str] = frozenset(),
        cut_of: CutOf = _is_whole,
    ) -> Inventory:
        """Return the items of a flat state, in its order; `paths` are the nested keys of each name.

        `check` may refuse leaves; it is called when a leaf's kind, size or address differs from
        last time. `per_rank`: names of which every rank writes its own copy, but for chunks of a
        distributed tensor. `cut_of`: another function than last time if its answers have changed.

        Raises:
            UnsupportedStateError: a tensor type that cannot be taken apart.
        """
        if paths is not self._paths:
            self._forget_moved(leaves, paths)
        if per_rank is not self._per_rank:
            self._forget_divided(per_rank)
        if cut_of != self._cut_of:
            self._cut_of = cut_of
            self._last = _Last((), (), (), (), ())
        if (repeated := self._repeat(leaves)) is not None:
            return repeated
        check(leaves)
        items: list[Item] = []
        sources: list[Source] = []
        addresses: list[int] = []
        by_address: dict[tuple[int, bool], list[tuple[torch.Tensor, str]]] = {}
        known: list[_Known | None] = []
        for name, leaf in leaves.items():
            first = len(items)
            for item, source in self._describe(name, leaf, paths):
                address = 0
                if isinstance(source, torch.Tensor) and source.numel():
                    address = source.data_ptr()
                    # A rank's own copy shares no bytes with what one rank writes for all.
                    place = (address, item.per_rank)
                    if place in by_address:
                        item = self._tie(item, source, by_address[place])
                    else:
                        by_address[place] = [(source, name)]
                items.append(item)
                sources.append(source)
                addresses.append(address)
            described = self._known.get(name)
            is_current = described is not None and len(described.items) == len(items) - first
            known.append(described if is_current else None)
        if len(items) != len(self._last.items) or not all(
            map(operator.is_, items, self._last.items)
        ):
            self._structure = structure_of(items)
        # Not the sources: a reference to them could keep a discarded model alive.
        uses = Counter(addresses)
        shared = [
            _place_of(source)
            if address and uses[address] > 1 and isinstance(source, torch.Tensor)
            else None
            for source, address in zip(sources, addresses, strict=True)
        ]
        self._last = _Last(tuple(leaves), known, items, addresses, shared)
        return Inventory(items, sources, self._structure)

    def _forget_moved(
        self, leaves: Mapping[str, Any], paths: Mapping[str, tuple[str | int, ...]]
    ) -> None:
        """Drop the cached descriptions of names whose nested keys have changed."""
        for name in leaves:
            known, path = self._known.get(name), tuple(paths[name])
            if known is not None and any(item.path != path for item in known.items):
                del self._known[name]
                self._values.pop(name, None)
                self._last = _Last((), (), (), (), ())
        self._paths = paths

    def _forget_divided(self, per_rank: Collection[str]) -> None:
        """Drop the cached descriptions of names that are no longer, or only now, per rank."""
        changed = {*per_rank} ^ {*self._per_rank}
        if changed:
            for name in changed:
                self._known.pop(name, None)
                self._values.pop(name, None)
            self._last = _Last((), (), (), (), ())
        self._per_rank = per_rank

    def _repeat(self, leaves: Mapping[str, Any]) -> Inventory | None:
        """Return the previous items if every leaf is unchanged; None: describe them again."""
        last = self._last
        if tuple(leaves) != last.names:
            return None
        sources: list[Source] = []
        for leaf, known in zip(leaves.values(), last.known, strict=True):
            if known is None:
                return None
            at = len(sources)  # where a leaf's first item is
            item, address, place = last.items[at], last.addresses[at], last.shared[at]
            kind = type(leaf)
            if kind is known.kind:
                source = leaf
                if kind is DTensor:
                    source, spec = local_and_spec(leaf)
                    if spec is not known.spec and spec != known.spec:
                        return None
                elif type(known.spec) is tuple and known.spec != _sharing(leaf):
                    return None
                if (
                    source.shape != known.shape
                    or source.dtype is not known.dtype
                    or source.layout is not torch.strided
                    or source.data_ptr() != address
                    or (place is not None and _place_of(source) != place)
                ):
                    return None
                if isinstance(known.spec, Cut):
                    sources += [each.local for each in known.spec.chunks(source.detach())]
                    continue
            elif known.kind is bytes and item.dtype is None:
                refilled = self._refill(item, leaf)
                if refilled is None:
                    return None
                source = refilled
            else:
                return None
            sources.append(source)
        return Inventory(last.items, sources, self._structure)

    def _refill(self, item: Item, value: Any) -> bytes | None:
        """Return the bytes of a value in the slot it had last time; None: describe it again."""
        if isinstance(value, torch.Tensor):
            return None
        encoded = self._values[item.name]
        key = pickle.dumps(value)
        if encoded.key != key:
            content = _save(value)
            if len(content) > item.capacity_bytes or self._kind_of(value) != item.kind:
                return None
            encoded = _Encoded(key, item, fill(content, item.capacity_bytes))
            self._values[item.name] = encoded
        return encoded.content

    def _describe(
        self, name: str, leaf: Any, paths: Mapping[str, tuple[str | int, ...]]
    ) -> Sequence[tuple[Item, Source]]:
        kind = type(leaf)
        if kind in PLAIN_TENSORS:
            known = self._known.get(name)
            place = self._cut_of(name, leaf)
            if (
                known is not None
                and known.kind is kind
                and known.shape == leaf.shape
                and known.dtype is leaf.dtype
                and known.device == leaf.device
                and known.spec == (_sharing(leaf) if place is None else place)
                and leaf.layout is torch.strided
            ):
                if place is None:
                    return ((known.items[0], leaf),)
                parts = [each.local for each in place.chunks(leaf.detach())]
                return tuple(zip(known.items, parts, strict=True))
        elif kind is DTensor:
            known = self._known.get(name)
            local, spec = local_and_spec(leaf)
            if (
                known is not None
                and known.kind is DTensor
                and known.shape == local.shape
                and known.dtype is local.dtype
                and known.device == local.device
                and type(local) in PLAIN_TENSORS
                and known.spec == spec
            ):
                return tuple((item, local) for item in known.items)
        elif not isinstance(leaf, torch.Tensor):
            return (self._describe_value(name, leaf, paths),)
        return self._describe_tensor(name, leaf, paths)

    def _describe_tensor(
        self, name: str, leaf: Any, paths: Mapping[str, tuple[str | int, ...]]
    ) -> Sequence[tuple[Item, Source]]:
        path = tuple(paths[name])
        found: list[tuple[Item, Source]] = []
        place = self._cut_of(name, leaf)
        size = tuple(leaf.size()) if place is None else place.size
        is_whole = place is None and not isinstance(leaf, DTensor)
        kind, per_rank = type(leaf), name in self._per_rank and is_whole
        recorded = self._kind_of(leaf)
        for offsets, lengths, local in _chunks(leaf) if place is None else place.chunks(leaf):
            local = local.detach()
            item = Item(
                name, path, local.dtype, size, offsets, lengths, per_rank=per_rank, kind=recorded
            )
            if is_dense(local):
                found.append((item, local))
            else:
                found.append(self._with_capacity(item, self._pickle(local, name)))
        if all(isinstance(source, torch.Tensor) for _, source in found):
            items = [item for item, _ in found]
            if kind in PLAIN_TENSORS:
                spec = _sharing(leaf) if place is None else place
                self._known[name] = _Known(kind, spec, leaf.shape, leaf.dtype, leaf.device, items)
            elif kind is DTensor and found:
                local, spec = local_and_spec(leaf)
                self._known[name] = _Known(
                    DTensor, spec, local.shape, local.dtype, local.device, items
                )
        return found

    def _pickle(self, tensor: torch.Tensor, name: str) -> bytes:
        """Return the bytes of a tensor that is not dense; the first of each kind is read back."""
        form = (type(tensor), tensor.layout, tensor.dtype)
        content = pickle_tensor(tensor, name, is_first=form not in self._proved)
        self._proved.add(form)
        return content

    def _describe_value(
        self, name: str, value: Any, paths: Mapping[str, tuple[str | int, ...]]
    ) -> tuple[Item, Source]:
        key = pickle.dumps(value)
        encoded = self._values.get(name)
        if encoded is None or encoded.key != key:
            item = Item(
                name,
                tuple(paths[name]),
                None,
                (),
                (),
                (),
                per_rank=name in self._per_rank,
                kind=self._kind_of(value),
            )
            item, content = self._with_capacity(item, _save(value))
            encoded = self._values[name] = _Encoded(key, item, content)
        return encoded.item, encoded.content

    def _with_capacity(self, item: Item, content: bytes) -> tuple[Item, bytes]:
        """Reuse an item's previous slot if its bytes still fit; else size one with headroom.

        Return it with bytes that fill it.
        """
        before = self._known.get(item.name)
        if before is not None and before.kind is bytes:
            (slot,) = before.items
            fits = len(content) <= slot.capacity_bytes
            if fits and replace(item, capacity_bytes=slot.capacity_bytes) == slot:
                return slot, fill(content, slot.capacity_bytes)
        slot = replace(item, capacity_bytes=capacity_for(len(content), item.name))
        self._known[item.name] = _Known(bytes, None, torch.Size(), None, None, [slot])
        return slot, fill(content, slot.capacity_bytes)

    def _tie(
        self, item: Item, source: torch.Tensor, others: list[tuple[torch.Tensor, str]]
    ) -> Item:
        """Return the item as an alias of an earlier one with the same bytes, if there is one."""
        place = _place_of(source)
        for other, name in others:
            if _place_of(other) == place:
                key = (item.name, name)
                tied = self._aliased.get(key)
                if tied is None or replace(item, alias_of=name) != tied:
                    tied = self._aliased[key] = replace(item, alias_of=name)
                return tied
        others.append((source, item.name))
        return item


@dataclass(frozen=True)
class _Known:
    """What a name was when it was described; the items are reusable while all of it matches."""

    kind: type
    spec: Any
    """Of a DTensor: how it is laid out. Of a plain tensor: its expanded dimensions, or None."""
    shape: torch.Size
    dtype: torch.dtype | None
    device: torch.device | None
    items: Sequence[Item]


@dataclass(frozen=True)
class _Last:
    """The previous description: names, what each was, and the address of its bytes."""

    names: tuple[str, ...]
    known: Sequence[_Known | None]
    items: Sequence[Item]
    addresses: Sequence[int]
    shared: Sequence[tuple[Any, ...] | None]
    """The view of the bytes (dtype, shape, stride), where several names share one address."""


@dataclass(frozen=True)
class _Encoded:
    key: bytes
    item: Item
    content: bytes


def _chunks(
    leaf: torch.Tensor,
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], torch.Tensor]]:
    """Yield offsets, lengths and local tensor of what this rank holds of a tensor."""
    if not isinstance(leaf, DTensor):
        yield (0,) * leaf.dim(), tuple(leaf.size()), leaf
    elif leaf.device_mesh.get_coordinate() is not None:
        for (offsets, sizes), local in zip(chunks_of(leaf), [leaf.to_local()], strict=True):
            yield tuple(offsets), tuple(sizes), local


def _sharing(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return the dimensions along which elements share memory, which its kind tells; None: none."""
    return expanded_dims(tensor) or None


def _save(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _place_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        tensor.device,
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.is_conj(),  # a lazy conjugate or negative shares its source's memory
        tensor.is_neg(),
    )


PROPOSAL_HEADER = struct.Struct("<16sQQ")
"""Structure, bytes of the table, number of items."""
NO_PLAN = bytes(16)
"""Sent instead of a plan by a rank that has none for its current structure."""
RECORD_MARK = b"holdfst2"
_RECORD = struct.Struct("<8s16s16s")


def pack_record(structure: bytes, plan: bytes) -> bytes:
    """Return what a rank sends before each save, to find out whether planning is needed.

    `structure`: of the state it is about to save. `plan`: that it holds for it, or `NO_PLAN`.
    """
    return _RECORD.pack(RECORD_MARK, structure, plan)


def structure_of(items: Sequence[Item]) -> bytes:
    """Return a 16-byte digest of everything about the items that a plan depends on."""
    digest = xxhash.xxh3_128(_table_of(items))
    digest.update(_chunks_of(items))
    digest.update(json.dumps([(item.capacity_bytes, item.alias_of) for item in items]).encode())
    return digest.digest()


def propose(items: Sequence[Item]) -> bytes:
    """Return what the planner must know about the items of one rank.

    Raises:
        ValueError: items contradict themselves or one another.
    """
    leaders = leaders_of(items)
    slot_bytes = [
        item.capacity_bytes if container is None else container.size_bytes
        for item, container in zip(items, containers_of(items), strict=True)
    ]
    table = _table_of(items)
    header = PROPOSAL_HEADER.pack(structure_of(items), len(table), len(items))
    return b"".join((header, table, _chunks_of(items), _int64(slot_bytes), _int64(leaders)))


def _table_of(items: Sequence[Item]) -> bytes:
    """Encode what data-parallel ranks have in common: names, paths, kinds, dtypes, global sizes."""
    codes: dict[torch.dtype | None, int] = {}
    kinds: dict[str, int] = {}
    described = {
        "names": [item.name for item in items],
        "paths": [
            (position, item.path)
            for position, item in enumerate(items)
            if item.path != tuple(item.name.split("."))
        ],
        "codes": [codes.setdefault(item.dtype, len(codes)) for item in items],
        "dtypes": [None if dtype is None else str(dtype).removeprefix("torch.") for dtype in codes],
        "sizes": [item.size for item in items],
        "kind_codes": [kinds.setdefault(item.kind, len(kinds)) for item in items],
        "kinds": [*kinds],
        "per_rank": [position for position, item in enumerate(items) if item.per_rank],
    }
    return json.dumps(described, separators=(",", ":"), check_circular=False).encode("ascii")


def _chunks_of(items: Sequence[Item]) -> bytes:
    parts = chain((item.offsets for item in items), (item.lengths for item in items))
    return _int64(list(chain.from_iterable(parts)))


def _int64(numbers: Sequence[int]) -> bytes:
    return np.array(numbers, dtype=np.int64).tobytes()


def choose(items: Sequence[Item], share: bytes) -> list[Item]:
    """Return the items that a rank writes, from its share of a decision.

    Aliases of an item that another rank writes become independent items.

    Raises:
        ValueError: the share is for a different number of items.
    """
    if len(share) != -(-len(items) // 8):
        raise ValueError(f"the share is {len(share)} bytes, not one bit for {len(items)} items")
    mask = np.unpackbits(np.frombuffer(share, dtype=np.uint8), count=len(items)).tolist()
    chosen = []
    for item, leader, is_chosen in zip(items, leaders_of(items), mask, strict=True):
        if not is_chosen:
            continue
        if item.alias_of is not None:
            name = items[leader].name if mask[leader] else None
            item = item if name == item.alias_of else replace(item, alias_of=name)
        chosen.append(item)
    return chosen

"""What each saved value is, beside its name, size and dtype: recorded at the save.

Owns the kind of a leaf (device kind, layout, placements on a mesh, subclass, expanded dimensions)
as canonical JSON, and its comparison with that of a live object. Promises that equal kinds have
equal JSON, and that fields of a later version are ignored. Makes no tensors: `state.targets` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Placement

from holdfast.format.nondense import (
    PLAIN_TENSORS,
    classes_in,
    expanded_dims,
    is_dense,
    name_of,
)
from holdfast.state.model import MODEL
from holdfast.state.naming import PARAMETERS, STATE
from holdfast.torch_internals import local_of

TENSOR, DTENSOR, SUBCLASS, VALUE = "tensor", "dtensor", "subclass", "value"
_STRIDED = "strided"


@dataclass(frozen=True)
class Kind:
    """What a saved value is, apart from its size and dtype."""

    type: str
    """`tensor`, `dtensor`, `subclass` or `value`."""
    device: str = "cpu"
    """The type of the device alone."""
    layout: str = _STRIDED
    placements: tuple[str, ...] = ()
    mesh_shape: tuple[int, ...] = ()
    mesh_names: tuple[str, ...] | None = None
    class_name: str | None = None
    """Of a subclass; of a DTensor, that of its local part."""
    parts: tuple[str, ...] = ()
    """Further subclasses that it consists of."""
    scheme: str | None = None
    """Of a quantised tensor."""
    expanded: tuple[int, ...] = ()
    """Dimensions along which all elements are one in memory."""

    @classmethod
    def of(cls, leaf: Any) -> Kind:
        """Return the kind of a live value."""
        if not isinstance(leaf, torch.Tensor):
            return cls(VALUE)
        if _is_plain(leaf):
            return _plain(leaf.device.type)
        local = local_of(leaf)
        classes = [name_of(each) for each in classes_in(local)]
        if not classes and type(local) not in PLAIN_TENSORS:
            classes = [name_of(type(local))]
        fields: dict[str, Any] = {
            "device": local.device.type,
            "layout": str(local.layout).removeprefix("torch."),
            "class_name": classes[0] if classes else None,
            "parts": tuple(classes[1:]),
        }
        if not classes:
            if local.is_quantized:
                fields["scheme"] = str(local.qscheme()).removeprefix("torch.")
            elif local.layout is torch.strided and not isinstance(leaf, DTensor):
                fields["expanded"] = expanded_dims(local)
        if isinstance(leaf, DTensor):
            mesh = leaf.device_mesh
            names = mesh.mesh_dim_names
            return cls(
                DTENSOR,
                placements=tuple(map(str, leaf.placements)),
                mesh_shape=tuple(mesh.shape),
                mesh_names=None if names is None else tuple(names),
                **fields,
            )
        return cls(SUBCLASS if classes else TENSOR, **fields)

    @classmethod
    def parse(cls, text: str) -> Kind | None:
        """Return a recorded kind; None: nothing is recorded. Unknown fields are ignored.

        Raises:
            ValueError: it is no kind.
        """
        return _parse(text) if text else None

    def to_json(self) -> str:
        """Return it as canonical JSON."""
        if self.type == VALUE:
            return _VALUE
        found: dict[str, Any] = {"type": self.type, "device": self.device, "layout": self.layout}
        if self.type == DTENSOR:
            names = None if self.mesh_names is None else list(self.mesh_names)
            found["placements"] = list(self.placements)
            found["mesh"] = {"shape": list(self.mesh_shape), "names": names}
        if self.class_name is not None:
            found["class"] = self.class_name
        if self.parts:
            found["parts"] = list(self.parts)
        if self.scheme is not None:
            found["scheme"] = self.scheme
        if self.expanded:
            found["expanded"] = list(self.expanded)
        return json.dumps(found, separators=(",", ":"), sort_keys=True)

    @property
    def is_dense(self) -> bool:
        """Whether what each rank holds is plain memory."""
        return self.class_name is None and self.scheme is None and self.layout == _STRIDED

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold different parts of it."""
        return any(each != "R" for each in self.placements)

    @property
    def class_names(self) -> tuple[str, ...]:
        """All subclasses that it needs."""
        return () if self.class_name is None else (self.class_name, *self.parts)

    def __str__(self) -> str:
        if self.type == VALUE:
            return "a plain value"
        inner = "dense tensor"
        if self.class_name is not None:
            inner = self.class_name.rpartition(".")[2]
        elif self.scheme is not None:
            inner = "quantised tensor"
        elif self.layout != _STRIDED:
            inner = f"{self.layout} tensor"
        elif self.expanded:
            inner = "expanded tensor"
        if self.type != DTENSOR:
            return f"an {inner}" if inner.startswith("e") else f"a {inner}"
        kept = "" if inner == "dense tensor" else f" of {inner}"
        return f"a DTensor{kept} ({', '.join(self.placements)}) on a mesh {list(self.mesh_shape)}"

    def is_laid_out_like(self, other: Kind) -> bool:
        """Whether each rank holds the same part of both."""
        return (self.type == DTENSOR, self.placements, self.mesh_shape) == (
            other.type == DTENSOR,
            other.placements,
            other.mesh_shape,
        )


_VALUE = '{"type":"value"}'


@lru_cache(maxsize=4096)
def _parse(text: str) -> Kind:
    found = json.loads(text)
    mesh = found.get("mesh") or {"shape": (), "names": None}
    names = mesh.get("names")
    return Kind(
        str(found["type"]),
        str(found.get("device", "cpu")),
        str(found.get("layout", _STRIDED)),
        tuple(map(str, found.get("placements", ()))),
        tuple(map(int, mesh["shape"])),
        None if names is None else tuple(map(str, names)),
        found.get("class"),
        tuple(map(str, found.get("parts", ()))),
        found.get("scheme"),
        tuple(map(int, found.get("expanded", ()))),
    )


def kind_of(leaf: Any) -> str:
    """Return the kind of a live value as canonical JSON."""
    if not isinstance(leaf, torch.Tensor):
        return _VALUE
    if _is_plain(leaf):
        return _plain_json(leaf.device.type)
    return Kind.of(leaf).to_json()


def _is_plain(leaf: torch.Tensor) -> bool:
    """Whether only the device is to be said of it, as of most: loads ask for thousands."""
    return is_dense(leaf) and not expanded_dims(leaf)


@lru_cache(maxsize=64)
def _plain(device: str) -> Kind:
    return Kind(TENSOR, device)


@lru_cache(maxsize=64)
def _plain_json(device: str) -> str:
    return _plain(device).to_json()


def find_model_difference(live: Any, kind: Kind | None) -> str | None:
    """Return how a saved entry of a model's state differs in kind from the live one; None: not."""
    if kind is None or not isinstance(live, torch.Tensor) or kind.type == VALUE:
        return None
    here = Kind.of(live)
    if kind.class_names != here.class_names or not _agree_on_memory(kind, here):
        return f"is {kind}, here {here}"
    if not kind.is_dense and not kind.is_laid_out_like(here):
        return f"is {kind}, which cannot be divided otherwise; here {here}"
    return None


def _agree_on_memory(kind: Kind, here: Kind) -> bool:
    same = (kind.scheme, kind.layout) == (here.scheme, here.layout)
    # Into an expanded tensor goes only what was the same along these dimensions.
    return same and set(here.expanded) <= set(kind.expanded)


def names_of_shards(
    leaves: Mapping[str, Any], paths: Mapping[str, Sequence[Any]]
) -> frozenset[str]:
    """Return the names of plain optimizer state whose values are those of one shard.

    That is a tensor of one or more dimensions, no DTensor, beside a parameter that is sharded: no
    other rank has the same, and nothing says how the ranks' tensors would make a whole.
    """
    sharded = {
        name
        for name, value in leaves.items()
        if isinstance(value, DTensor) and not all(map(Placement.is_replicate, value.placements))
    }
    if not sharded:
        return frozenset()
    return frozenset(
        name
        for name, value in leaves.items()
        if isinstance(value, torch.Tensor)
        and value.dim() > 0
        and not isinstance(value, DTensor)
        and paths[name][1:2] == (STATE,)
        and not {
            f"{MODEL}{paths[name][2]}",
            f"{paths[name][0]}.{PARAMETERS}.{paths[name][2]}",
        }.isdisjoint(sharded)
    )


def is_of_shard(kind: Kind | None, parameter: Kind | None, size: Sequence[int]) -> bool:
    """Whether plain optimizer state holds values of one shard of its parameter alone."""
    return (
        kind is not None
        and parameter is not None
        and kind.type in (TENSOR, SUBCLASS)
        and len(size) > 0
        and parameter.is_sharded
    )


def find_changed(given: Mapping[str, Any], live: Mapping[str, Any]) -> str | None:
    """Return the first name whose live value is of another kind than what was given, and how.

    Devices may differ: optimizers move state to that of its parameter.
    """
    for name, value in given.items():
        found = live.get(name)
        if found is value or not isinstance(value, torch.Tensor):
            continue
        wanted = f"{replace(Kind.of(value), device='')} of {value.dtype}"
        if not isinstance(found, torch.Tensor):
            return f"{name}, given as {wanted}, is a {type(found).__name__}"
        is_now = f"{replace(Kind.of(found), device='')} of {found.dtype}"
        if is_now != wanted or found.size() != value.size():
            return f"{name}, given as {wanted}, is {is_now}"
    return None

"""What saved tensors are read into, so that each comes back as the kind that was recorded.

Owns the choice: the live tensor itself where it is of the recorded kind, otherwise one that is made
here. An optimizer that has no state yet cannot say what its state is: what is made for it has the
recorded kind where its parameter is laid out as it was, and otherwise follows the parameter.
Promises that a kind is guessed, by sizes, only where the checkpoint records none, and that
`differences` touches and allocates nothing. Refuses what cannot be given back exactly: state of one
shard in another sharding, a subclass that was sharded otherwise, a class of a module that is not
loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch.distributed import tensor as distributed_tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from holdfast.errors import UnsupportedStateError
from holdfast.format.nondense import (
    PLAIN_TENSORS,
    ReadWhole,
    classes_in,
    expanded_dims,
    find_class,
    is_dense,
    move,
    overwrite,
    recorded_classes,
)
from holdfast.state.compare import is_extra
from holdfast.state.kinds import (
    DTENSOR,
    TENSOR,
    VALUE,
    Kind,
    find_model_difference,
    is_of_shard,
)
from holdfast.state.model import MODEL
from holdfast.state.naming import PARAMETERS, STATE
from holdfast.state.optimizer import FlattenedOptimizers, LiveOptimizers
from holdfast.state.saved import SavedTensors, look_up
from holdfast.torch_internals import chunks_of, local_of


@dataclass(frozen=True)
class Target:
    """What a saved tensor is read into."""

    tensor: torch.Tensor
    finish: Callable[[], torch.Tensor] | None = None
    """Returns, once it was read, what the live object is given; None: the tensor itself."""


class KindMismatchError(Exception):
    """A saved tensor cannot be given back here; the message is to follow its name."""


def model_target(live: torch.Tensor, source: TensorStorageMetadata) -> Target:
    """Return what to read a saved entry of a model's state into; its kind was compared before."""
    local = local_of(live)
    if not is_dense(local):
        target = _read_whole(live, source, classes_in(local))
        return Target(target, lambda: _overwrite(live, target))
    if type(live) in PLAIN_TENSORS and (dims := expanded_dims(live)):
        dense = torch.empty(live.size(), dtype=live.dtype, device=live.device)
        return Target(dense, lambda: _fill_expanded(live, dense, dims))
    return Target(live)


def _overwrite(live: torch.Tensor, target: ReadWhole) -> torch.Tensor:
    if target.value is not None:  # this rank holds a part
        overwrite(local_of(live), target.value)
    return live


@torch.no_grad()
def _fill_expanded(live: torch.Tensor, dense: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    one, value = live.detach(), dense
    for each in dims:
        one, value = one.narrow(each, 0, 1), value.narrow(each, 0, 1)
    one.copy_(value)
    return live


def _read_whole(
    like: torch.Tensor, source: TensorStorageMetadata, classes: Sequence[type]
) -> ReadWhole:
    offsets: Sequence[int] = (0,) * len(source.size)
    lengths: Sequence[int] = source.size
    if isinstance(like, DTensor) and like.device_mesh.get_coordinate() is not None:
        ((offsets, lengths),) = chunks_of(like)
    return ReadWhole.of(source.size, source.properties.dtype, offsets, lengths, classes)


@dataclass(frozen=True)
class StateEntry:
    """One saved tensor of an optimizer's state, and what is known here of its place."""

    key: str | int
    """In the state of its parameter, or the last one in what is nested there."""
    source: TensorStorageMetadata
    kind: Kind | None
    """None: the checkpoint records none."""
    parameter: torch.Tensor | None
    """The live one; None: it is not in the model's state dict."""
    parameter_kind: Kind | None
    """That of the saved parameter."""
    present: Any
    """The live entry, if there is one."""
    is_of_shard: bool
    """Whether it is the saving rank's own, and not shared by all ranks."""
    size_of: Callable[[torch.Tensor], torch.Size] = torch.Tensor.size
    """Returns the size of the global tensor that a live one is a part of."""

    def target(self) -> Target:
        """Return what it is to be read into; allocates memory.

        Raises:
            KindMismatchError: it cannot be given back here.
        """
        self.check()
        kind = self.kind
        if kind is None:
            return Target(self._guess())
        if not kind.is_dense:
            return self._whole(kind)
        size, dtype = self.source.size, self.source.properties.dtype
        present = self.present
        if (
            isinstance(present, torch.Tensor)
            and self.size_of(present) == size
            and present.dtype == dtype
            and not (here := Kind.of(present)).expanded
            and self._is_as_wanted(here, kind)
        ):
            return Target(present)
        if kind.expanded:
            dense = torch.empty(size, dtype=dtype, device=self._device(kind))
            return Target(dense, lambda: _expand(dense, kind.expanded))
        mesh_of, placements = self._placed(kind)
        if mesh_of is None:
            return Target(self._plain(kind))
        parameter = self.parameter
        if (
            isinstance(parameter, DTensor)
            and mesh_of is parameter
            and parameter.size() == size
            and placements == tuple(parameter.placements)
        ):
            return Target(torch.empty_like(parameter, dtype=dtype, requires_grad=False))
        made = distributed_tensor.empty(
            *size, dtype=dtype, device_mesh=mesh_of.device_mesh, placements=placements
        )
        return Target(made)

    def check(self) -> None:
        """Raise what prevents that it is given back; touches and allocates nothing.

        Raises:
            KindMismatchError: the message is to follow its name.
        """
        kind, parameter = self.kind, self.parameter
        if kind is None or kind.type == VALUE:
            return
        for name in kind.class_names:
            if find_class(name) is None:
                module = name.rpartition(".")[0]
                raise KindMismatchError(
                    f"is of the class {name}, and {module} is not loaded: import it before loading"
                )
        if parameter is None or self.parameter_kind is None:
            return
        if self._is_laid_out_as_saved:
            self._placed(kind)
            return
        here = Kind.of(parameter)
        if self.is_of_shard:
            raise KindMismatchError(
                "is plain state of one shard of its parameter, which was "
                f"{self.parameter_kind} and is {here} here: no rank knows how to divide it. Load "
                "with as many ranks and the same sharding, or keep the state as DTensors"
            )
        if not kind.is_dense:
            raise KindMismatchError(
                f"is {kind}, which cannot be divided otherwise; its parameter is {here} here. Load "
                "with as many ranks and the same sharding"
            )

    def _guess(self) -> torch.Tensor:
        """Return a tensor placed as the live entry, or as the parameter if the size agrees."""
        size, dtype = self.source.size, self.source.properties.dtype
        present, parameter = self.present, self.parameter
        if (
            isinstance(present, torch.Tensor)
            and self.size_of(present) == size
            and present.dtype == dtype
        ):
            return present
        is_like = isinstance(parameter, torch.Tensor) and self.size_of(parameter) == size
        if is_like and not (self.key == _COUNT and not size):
            assert parameter is not None
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return torch.empty(size, dtype=dtype, device="cpu")

    def _whole(self, kind: Kind) -> Target:
        classes = [found for name in kind.class_names if (found := find_class(name)) is not None]
        parameter, device = self.parameter, self._device(kind)
        if kind.type != DTENSOR:
            target = _read_whole(torch.empty(0), self.source, classes)
            return Target(target, lambda: _on_device(target, device))
        mesh_of, placements = self._placed(kind)
        assert mesh_of is not None
        like = mesh_of
        if tuple(like.placements) != placements or like.size() != self.source.size:
            like = distributed_tensor.empty(
                *self.source.size,
                dtype=torch.uint8,
                device_mesh=mesh_of.device_mesh,
                placements=placements,
            )
        target = _read_whole(like, self.source, classes)
        is_fit = parameter is not None and parameter.size() == self.source.size
        stride = (parameter if is_fit and parameter is not None else like).stride()
        return Target(
            target,
            lambda: DTensor.from_local(
                _on_device(target, device),
                mesh_of.device_mesh,
                placements,
                run_check=False,
                shape=self.source.size,
                stride=stride,
            ),
        )

    def _device(self, kind: Kind) -> torch.device:
        """Return the live parameter's device where the entry was on its parameter's."""
        if self.parameter is None:
            return torch.device("cpu")
        here = local_of(self.parameter).device
        saved = self.parameter_kind
        if saved is None or kind.device == saved.device or kind.device == here.type:
            return here
        return torch.device(kind.device if kind.device == "cpu" else here)

    def _is_as_wanted(self, here: Kind, kind: Kind) -> bool:
        """Whether a live entry is what is to be restored: as recorded, or as the run has it now."""
        if here.class_names or not here.is_dense:
            return False
        if self._is_laid_out_as_saved:
            return kind.is_laid_out_like(here)
        return True

    @cached_property
    def _is_laid_out_as_saved(self) -> bool:
        parameter, saved = self.parameter, self.parameter_kind
        return parameter is None or saved is None or saved.is_laid_out_like(Kind.of(parameter))

    def _plain(self, kind: Kind) -> torch.Tensor:
        size, dtype, parameter = self.source.size, self.source.properties.dtype, self.parameter
        device = self._device(kind)
        if (
            parameter is not None
            and type(parameter) in PLAIN_TENSORS
            and (self.size_of(parameter) == size)
        ):
            return torch.empty_like(parameter, dtype=dtype, device=device, requires_grad=False)
        return torch.empty(size, dtype=dtype, device=device)

    def _placed(self, kind: Kind) -> tuple[DTensor | None, tuple[Placement, ...]]:
        """Return a live DTensor on whose mesh the entry belongs, and its placements; None: plain.

        Raises:
            KindMismatchError: its placements cannot be made here.
        """
        parameter = self.parameter
        if self._is_laid_out_as_saved:
            if kind.type != DTENSOR:
                return None, ()
            for like in (parameter, self.present):
                if isinstance(like, DTensor) and tuple(like.device_mesh.shape) == kind.mesh_shape:
                    return like, _placements(kind, like)
            raise KindMismatchError(
                f"is {kind}, and there is no such mesh here: its parameter is no DTensor"
            )
        # Divided otherwise than it was: as the parameter is, along the dimensions they share.
        size = self.source.size
        if not isinstance(parameter, DTensor) or self._is_count(kind):
            return None, ()
        shared = [
            at
            for at in range(len(size))
            if len(size) == parameter.dim() and size[at] == parameter.size(at)
        ]
        placements: tuple[Placement, ...] = tuple(
            each if isinstance(each, Shard) and each.dim in shared else Replicate()
            for each in parameter.placements
        )
        if len(shared) == parameter.dim():
            placements = tuple(parameter.placements)
        return parameter, placements

    def _is_count(self, kind: Kind) -> bool:
        """Whether it is a plain number beside a parameter that was divided, or of no dimension."""
        if self.source.size or kind.type == DTENSOR:
            return False
        assert self.parameter is not None
        return self.parameter.dim() > 0 or self.key == _COUNT


_COUNT = "step"
"""The one entry of torch's optimizers that never follows its parameter."""


def _placements(kind: Kind, like: DTensor) -> tuple[Placement, ...]:
    """Return recorded placements as objects.

    Raises:
        KindMismatchError: one is of a kind that only its parameter could show, and does not.
    """
    known: dict[str, Placement] = {str(each): each for each in like.placements}
    found = []
    for text in kind.placements:
        if text not in known:
            if text == "R":
                known[text] = Replicate()
            elif text.startswith("S(") and text[2:-1].isdecimal():
                known[text] = Shard(int(text[2:-1]))
            else:
                raise KindMismatchError(f"is {kind}, and {text} cannot be made here")
        found.append(known[text])
    return tuple(found)


def _on_device(target: ReadWhole, device: torch.device) -> torch.Tensor:
    assert target.value is not None
    return move(target.value, device)


def _expand(dense: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    one = dense
    for each in dims:
        one = one.narrow(each, 0, 1)
    return one.clone().expand(dense.size())


class Targets:
    """The targets of one load: of a live model, and of the live state of its optimizers."""

    def __init__(
        self,
        model: Mapping[str, Any],
        optimizers: LiveOptimizers | None,
        saved: SavedTensors,
        takes: Callable[[Sequence[Any]], bool],
        size_at: Callable[[Sequence[Any], torch.Tensor], torch.Size],
    ) -> None:
        """Make nothing yet.

        `model`: by flat name. `takes`: whether saved state with
        these nested keys has a place here. `size_at`: of the global tensor that a live one with
        these keys is a part of.
        """
        self._model = model
        self._optimizers = optimizers
        self.saved = saved
        self._takes = takes
        self._size_at = size_at
        self._finish: dict[str, Callable[[], torch.Tensor]] = {}
        self._entries: dict[str, StateEntry | None] = {}

    def differences(self) -> list[str]:
        """Return what cannot be given back as it was, with its name; touches nothing."""
        found = []
        for name, source in self.saved.tensors.items():
            path = self.saved.key_paths[name]
            if not self._takes(path) or is_extra(name):
                continue
            problem = None
            if path[0] == "model":
                problem = find_model_difference(self._model[MODEL + path[1]], self._kind(name))
            elif path[1] == PARAMETERS:
                live = self._outside(path[0])[path[2]]
                problem = find_model_difference(live, self._kind(name))
            elif (entry := self._entry(name, path, source)) is not None:
                try:
                    entry.check()
                except KindMismatchError as error:
                    problem = str(error)
            if problem is not None:
                found.append(f"{name} {problem}")
        return found

    def make(self) -> dict[str, torch.Tensor]:
        """Return the tensors to fill, by flat name: live ones where they fit, else new ones."""
        found = {}
        self._finish = {}
        for name, source in self.saved.tensors.items():
            path = self.saved.key_paths[name]
            if not self._takes(path):  # as the comparison has said
                continue
            target = self._target(name, path, source)
            found[name] = target.tensor
            if target.finish is not None:
                self._finish[name] = target.finish
        return found

    def finish(self, filled: Mapping[str, Any]) -> dict[str, Any]:
        """Return what live objects are given, once the targets are filled."""
        return {
            name: self._finished(name) if name in self._finish else each
            for name, each in filled.items()
        }

    def _finished(self, name: str) -> torch.Tensor:
        try:
            return self._finish[name]()
        except UnsupportedStateError as error:
            raise UnsupportedStateError(f"{name}: {error}") from error

    def _target(self, name: str, path: Sequence[Any], source: TensorStorageMetadata) -> Target:
        live: Any = None
        if path[0] == "model" and is_extra(path[1]):
            return self._extra_target(name, source)
        if path[0] == "model":
            live = self._model[MODEL + path[1]]
        elif path[1] == PARAMETERS:
            live = self._outside(path[0])[path[2]]
        elif (entry := self._entry(name, path, source)) is not None:
            return entry.target()
        if isinstance(live, torch.Tensor):
            return model_target(live, source)
        return Target(torch.empty(source.size, dtype=source.properties.dtype, device="cpu"))

    def _extra_target(self, name: str, source: TensorStorageMetadata) -> Target:
        """Return a new tensor for a part of a module's extra state, which the module may copy."""
        kind = self._kind(name) or Kind(TENSOR)
        if kind.type != DTENSOR and not kind.is_dense:
            classes = recorded_classes(self.saved.kinds[name], name)
            whole = _read_whole(torch.empty(0), source, classes)
            return Target(whole, partial(_on_device, whole, torch.device("cpu")))
        dense = torch.empty(source.size, dtype=source.properties.dtype, device="cpu")
        return Target(dense, partial(_expand, dense, kind.expanded) if kind.expanded else None)

    def _entry(
        self, name: str, path: Sequence[Any], source: TensorStorageMetadata
    ) -> StateEntry | None:
        if name not in self._entries:
            self._entries[name] = self._find_entry(name, path, source)
        return self._entries[name]

    def _find_entry(
        self, name: str, path: Sequence[Any], source: TensorStorageMetadata
    ) -> StateEntry | None:
        if self._optimizers is None or path[1] != STATE or len(path) < 4:
            return None
        root, _, owner, *keys = path
        outside = self._outside(root)
        place = f"{root}.{PARAMETERS}.{owner}" if owner in outside else MODEL + owner
        parameter = self._model.get(MODEL + owner, outside.get(owner))
        kind, of_parameter = self._kind(name), self._kind(place)
        if isinstance(self._optimizers, FlattenedOptimizers):
            kind = None  # torch's setters take it as the parameter is shown, and convert it
        was = self.saved.tensors.get(place)
        if (
            isinstance(parameter, torch.Tensor)
            and was is not None
            and was.properties.dtype == source.properties.dtype != parameter.dtype
        ):  # the parameter is converted, and its steps want state of its own type
            properties = replace(source.properties, dtype=parameter.dtype)
            source = replace(source, properties=properties)
        return StateEntry(
            keys[-1],
            source,
            kind,
            parameter if isinstance(parameter, torch.Tensor) else None,
            of_parameter,
            look_up(self._optimizers.state(root).get(owner), keys),
            is_of_shard(kind, of_parameter, source.size),
            partial(self._size_at, path),
        )

    def _outside(self, root: str) -> Mapping[str, torch.Tensor]:
        return {} if self._optimizers is None else self._optimizers.outside(root)

    def _kind(self, name: str) -> Kind | None:
        return Kind.parse(self.saved.kinds.get(name, ""))

"""Which tensors of a model a save writes, where it writes a part: adapters without their base.

Owns the meaning of `save_filter`. What is left out is taken from the base when the checkpoint is
loaded, so it must be what the base has: promises to refuse by name a filter that leaves out what
training changes, or what the base lacks. Optimizer state, and everything that is no tensor of the
model, is always written. Decides once for each structure of the state, not at every save.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from holdfast.errors import UnsupportedStateError
from holdfast.format.dcp import KeyPath
from holdfast.messages import name_first
from holdfast.state.bindings import Leaves, names_in_memory
from holdfast.state.guard import resolve
from holdfast.state.model import MODEL

Predicate = Callable[[str, tuple[int, ...], bool], Any]
"""Whether a tensor is saved: by its name in the model, its shape, and whether it needs a gradient.
"""
_ADAPTERS = ("lora", "adapter", "ia3", "prompt")


def is_trainable(name: str, shape: tuple[int, ...], requires_grad: bool) -> bool:
    """Whether a tensor needs a gradient."""
    return requires_grad


def is_adapter(name: str, shape: tuple[int, ...], requires_grad: bool) -> bool:
    """Whether a part of a name is one that adapters have: lora, adapter, ia3, prompt."""
    return any(part.lower().startswith(_ADAPTERS) for part in name.split("."))


WORDS: Mapping[str, Predicate] = {"trainable": is_trainable, "adapters": is_adapter}


@dataclass(frozen=True)
class _Decision:
    """Which names of one structure are left out."""

    of: Mapping[str, KeyPath]
    """The paths of that structure; the same object as long as it does not change."""
    in_base: Collection[str]
    """Likewise."""
    left_out: frozenset[str]
    paths: Mapping[str, KeyPath]


class SaveFilter:
    """The predicate of one run, and what it has decided."""

    def __init__(self, setting: str) -> None:
        """Resolve a word or a dotted path.

        Raises:
            ConfigError: the path leads to nothing that can be called.
        """
        self._setting = setting
        self._predicate = WORDS.get(setting) or resolve(setting, "save_filter", ", ".join(WORDS))
        self._decision: _Decision | None = None

    def keeps(
        self, name: str, tensor: torch.Tensor, requires_grad: bool, *, is_buffer: bool
    ) -> bool:
        """Whether a tensor of the model is saved; the words keep buffers: training changes them."""
        if is_buffer and self._setting in WORDS:
            return True
        bare = name.removeprefix(MODEL)
        return bool(self._predicate(bare, tuple(tensor.shape), requires_grad))

    def names_that_begin(self, root: nn.Module, live: Mapping[str, Any]) -> set[str]:
        """Return the names of trained tensors that it keeps; `live`: the state of the model."""
        trained = names_in_memory((each for each in root.parameters() if each.requires_grad), live)
        return {name for name in trained if self.keeps(name, live[name], True, is_buffer=False)}

    def apply(self, leaves: Leaves, root: nn.Module, in_base: Collection[str], base: str) -> Leaves:
        """Return what is to be saved of a captured state.

        `in_base`: names that the base has, which is described by `base`.

        Raises:
            UnsupportedStateError: naming what must not be left out.
        """
        decision = self._decision
        if decision is None or decision.of is not leaves.paths or decision.in_base is not in_base:
            decision = self._decision = self._decide(leaves, root, in_base, base)
        left_out, claims = decision.left_out, leaves.claims
        shardings = {n: each for n, each in claims.shardings.items() if n not in left_out}
        return replace(
            leaves,
            values={name: each for name, each in leaves.values.items() if name not in left_out},
            paths=decision.paths,
            changed_by_steps=leaves.changed_by_steps - left_out,
            claims=replace(claims, shardings=shardings),
            per_rank=leaves.per_rank - left_out,
            buffers=leaves.buffers - left_out,
        )

    def _decide(
        self, leaves: Leaves, root: nn.Module, in_base: Collection[str], base: str
    ) -> _Decision:
        trained = names_in_memory(
            (each for each in root.parameters() if each.requires_grad), leaves.values
        )
        tensors = {
            name: value
            for name, value in leaves.values.items()
            if name.startswith(MODEL) and isinstance(value, torch.Tensor)
        }
        left_out = frozenset(
            name
            for name, value in tensors.items()
            if not self.keeps(name, value, name in trained, is_buffer=name in leaves.buffers)
        )
        if lost := sorted(left_out & trained):
            raise UnsupportedStateError(
                f"checkpoint.save_filter={self._setting} leaves out {name_first(lost)}, which "
                "training changes: it would be lost.\n"
                "Freeze it (requires_grad_(False)), or let the filter keep it."
            )
        if lacking := sorted(left_out - frozenset(in_base)):
            raise UnsupportedStateError(
                f"checkpoint.save_filter={self._setting} leaves out {name_first(lacking)}, which "
                f"the base {base} does not have: nothing could give it back.\n"
                "Let the filter keep it, or save once without a filter and start from that."
            )
        paths = {name: path for name, path in leaves.paths.items() if name not in left_out}
        return _Decision(leaves.paths, in_base, left_out, paths)

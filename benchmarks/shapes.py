"""Which states can be asked for: how large, how many tensors, on how many ranks.

Owns the names and the sizes, full and quick, and the bytes that follow from them. Imports no torch,
so that listing them is fast. `states` builds what is described here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A transformer's sizes, or with `tiny_tensors` a list of parameters of 64 floats each."""

    width: int = 0
    vocabulary: int = 0
    context: int = 1024
    layers: int = 12
    tiny_tensors: int = 0


@dataclass(frozen=True)
class Recipe:
    """A named state."""

    name: str
    label: str
    full: Shape
    quick: Shape
    ranks: int = 1
    parallel: str | None = None
    """`fsdp2` or `ddp` for more than one rank."""
    in_memory: bool = False
    """Whether it is saved to a RAM-backed folder, by the methods of the local tier."""

    def shape(self, quick: bool) -> Shape:
        """Return the sizes to build."""
        return self.quick if quick else self.full


# With AdamW each parameter is four tensors: itself, two moments and a step. 148 parameters: 592.
_ONE_GIB = Shape(width=768, vocabulary=4736)
_QUICK = Shape(width=96, vocabulary=4736, context=64)
RECIPES = {
    each.name: each
    for each in (
        Recipe("1gib", "1 GiB in 592 tensors", _ONE_GIB, _QUICK),
        Recipe("3gib", "3 GiB in 592 tensors", Shape(1280, 24192), Shape(160, 4736, 64)),
        Recipe("tiny", "20,000 tensors of at most 64 floats",
               Shape(tiny_tensors=5000), Shape(tiny_tensors=100)),
        Recipe("fsdp2", "1 GiB sharded by FSDP2 over 2 ranks", _ONE_GIB, _QUICK, 2, "fsdp2"),
        Recipe("ddp", "1 GiB replicated by DDP on 2 ranks", _ONE_GIB, _QUICK, 2, "ddp"),
        Recipe("local", "1 GiB to a RAM-backed folder", _ONE_GIB, _QUICK, in_memory=True),
        Recipe("local-fsdp2", "1 GiB sharded over 2 ranks to a RAM-backed folder",
               _ONE_GIB, _QUICK, 2, "fsdp2", in_memory=True),
    )
}  # fmt: skip


def whole_bytes(recipe: Recipe, *, quick: bool) -> int:
    """Return the bytes of the state, each tensor counted once however many ranks hold it."""
    shape = recipe.shape(quick)
    if shape.tiny_tensors:
        parameters, elements = shape.tiny_tensors, 64 * shape.tiny_tensors
    else:
        width = shape.width
        parameters = 12 * shape.layers + 4
        elements = width * (shape.vocabulary + shape.context + 2)
        elements += shape.layers * width * (12 * width + 13)
    return 4 * (3 * elements + parameters)  # the parameter, two moments, and a step each

"""Tensors that are more than one block of dense memory: sparse, quantised and tensor subclasses.

Owns taking such a tensor apart into plain tensors (a subclass through `__tensor_flatten__`), its
bytes as torch.save writes them, so that plain torch reads them too, and reading those back.
Promises that a class named by a file is looked up among the modules already loaded, never imported,
and that weights-only loading gets no further names than such classes. Refuses by name, when it is
to be saved, what could not be read back this way. `ReadWhole` is the target of such a tensor in a
load: it is read as one, not copied into memory.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from holdfast.blame import is_process_failure
from holdfast.errors import CorruptCheckpointError, UnsupportedStateError
from holdfast.torch_internals import (
    can_be_flattened,
    flatten_tensor,
    local_of,
    sparse_parts,
    unflatten_tensor,
)

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
"""Types without a representation of their own."""
QUANTISED = frozenset((torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4))
"""Dtypes that only quantised tensors have."""
_CONVERT = "Convert it to a plain tensor, or keep it out of the state and build it again."
_loading = threading.Lock()
"""torch's list of names for weights-only loading is one for all threads."""


class ReadWhole(torch.Tensor):
    """A target without memory, for a tensor that is not dense: what was read becomes `value`."""

    value: torch.Tensor | None
    """As it was saved, in host memory; None: not read yet."""
    offsets: tuple[int, ...]
    """Which chunk of the stored tensor: where it begins, by dimension."""
    lengths: tuple[int, ...]
    classes: Sequence[type]
    """Subclasses that it may be of or consist of."""

    @classmethod
    def of(
        cls,
        size: Sequence[int],
        dtype: torch.dtype,
        offsets: Sequence[int],
        lengths: Sequence[int],
        classes: Sequence[type],
    ) -> ReadWhole:
        """Return a target for the chunk at these offsets of a tensor of this size."""
        target = torch.empty(tuple(size), dtype=dtype, device="meta").as_subclass(cls)
        target.value, target.classes = None, classes
        target.offsets, target.lengths = tuple(offsets), tuple(lengths)
        return target


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a local tensor is plain memory."""
    return (
        type(tensor) in PLAIN_TENSORS
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_nested)
    )


def expanded_dims(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the dimensions of a strided tensor along which its elements share memory."""
    if 0 not in (strides := tensor.stride()):
        return ()
    return tuple(
        at
        for at, (stride, size) in enumerate(zip(strides, tensor.size(), strict=True))
        if stride == 0 and size > 1
    )


def take_apart(tensor: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
    """Return the dense tensors that a tensor consists of, sharing memory, and the rest of it.

    Raises:
        UnsupportedStateError: it cannot be taken apart.
    """
    tensor = local_of(tensor)
    if type(tensor) not in PLAIN_TENSORS:
        if not can_be_flattened(tensor):
            raise UnsupportedStateError(
                f"a {type(tensor).__name__}, a tensor type without __tensor_flatten__"
            )
        names, context = flatten_tensor(tensor)
        facts, parts = [], []
        for name in names:
            inner_facts, inner = take_apart(getattr(tensor, name))
            facts.append((name, inner_facts))
            parts += inner
        return (type(tensor), tuple(tensor.size()), context, facts), parts
    if tensor.is_quantized:
        kept, scales = _quantizer_of(tensor)
        return (tensor.dtype, *kept), [tensor.detach().int_repr(), *scales]
    if tensor.layout is torch.strided:
        return (tensor.dtype,), [tensor.detach()]
    kept, parts = sparse_parts(tensor.detach())
    return (tensor.dtype, tuple(tensor.size()), *kept), parts


def _quantizer_of(tensor: torch.Tensor) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    scheme = tensor.qscheme()
    if scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return (scheme, tensor.q_scale(), tensor.q_zero_point()), []
    parts = [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
    return (scheme, tensor.q_per_channel_axis()), parts


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two local tensors of any kind are equal, bit for bit; their devices may differ."""
    (facts, parts), (other_facts, others) = take_apart(one), take_apart(other)
    return (
        facts == other_facts
        and len(parts) == len(others)
        and all(
            mine.shape == theirs.shape
            and mine.dtype == theirs.dtype
            and torch.equal(_bytes_of(mine), _bytes_of(theirs))
            for mine, theirs in zip(parts, others, strict=True)
        )
    )


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
    return flat.view(torch.uint8)


def size_bytes_of(target: torch.Tensor) -> int:
    """Return the bytes that were read into a local target."""
    if type(target) is not ReadWhole:
        return target.numel() * target.itemsize
    value = target.value
    return 0 if value is None else sum(each.nbytes for each in take_apart(value)[1])


@torch.no_grad()
def overwrite(live: torch.Tensor, saved: torch.Tensor) -> None:
    """Give a live local tensor that is not dense the value of another, keeping the live object.

    Raises:
        UnsupportedStateError: it did not take it, bit for bit.
    """
    cause: Exception | None = None
    try:
        _overwrite(live, saved)
    except (RuntimeError, TypeError, AttributeError) as error:
        cause = error
    if cause is not None or not is_same(live, saved):
        raise UnsupportedStateError(
            f"a live {describe(live)} does not take the saved {describe(saved)}: what they are "
            "made of differs."
        ) from cause


def _overwrite(live: torch.Tensor, saved: torch.Tensor) -> None:
    if type(live) not in PLAIN_TENSORS:
        for name in flatten_tensor(live)[0]:
            _overwrite(getattr(live, name), getattr(saved, name))
    elif live.layout is torch.strided or live.layout is torch.sparse_coo:
        if live.size() == saved.size():
            live.copy_(saved)  # of quantised ones the scale, too
    else:
        live.resize_as_sparse_(saved)
        live.copy_(saved)


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a local tensor of any kind on a device; itself where it is there."""
    if tensor.device == device:
        return tensor
    if type(tensor) in PLAIN_TENSORS or not can_be_flattened(tensor):
        return tensor.to(device)
    names, context = flatten_tensor(tensor)
    inner = {name: move(getattr(tensor, name), device) for name in names}
    return unflatten_tensor(type(tensor), inner, context, tensor.size(), tensor.stride())


def describe(tensor: torch.Tensor) -> str:
    """Return what a tensor is in a few words, for messages."""
    local = local_of(tensor)
    if type(local) not in PLAIN_TENSORS:
        return type(local).__name__
    if local.is_quantized:
        return f"quantised tensor ({local.dtype})"
    return f"{local.layout} tensor" if local.layout is not torch.strided else "dense tensor"


def is_lazy(tensor: Any) -> bool:
    """Whether a lazy module has yet to decide on the size of a tensor."""
    return isinstance(tensor, UninitializedParameter | UninitializedBuffer)


def find_problem(tensor: torch.Tensor) -> str | None:
    """Return why a local tensor that is not dense cannot be saved and read back, with the remedy.

    None: it can, as far as is known before it is pickled.
    """
    kind = type(tensor)
    if is_lazy(tensor):
        return "of no size yet (a lazy module).\nRun one forward before loading or saving."
    if tensor.is_nested:
        return f"a nested tensor.\n{_CONVERT}"
    if kind in PLAIN_TENSORS:
        if tensor.layout not in _LAYOUTS:
            return f"of the layout {tensor.layout}.\n{_CONVERT}"
        return None
    if not can_be_flattened(tensor):
        return f"a {kind.__name__}, a tensor type without __tensor_flatten__.\n{_CONVERT}"
    if find_class(name_of(kind)) is not kind:
        return (
            f"a {kind.__name__}, a class that is not found as {name_of(kind)} when it is read.\n"
            "Define it at the top level of a module."
        )
    for name in flatten_tensor(tensor)[0]:
        inner = getattr(tensor, name)
        if not isinstance(inner, torch.Tensor) or isinstance(inner, DTensor):
            return f"a {kind.__name__} whose {name} is no local tensor.\n{_CONVERT}"
        if (problem := find_problem(inner)) is not None:
            return f"a {kind.__name__} whose {name} is {problem}"
    return None


_LAYOUTS = (
    torch.strided,
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
)


def name_of(kind: type) -> str:
    """Return the name by which a class is recorded."""
    return f"{kind.__module__}.{kind.__qualname__}"


def find_class(name: str) -> type | None:
    """Return a tensor subclass by its recorded name, from a module that is loaded; None: none is.

    Nothing is imported: a file must not choose which code runs.
    """
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:cut]))
        for part in parts[cut:]:
            found = vars(found).get(part) if hasattr(found, "__dict__") else None
        if isinstance(found, type) and issubclass(found, torch.Tensor):
            return found
    return None


def recorded_classes(kind: str, name: str) -> list[type]:
    """Return the subclasses that a recorded kind (see `state.kinds`) needs; `name`: whose it is.

    Raises:
        UnsupportedStateError: the module of one is not loaded.
    """
    fields = json.loads(kind) if kind else {}
    found = []
    for each in [fields.get("class"), *fields.get("parts", ())]:
        if each is None:
            continue
        if (known := find_class(each)) is None:
            raise UnsupportedStateError(
                f"{name} is a {each}, and no such class is loaded.\n"
                f"Import {each.rpartition('.')[0]} before loading: a checkpoint imports nothing."
            )
        found.append(known)
    return found


def classes_in(tensor: torch.Tensor) -> list[type]:
    """Return the subclasses that a local tensor is of and consists of, outermost first."""
    if type(tensor) in PLAIN_TENSORS or not can_be_flattened(tensor):
        return []
    found = [type(tensor)]
    for name in flatten_tensor(tensor)[0]:
        found += [each for each in classes_in(getattr(tensor, name)) if each not in found]
    return found


def pickle_tensor(tensor: torch.Tensor, name: str, *, is_first: bool) -> bytes:
    """Return the torch.save bytes of a local tensor that is not dense.

    `is_first`: of its kind; it is read back then, to prove that the next process can.

    Raises:
        UnsupportedStateError: it cannot be read back.
    """
    if (problem := find_problem(tensor)) is not None:
        raise UnsupportedStateError(f"{name} is {problem}")
    host = move(tensor, torch.device("cpu"))
    stream = io.BytesIO()
    with _quiet():
        torch.save(host, stream)
    content = stream.getvalue()
    if is_first:
        cause: Exception | None = None
        try:
            read = unpickle_tensor(content, classes_in(host), "", name)
            is_back = is_same(read, host)
            overwrite(read, host)  # as a live buffer is, by a load
        except (CorruptCheckpointError, UnsupportedStateError) as error:
            is_back, cause = False, error
        if not is_back:
            raise UnsupportedStateError(
                f"{name} is a {describe(tensor)}, which torch.save and weights-only loading do not "
                f"give back as it was.\n{_CONVERT}"
            ) from cause
    return content


def unpickle_tensor(
    content: bytes | bytearray | memoryview, classes: Sequence[type], where: str, name: str
) -> torch.Tensor:
    """Return a tensor from its container, running no code but that of these classes.

    Raises:
        CorruptCheckpointError: it asks for other code, is torn, or is no tensor.
    """
    try:
        with _allowing(classes), _quiet():
            found = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:  # torch's message explains how to run the code anyway
        raise CorruptCheckpointError(where, f"{name} asks for code, or is torn") from error
    except Exception as error:  # torn archives can raise anything
        if is_process_failure(error):
            raise
        summary = str(error).partition("\n")[0] or type(error).__name__
        raise CorruptCheckpointError(where, f"{name} cannot be read: {summary}") from error
    if not isinstance(found, torch.Tensor):
        raise CorruptCheckpointError(where, f"{name} is no tensor")
    return found


@contextmanager
def _allowing(classes: Sequence[type]) -> Iterator[None]:
    with _loading:
        known = torch.serialization.get_safe_globals()
        # Leaving removes what was added: not what was there before.
        added = [each for each in classes if each not in known]
        with torch.serialization.safe_globals([*added]):
            yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch says of its own functions, which restore such tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

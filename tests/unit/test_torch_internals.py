"""Private names of torch: all in one file, each found, and each replaced where it has moved."""

from __future__ import annotations

import ast
import importlib.util
import io
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.distributed.checkpoint import _nested_dict, filesystem, metadata, state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import lr_scheduler

import holdfast
from holdfast import torch_internals
from holdfast.errors import CheckpointError
from holdfast.format.dcp import flatten, put

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
VERSION = re.escape(f"torch {torch.__version__}")
SOURCE = Path(holdfast.__file__).parent
OWN_FILE = Path(torch_internals.__file__)


def _optimizer() -> Any:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)


def _hooks_of_optimizer(kind: str) -> bool:
    """Whether a hook that is registered by a public method is found by the name."""
    optimizer = _optimizer()
    getattr(optimizer, f"register_{kind}_hook")(lambda *_: None)
    return len(getattr(optimizer, f"_optimizer_{kind}_hooks")) == 1


def _compiled() -> Any:
    return torch.compile(nn.Linear(1, 1))


def _schedule() -> Any:
    schedule = lr_scheduler.ConstantLR(_optimizer())
    return lr_scheduler.ChainedScheduler([schedule])


class _Twice(torch.Tensor):
    """A subclass that says how to take it apart."""


def _text_of(module: Any) -> str:
    return Path(module.__file__).read_text(encoding="utf-8")


NAMES: dict[str, Any] = {
    "_local_tensor": lambda: DTensor._local_tensor,
    "_spec": lambda: DTensor._spec,
    "__create_chunk_list__": lambda: DTensor.__create_chunk_list__,
    "__tensor_flatten__": lambda: "__tensor_flatten__" in _text_of(torch._subclasses.meta_utils),
    "_indices": lambda: torch.eye(2).to_sparse()._indices().shape == (2, 2),
    "_values": lambda: torch.eye(2).to_sparse()._values().shape == (2,),
    "_foreach_copy_": lambda: torch._foreach_copy_,
    "_get_default_store": lambda: distributed.distributed_c10d._get_default_store,
    "_abort_process_group": lambda: distributed.distributed_c10d._abort_process_group,
    "_parameters": lambda: vars(nn.Module())["_parameters"] == {},
    "_buffers": lambda: vars(nn.Module())["_buffers"] == {},
    "_modules": lambda: vars(nn.Module())["_modules"] == {},
    "_non_persistent_buffers_set": lambda: nn.Module()._non_persistent_buffers_set == set(),
    "_state_dict_hooks": lambda: vars(nn.Module())["_state_dict_hooks"] == {},
    "_state_dict_pre_hooks": lambda: nn.Module()._state_dict_pre_hooks == {},
    "_load_state_dict_pre_hooks": lambda: nn.Module()._load_state_dict_pre_hooks == {},
    "_load_state_dict_post_hooks": lambda: nn.Module()._load_state_dict_post_hooks == {},
    "_save_to_state_dict": lambda: nn.Module._save_to_state_dict,
    "_load_from_state_dict": lambda: nn.Module._load_from_state_dict,
    "_extra_state": lambda: nn.modules.module._EXTRA_STATE_KEY_SUFFIX == "_extra_state",
    "_metadata": lambda: "_metadata" in vars(nn.Linear(1, 1).state_dict()),
    "_orig_mod": lambda: _compiled()._orig_mod,
    "torch._dynamo.eval_frame": lambda: torch._dynamo.eval_frame.OptimizedModule,
    "torch._dynamo.": lambda: torch._dynamo.eval_frame.OptimizedModule,
    "torch.distributed.fsdp._fully_shard.": lambda: distributed.fsdp._fully_shard,
    "_checkpoint_wrapped_module": lambda: (
        checkpoint_wrapper._CHECKPOINT_WRAPPED_MODULE == "_checkpoint_wrapped_module"
    ),
    "_fqn_modifiers": lambda: '"_fqn_modifiers"' in _text_of(state_dict),
    "_optimizer_state_dict_pre_hooks": lambda: _hooks_of_optimizer("state_dict_pre"),
    "_optimizer_state_dict_post_hooks": lambda: _hooks_of_optimizer("state_dict_post"),
    "_optimizer_load_state_dict_pre_hooks": lambda: _hooks_of_optimizer("load_state_dict_pre"),
    "_optimizer_load_state_dict_post_hooks": lambda: _hooks_of_optimizer("load_state_dict_post"),
    "_schedulers": lambda: "_schedulers" in _schedule().state_dict() and _schedule()._schedulers,
    "_last_lr": lambda: _schedule()._last_lr,
    "_StorageInfo": lambda: filesystem._StorageInfo,
    "_MEM_FORMAT_ENCODING": lambda: metadata._MEM_FORMAT_ENCODING,
    "_get_layout": lambda: torch.serialization._get_layout,
    "torch._C": lambda: torch._C.Size,
}
"""Each private name, and whether the installed torch has it with the meaning that is relied on."""


@pytest.mark.parametrize("name", NAMES)
def test_the_installed_torch_has_the_name(name: str) -> None:
    """Where this fails, the replacement is in use: see the file that owns the name."""
    assert NAMES[name]()


def _strings(tree: ast.AST) -> Iterator[str]:
    """Yield all strings but docstrings."""
    prose = {id(each.value) for each in ast.walk(tree) if isinstance(each, ast.Expr)}
    for each in ast.walk(tree):
        if isinstance(each, ast.Constant) and isinstance(each.value, str) and id(each) not in prose:
            yield each.value


def _is_private(name: str) -> bool:
    is_magic = name.startswith("__") and name.endswith("__")
    return name in NAMES or (name.startswith("_") and not is_magic)


def _private_names_in(tree: ast.Module) -> set[str]:
    """Return names that begin with an underscore and are not the file's own."""
    own = {
        each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef | ast.ClassDef)
    } | {
        each.attr
        for each in ast.walk(tree)
        if isinstance(each, ast.Attribute)
        and isinstance(each.value, ast.Name)
        and each.value.id in ("self", "cls")
    }
    found = {each for each in _strings(tree) if each in NAMES or "torch._" in each}
    for each in ast.walk(tree):
        if isinstance(each, ast.Attribute) and _is_private(each.attr):
            is_of_self = isinstance(each.value, ast.Name) and each.value.id in ("self", "cls")
            if not is_of_self and (each.attr in NAMES or each.attr not in own):
                found.add(each.attr)
        elif isinstance(each, ast.ImportFrom) and each.module is not None:
            parts = [*each.module.split("."), *(name.name for name in each.names)]
            found |= {part for part in parts if _is_private(part)}
        elif isinstance(each, ast.Import):
            names = [part for name in each.names for part in name.name.split(".")]
            found |= {part for part in names if _is_private(part)}
    return found


NOT_OF_TORCH = {"_getframe", "_current_frames", "_thread", "_calls_inside", "_kept"}


@pytest.mark.parametrize(
    "path", [each for each in sorted(SOURCE.rglob("*.py")) if each != OWN_FILE], ids=str
)
def test_no_other_module_uses_a_private_name(path: Path) -> None:
    """One file to look into when torch moves a name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert _private_names_in(tree) - NOT_OF_TORCH <= _local_names(tree)


def _local_names(tree: ast.Module) -> set[str]:
    """Return private names that a file's own classes declare as fields."""
    return {
        each.target.id
        for each in ast.walk(tree)
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    } - set(NAMES)


@pytest.mark.parametrize(
    "code",
    [
        "from torch.distributed._tensor import DTensor",
        "from torch.distributed.checkpoint.planner_helpers import _create_write_items",
        "import torch._dynamo",
        "def f(tensor): return tensor._local_tensor",
        "def f(tensor): return getattr(tensor, '_local_tensor', tensor)",
        "def f(module): return module._is_full_backward_hook",
        "def f(): return sys.modules.get('torch._dynamo.eval_frame')",
    ],
)
def test_the_search_finds_a_private_name(code: str) -> None:
    """A search that finds nothing proves nothing."""
    assert _private_names_in(ast.parse(code))


def test_every_private_name_of_the_file_is_listed() -> None:
    """And every listed name is used there."""
    tree = ast.parse(OWN_FILE.read_text(encoding="utf-8"))
    attributes = {each.attr for each in ast.walk(tree) if isinstance(each, ast.Attribute)}
    strings = set(_strings(tree))
    private = {each for each in attributes if _is_private(each)} | {
        each
        for each in strings
        if (each.startswith("_") and each.isidentifier())
        or (each.startswith("torch.") and "._" in each)
    }
    whole = {each for each in private if not (each.startswith("torch.") and each.count(".") > 3)}
    declared = {"__module__", "__qualname__", "__version__"}
    assert whole - declared | {"torch.distributed.fsdp._fully_shard."} == set(NAMES)


def _fresh() -> Any:
    """Load the file again, as a process would that has this torch."""
    spec = importlib.util.spec_from_file_location("fresh_internals", OWN_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


class _Mesh(SimpleNamespace):
    """The public side of a device mesh."""

    def get_coordinate(self) -> list[int]:
        coordinate: list[int] = self.coordinate
        return coordinate


class _PublicDTensor:
    """The public side of a distributed tensor, seen from one rank of a mesh."""

    def __init__(
        self, shape: list[int], mesh: list[int], at: list[int], placements: list[Any]
    ) -> None:
        self.shape, self.placements = torch.Size(shape), placements
        self.device_mesh = _Mesh(shape=mesh, coordinate=at)

    def dim(self) -> int:
        return len(self.shape)

    def detach(self) -> _PublicDTensor:
        return self

    def to_local(self) -> str:
        return "local"


def test_a_distributed_tensor_without_attributes_is_asked_by_public_methods(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For its local part, and for what is equal where two are laid out alike."""
    monkeypatch.setattr("torch.distributed.tensor.DTensor", _PublicDTensor)
    fresh = _fresh()
    one, same = (_PublicDTensor([4], [2], [1], [Shard(0)]) for _ in range(2))
    same.device_mesh = one.device_mesh
    other = _PublicDTensor([4], [2], [1], [Replicate()])
    assert fresh.local_of(one) == "local"
    assert fresh.local_and_spec(one) == fresh.local_and_spec(same) != fresh.local_and_spec(other)


@pytest.mark.parametrize(
    ("at", "sizes", "offsets"),
    [
        ([0, 0], (2, 2), (0, 0)),
        ([0, 1], (2, 1), (0, 2)),
        ([1, 0], (2, 1), (0, 3)),
        ([1, 1], (2, 1), (0, 4)),
    ],
)
def test_chunks_are_computed_from_placements(
    at: list[int], sizes: tuple[int, ...], offsets: tuple[int, ...]
) -> None:
    """The example in torch's own documentation: five columns over two times two ranks."""
    tensor: Any = _PublicDTensor([2, 5], [2, 2], at, [Shard(1), Shard(1)])
    assert torch_internals.chunks_of(tensor) == [(offsets, sizes)]


@pytest.mark.parametrize("position", range(4))
def test_chunks_of_few_rows_are_those_that_torch_computes(position: int) -> None:
    """Also of ranks that hold nothing, and beside a replicated dimension."""
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as compute

    mesh, placements = [2, 4], [Replicate(), Shard(0)]
    tensor: Any = _PublicDTensor([5, 3], mesh, [1, position], placements)
    sizes, offsets = compute((5, 3), mesh, lambda each: [1, position][each], placements)
    assert torch_internals.chunks_of(tensor) == [(tuple(offsets), tuple(sizes))]


def test_a_placement_of_another_kind_is_an_error_with_the_version() -> None:
    """Of FSDP2 over tensor parallelism, say: its order of rows is torch's own secret."""

    class Strided(Shard):
        pass

    tensor: Any = _PublicDTensor([4], [2], [0], [Strided(0)])
    with pytest.raises(CheckpointError, match=rf"{VERSION} has no .*chunk_list__"):
        torch_internals.chunks_of(tensor)


def test_a_tensor_that_says_nothing_of_its_parts_cannot_be_flattened() -> None:
    """The items of a shard file refuse it then, by name."""
    assert not torch_internals.can_be_flattened(torch.ones(1).as_subclass(_Twice))
    assert torch_internals.can_be_flattened(SimpleNamespace(__tensor_flatten__=None))  # type: ignore[arg-type]


def test_the_parts_of_a_sparse_tensor_are_found_by_public_methods(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then in the order of a coalesced tensor."""
    tensor = torch.eye(2).to_sparse()
    facts, parts = torch_internals.sparse_parts(tensor)
    monkeypatch.setattr(torch_internals, "_has", lambda *_: False)
    assert torch_internals.sparse_parts(tensor)[0] == facts == (torch.sparse_coo, True)
    for mine, theirs in zip(parts, torch_internals.sparse_parts(tensor)[1], strict=True):
        assert mine.tolist() == theirs.tolist()


def test_tensors_are_copied_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the call for many."""
    monkeypatch.delattr(torch, "_foreach_copy_")
    targets, sources = [torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.full((3,), 2.0)]
    torch_internals.copy_each(targets, sources, non_blocking=True)
    assert [each.tolist() for each in targets] == [[1, 1], [2, 2, 2]]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("world")
def test_the_store_is_asked_of_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group has a public way to the store that it was made with."""
    assert torch_internals.rendezvous_store() is not None
    monkeypatch.delattr(distributed.distributed_c10d, "_get_default_store")
    store = torch_internals.rendezvous_store().clone()
    store.set("a", "b")
    assert store.get("a") == b"b"


class _NoGroup:
    WORLD = object()


def test_no_way_to_the_store_is_an_error_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised where ranks begin to communicate."""
    monkeypatch.setattr("torch.distributed", SimpleNamespace(distributed_c10d=None, group=_NoGroup))
    with pytest.raises(CheckpointError, match=rf"{VERSION} has no .*default_store"):
        _fresh().rendezvous_store()


def test_a_group_is_aborted_by_its_own_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has no function for it."""
    monkeypatch.delattr(distributed.distributed_c10d, "_abort_process_group")
    called: list[str] = []
    torch_internals.abort_group(SimpleNamespace(abort=lambda: called.append("abort")))
    assert called == ["abort"]


def _module_without(name: str) -> type[nn.Module]:
    """Return torch's module as it would be without an attribute."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__.pop(name, None)

        def __getattribute__(self, wanted: str) -> Any:
            if wanted == name:
                raise AttributeError(name)
            return super().__getattribute__(wanted)

    return Module


MODULE_NAMES = [
    each
    for each in NAMES
    if each in vars(nn.Module()) or each in ("_save_to_state_dict", "_load_from_state_dict")
]


@pytest.mark.parametrize("name", [each for each in MODULE_NAMES if "_load_" not in each])
def test_no_module_is_plain_without_the_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its state is asked of torch's getters."""
    linear = nn.Linear(1, 1)
    assert torch_internals.is_plain_module(linear)
    monkeypatch.setattr("torch.nn.Module", _module_without(name))
    assert not _fresh().is_plain_module(linear)


@pytest.mark.parametrize("name", [each for each in MODULE_NAMES if "_load_" in each])
def test_loading_is_left_to_torch_without_the_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its setters restore the module."""
    linear = nn.Linear(1, 1)
    assert torch_internals.has_default_loading(linear)
    monkeypatch.setattr("torch.nn.Module", _module_without(name))
    assert not _fresh().has_default_loading(linear)


def test_hooks_from_an_unknown_place_are_not_taken_for_those_of_fsdp() -> None:
    """A module with them is left to torch's getters and setters."""

    def hook() -> None:
        pass

    hook.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
    assert torch_internals.only_shard([hook])
    hook.__module__ = "torch.distributed.fsdp.moved"
    assert not torch_internals.only_shard([hook])


@pytest.mark.parametrize("gone", ["its place", "the class", "its part"])
def test_a_compiled_module_of_an_unknown_kind_is_left_to_the_getters(
    gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its names would have a part that the getters leave out."""
    compiled = _compiled()
    assert torch_internals.child_left_out(compiled) == "_orig_mod"
    if gone == "its place":
        monkeypatch.delitem(sys.modules, "torch._dynamo.eval_frame")
    elif gone == "the class":
        monkeypatch.delattr(sys.modules["torch._dynamo.eval_frame"], "OptimizedModule")
    else:
        compiled._modules["module"] = compiled._modules.pop("_orig_mod")
    assert torch_internals.child_left_out(compiled) is None


@pytest.mark.parametrize("name", ["_fqn_modifiers", "_checkpoint_wrapped_module"])
def test_a_module_that_renames_parts_is_left_to_the_getters(name: str) -> None:
    """And without the name to tell it by, by the hooks on its state dict that go with it."""
    module = nn.Sequential(nn.Linear(1, 1))
    assert torch_internals.child_left_out(module) == ""
    if name == "_fqn_modifiers":
        module._fqn_modifiers = dict  # type: ignore[assignment]
    else:
        module.add_module(name, nn.Linear(1, 1))
    assert torch_internals.child_left_out(module) is None
    assert not torch_internals.is_plain_module(
        checkpoint_wrapper.checkpoint_wrapper(nn.Linear(1, 1))
    )


@pytest.mark.parametrize("name", [each for each in NAMES if each.startswith("_optimizer_")])
def test_no_optimizer_is_plain_without_the_name(name: str) -> None:
    """So that torch's getters and setters handle it."""
    optimizer = _optimizer()
    assert torch_internals.is_plain_optimizer(optimizer)
    assert torch_internals.optimizer_has_default_loading(optimizer)
    delattr(optimizer, name)
    assert torch_internals.is_plain_optimizer(optimizer) == ("load" in name)
    assert not torch_internals.optimizer_has_default_loading(optimizer)


def test_a_schedule_that_hides_its_parts_is_known_as_such() -> None:
    """A learning rate is refused to be kept beside it: nobody could scale the hidden ones."""
    schedule = _schedule()
    assert len(torch_internals.nested_schedules(schedule)) == 1
    assert not torch_internals.hides_schedules(schedule)
    del schedule._schedulers
    assert torch_internals.nested_schedules(schedule) == ()
    assert torch_internals.hides_schedules(schedule)


def test_rates_that_a_schedule_does_not_keep_are_not_set() -> None:
    """It computes them then."""
    schedule = _schedule()
    torch_internals.set_last_rates(schedule, [2.0])
    assert torch_internals.last_rates(schedule) == schedule.get_last_lr() == [2.0]
    del schedule._last_lr
    torch_internals.set_last_rates(schedule, [3.0])
    assert torch_internals.last_rates(schedule) is None


def test_places_in_metadata_are_pickled_alike_by_a_class_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The name in the file is the format, whether torch has it or not."""
    theirs = pickle.dumps(torch_internals.StorageInfo("file", 1, 2), protocol=3)
    monkeypatch.delattr(filesystem, "_StorageInfo")
    fresh = _fresh()
    kind = fresh.StorageInfo
    assert kind.__name__ != "_StorageInfo"
    assert f"{kind.__module__}\n{kind.__qualname__}\n".encode() in theirs

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return fresh.PICKLED[module, name]

    found = Unpickler(io.BytesIO(theirs)).load()
    assert (found.relative_path, found.offset, found.length) == ("file", 1, 2)


def test_layouts_in_metadata_are_found_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch pickles them."""
    monkeypatch.delattr(torch.serialization, "_get_layout")
    find = _fresh().PICKLED["torch.serialization", "_get_layout"]
    assert find("torch.sparse_coo") is torch.sparse_coo


def test_metadata_that_this_torch_cannot_read_is_an_error_with_the_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And no damage of the file."""
    monkeypatch.delattr(metadata, "_MEM_FORMAT_ENCODING")
    read = _fresh().PICKLED["torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"]
    with pytest.raises(CheckpointError, match=rf"{VERSION} has no .*MEM_FORMAT"):
        read(0)


NESTED = [
    {},
    {"model": {"a.b": 1, "c": [1, 2], "empty": {}}},
    {"o": [{"x": torch.ones(1)}, [1, [torch.ones(1), 2]], (torch.ones(1), 1)]},
    {"a": {1: {"b": []}}, "b": [[], 3]},
]


@pytest.mark.parametrize("nested", NESTED, ids=range(len(NESTED)))
def test_flat_names_are_those_of_torch(nested: dict[str, Any]) -> None:
    """Stock torch must find every name of a checkpoint, and nest it again."""
    flat, paths = flatten(nested)
    theirs, their_paths = _nested_dict.flatten_state_dict(nested)
    assert list(flat) == list(theirs)
    assert all(flat[name] is theirs[name] for name in flat)
    assert paths == their_paths
    again: dict[str, Any] = {}
    for name in reversed(flat):
        put(again, paths[name], flat[name])
    assert flatten(again)[1] == paths


def test_two_leaves_of_one_name_are_refused() -> None:
    """A name stands for one value."""
    with pytest.raises(ValueError, match=r"a\.b"):
        flatten({"a": {"b": 1}, "a.b": 2})


def test_it_imports_without_any_of_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moved name is noticed where it is needed, never at an import."""
    for owner, name in (
        (torch, "_foreach_copy_"),
        (distributed.distributed_c10d, "_get_default_store"),
        (distributed.distributed_c10d, "_abort_process_group"),
        (nn.Module, "_save_to_state_dict"),
        (filesystem, "_StorageInfo"),
        (metadata, "_MEM_FORMAT_ENCODING"),
        (torch.serialization, "_get_layout"),
    ):
        monkeypatch.delattr(owner, name)
    monkeypatch.setattr("torch.distributed.tensor.DTensor", _PublicDTensor)
    assert isinstance(_fresh(), ModuleType)


def test_an_empty_part_has_the_shape_that_its_memory_has() -> None:
    """FSDP2 beside tensor parallelism: what is left of an empty part may be empty otherwise."""
    offsets = torch.Size((4, 1))
    listed = SimpleNamespace(offsets=offsets, sizes=torch.Size((4, 0)))
    part: Any = SimpleNamespace(
        _local_tensor=torch.empty(0, 0), __create_chunk_list__=lambda: [listed]
    )
    assert torch_internals.chunks_of(part) == [(offsets, (0, 0))]

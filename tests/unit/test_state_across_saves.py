"""What is followed from save to save is never stale: it is what a fresh look would find."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, not in __all__
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.nn.utils import parametrize

from holdfast.errors import CheckpointError
from holdfast.filesystem import LocalFilesystem
from holdfast.format.layout import read_index
from holdfast.format.values import DATA, RNG, TRAIN_STATE
from holdfast.manager import DefaultCheckpointManager
from holdfast.state.app import AppState
from holdfast.state.model import ModelWalk, read_model
from holdfast.state.optimizer import NamedOptimizers, OptimizerView, look_up
from holdfast.state.small import Place
from tests.support.managers import Live, manager_of, step
from tests.support.states import digest

# -- the state that changes ----------------------------------------------------------------------


class _Net(nn.Module):
    """Trained layers, frozen ones, and buffers of every standing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.left = nn.Linear(3, 3, bias=False)
        self.right = nn.Linear(3, 3, bias=False)
        self.left.requires_grad_(False)
        self.right.requires_grad_(False)
        self.register_buffer("counts", torch.arange(9).reshape(3, 3))
        self.register_buffer("other_counts", torch.arange(9).reshape(3, 3) + 9)
        self.register_buffer("waves", torch.view_as_complex(torch.rand(3, 2)))
        self.register_buffer("nothing", None)
        self.register_buffer("scratch", torch.rand(2), persistent=False)
        self.blocks = nn.ModuleDict({"one": nn.BatchNorm1d(2)})

    def forward(self, inputs: Tensor) -> Tensor:
        scale = sum(each.sum() for each in self.blocks.parameters())
        output: Tensor = self.second(self.first(inputs)) * scale
        return output


def _plain() -> Any:
    torch.manual_seed(0)
    net = _Net()
    groups = [
        {"params": [*net.first.parameters()], "note": 1},
        {"params": [net.second.weight], "lr": 0.5, "note": "a text"},
    ]
    live = Live(net, torch.optim.AdamW(groups, lr=0.1))
    step(live)
    return live


def _tied() -> Any:
    live = _plain()
    live.model.right.weight = live.model.left.weight
    live.model.other_counts = live.model.counts
    live.model.mirrored = nn.Buffer(live.model.waves)
    return live


def _unstepped() -> Any:
    torch.manual_seed(0)
    net = _Net()
    return Live(net, torch.optim.AdamW([*net.first.parameters()], lr=0.1))


def _several() -> Any:
    live = _plain()
    other = nn.Linear(2, 2)
    both = Live([live.model, other], [live.optimizer, torch.optim.SGD(other.parameters(), lr=1.0)])
    step(both)
    return both


class _Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class _WithExtra(_Net):
    def get_extra_state(self) -> Any:
        return {"extra": torch.ones(2)}


class _Renaming(_Net):
    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        return {f"x_{name}": each for name, each in super().state_dict(*arguments, **named).items()}


class _Doubling(torch.optim.AdamW):
    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        return {**found, "state": _doubled(found["state"])}


def _doubled(state: dict[Any, Any]) -> dict[Any, Any]:
    return {name: {key: each * 2 for key, each in entry.items()} for name, entry in state.items()}


class _Opaque(Tensor):
    """A tensor type that cannot be taken apart."""


# -- the changes ---------------------------------------------------------------------------------


def _replace_parameter(live: Any, tell_optimizer: bool) -> None:
    old = live.model.second.weight
    new = live.model.second.weight = nn.Parameter(torch.rand(4, 4))
    if tell_optimizer:
        live.optimizer.param_groups[1]["params"] = [new]
        live.optimizer.state[new] = live.optimizer.state.pop(old)


def _replace_layer(live: Any, tell_optimizer: bool) -> None:
    old = live.model.second.weight
    live.model.second = nn.Linear(5, 4, bias=False)
    if tell_optimizer:
        live.optimizer.param_groups[1]["params"] = [live.model.second.weight]
        del live.optimizer.state[old]


def _rename_layer(live: Any) -> None:
    live.model.blocks["two"] = live.model.blocks.pop("one")


def _swap_layers(live: Any) -> None:
    live.model.left, live.model.right = live.model.right, live.model.left


def _rename_parameter(live: Any) -> None:
    live.model.left.register_parameter("mass", live.model.left.weight)
    del live.model.left.weight


def _add_parameter(live: Any) -> None:
    live.model.added = nn.Parameter(torch.rand(2))
    live.optimizer.add_param_group({"params": [live.model.added], "note": 2})


def _share_data(live: Any) -> None:
    live.model.right.weight.data = live.model.left.weight.data


def _separate_data(live: Any) -> None:
    live.model.right.weight = nn.Parameter(live.model.left.weight.detach() + 1, False)


def _turn_twin(live: Any) -> None:
    live.model.other_counts = live.model.counts.t()


def _turn_back(live: Any) -> None:
    live.model.other_counts = live.model.counts.t()
    live.model.counts = live.model.counts.t()


def _conjugate_twin(live: Any) -> None:
    live.model.mirrored = live.model.waves.conj()


def _split_group(live: Any) -> None:
    weight, bias = live.optimizer.param_groups[0]["params"]
    live.optimizer.param_groups[0]["params"] = [weight]
    live.optimizer.param_groups[1]["params"] = [live.optimizer.param_groups[1]["params"][0], bias]


def _reload_optimizer(live: Any) -> None:
    found = copy.deepcopy(live.optimizer.state_dict())
    for entry in found["state"].values():
        entry["exp_avg"] += 1
    live.optimizer.load_state_dict(found)


def _reload_without_one(live: Any) -> None:
    found = copy.deepcopy(live.optimizer.state_dict())
    del found["state"][1]
    live.optimizer.load_state_dict(found)


def _new_optimizer(live: Any, keep_state: bool) -> None:
    found = live.optimizer.state_dict()
    groups = [{"params": each["params"], "note": 5} for each in live.optimizer.param_groups]
    live.optimizer = torch.optim.AdamW(groups, lr=0.25)
    if keep_state:
        live.optimizer.load_state_dict(found)


def _twin_optimizer(live: Any) -> None:
    old = live.optimizer
    live.optimizer = torch.optim.AdamW([dict(each) for each in old.param_groups], lr=0.1)
    for parameter, entry in old.state.items():
        live.optimizer.state[parameter] = {key: each + 1 for key, each in entry.items()}


def _append_optimizer(live: Any) -> None:
    live.model.left.requires_grad_(True)
    live.optimizer = [live.optimizer, torch.optim.SGD(live.model.left.parameters(), lr=1.0)]


def _copy_groups(live: Any) -> None:
    live.optimizer.param_groups = [dict(each) for each in live.optimizer.param_groups]
    live.optimizer.param_groups[1]["lr"] = 0.75


def _new_model(live: Any) -> None:
    other = _plain()
    with torch.no_grad():
        for each in other.model.parameters():
            each += 1
    live.model, live.optimizer = other.model, other.optimizer


def _group(**values: Any) -> Callable[[Any], None]:
    return lambda live: live.optimizer.param_groups[0].update(values)


def _entry(live: Any) -> dict[Any, Any]:
    found: dict[Any, Any] = live.optimizer.state[live.model.second.weight]
    return found


def _state(**values: Any) -> Callable[[Any], None]:
    return lambda live: _entry(live).update(values)


def _buffer(**values: Any) -> Callable[[Any], None]:
    def change(live: Any) -> None:
        for name, value in values.items():
            setattr(live.model, name, value)

    return change


def _hide_buffer(live: Any) -> None:
    live.model.register_buffer("counts", live.model.counts, persistent=False)


def _show_buffer(live: Any) -> None:
    live.model.register_buffer("scratch", live.model.scratch, persistent=True)


def _set_data(make: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def change(live: Any) -> None:
        live.model.first.weight.data = make(live.model.first.weight.data)

    return change


def _late_hook(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
    _hook_changes(module, state, prefix, metadata)


def _hook_changes(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
    state[f"{prefix}hooked"] = torch.ones(3)


def _early_hook_adds(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    module.register_buffer("hooked", torch.ones(3))


def _early_hook_replaces(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    module.weight = nn.Parameter(torch.full((3, 3), 7.0), requires_grad=False)


def _override_on_instance(live: Any) -> None:
    live.model.left.state_dict = lambda *, destination, prefix, keep_vars: destination.update(
        {f"{prefix}made": torch.ones(2)}
    )


def _override_saving_on_instance(live: Any) -> None:
    def save(destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}made"] = torch.ones(2)

    live.model.left._save_to_state_dict = save


def _override_optimizer_on_instance(live: Any) -> None:
    inner = live.optimizer.state_dict
    live.optimizer.state_dict = lambda: {**inner(), "state": _doubled(inner()["state"])}


def _optimizer_early_hook(live: Any) -> None:
    live.optimizer.register_state_dict_pre_hook(_enlarge_state)


def _enlarge_state(optimizer: torch.optim.Optimizer) -> None:
    for entry in optimizer.state.values():
        entry["enlarged"] = torch.ones(1)


def _optimizer_late_hook(live: Any) -> None:
    live.optimizer.register_state_dict_post_hook(
        lambda optimizer, found: {**found, "state": _doubled(found["state"])}
    )


def _into_class(kind: type) -> Callable[[Any], None]:
    return lambda live: setattr(live.model, "__class__", kind)


def _wrap_for_recomputation(live: Any) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    live.model.first = checkpoint_wrapper(live.model.first)


@dataclass(frozen=True)
class _Change:
    """One thing that may happen between two saves."""

    make: Callable[[Any], Any]
    followed: bool
    """Whether it is seen through the bindings; else the getters are asked again."""
    build: Callable[[], Any] = _plain


CHANGES = {
    "nothing": _Change(lambda live: None, True),
    "a step": _Change(step, True),
    "the first step": _Change(step, False, _unstepped),
    # parameters
    "parameter replaced": _Change(lambda live: _replace_parameter(live, True), False),
    "parameter replaced behind the optimizer": _Change(
        lambda live: _replace_parameter(live, False), False
    ),
    "frozen parameter replaced": _Change(
        lambda live: setattr(live.model.left, "weight", nn.Parameter(torch.rand(2, 2), False)), True
    ),
    "parameter renamed": _Change(_rename_parameter, False),
    "parameter added": _Change(_add_parameter, False),
    "parameter set to None": _Change(lambda live: setattr(live.model.left, "weight", None), False),
    "bias removed": _Change(lambda live: setattr(live.model.blocks["one"], "bias", None), False),
    "data of the same shape": _Change(_set_data(lambda data: data + 1), True),
    "data of another shape": _Change(_set_data(lambda data: torch.rand(5, 7)), True),
    "data of another type": _Change(_set_data(lambda data: data.bfloat16()), True),
    "data turned in place": _Change(_set_data(lambda data: data.t()), True),
    "data strided": _Change(_set_data(lambda data: torch.rand(4, 8)[:, ::2]), True),
    "half precision": _Change(lambda live: live.model.half(), True),
    "double precision": _Change(lambda live: live.model.double(), True),
    "frozen": _Change(lambda live: live.model.first.requires_grad_(False), False),
    "model in shared memory": _Change(lambda live: live.model.share_memory(), True),
    # ties
    "tie made": _Change(
        lambda live: setattr(live.model.right, "weight", live.model.left.weight), True
    ),
    "tie made by data": _Change(_share_data, True),
    "tie broken": _Change(_separate_data, True, _tied),
    "one of two ties turned": _Change(_turn_twin, True, _tied),
    "two ties turned": _Change(_turn_back, True, _tied),
    "one of two ties conjugated": _Change(_conjugate_twin, True, _tied),
    # buffers
    "buffer replaced": _Change(_buffer(counts=torch.arange(9).reshape(3, 3) * 2), True),
    "buffer registered again": _Change(
        lambda live: live.model.register_buffer("counts", torch.arange(4)), True
    ),
    "buffer of another type": _Change(_buffer(counts=torch.rand(3, 3)), True),
    "buffer set to None": _Change(_buffer(counts=None), False),
    "buffer filled": _Change(_buffer(nothing=torch.rand(3)), False),
    "buffer filled for another": _Change(_buffer(nothing=torch.rand(3), counts=None), False),
    "buffer added": _Change(
        lambda live: live.model.register_buffer("more", torch.rand(3)), False
    ),
    "buffer removed": _Change(lambda live: delattr(live.model, "counts"), False),
    "buffer no more saved": _Change(_hide_buffer, False),
    "buffer saved now": _Change(_show_buffer, False),
    "nn.Buffer added": _Change(_buffer(more=nn.Buffer(torch.rand(3))), False),
    "buffer replaced by an nn.Buffer": _Change(
        lambda live: setattr(live.model, "counts", nn.Buffer(torch.rand(3, 3))), True
    ),
    "buffer emptied": _Change(_buffer(counts=torch.empty(0, 3)), True),
    "buffer of an opaque type": _Change(
        lambda live: setattr(live.model, "counts", torch.zeros(3, 3).as_subclass(_Opaque)), True
    ),
    # modules
    "layer replaced": _Change(lambda live: _replace_layer(live, True), False),
    "layer replaced behind the optimizer": _Change(lambda live: _replace_layer(live, False), False),
    "layer renamed": _Change(_rename_layer, False),
    "layers swapped": _Change(_swap_layers, False),
    "layer added": _Change(_buffer(third=nn.Linear(2, 2)), False),
    "layer removed": _Change(lambda live: delattr(live.model, "right"), False),
    "layer set to None": _Change(lambda live: setattr(live.model, "right", None), False),
    "deep layer added": _Change(
        lambda live: live.model.blocks.update({"two": nn.Linear(2, 2)}), False
    ),
    "layer under a second name": _Change(
        lambda live: setattr(live.model, "again", live.model.first), False
    ),
    "parametrized": _Change(
        lambda live: parametrize.register_parametrization(
            live.model.second, "weight", _Halved(), unsafe=True
        ),
        False,
    ),
    "wrapped for recomputation": _Change(_wrap_for_recomputation, False),
    "another model": _Change(_new_model, False),
    "class with extra state": _Change(_into_class(_WithExtra), False),
    "class with its own state_dict": _Change(_into_class(_Renaming), False),
    "state_dict of an instance": _Change(_override_on_instance, False),
    "saving of an instance": _Change(_override_saving_on_instance, False),
    "hook on a layer": _Change(
        lambda live: live.model.left._register_state_dict_hook(_hook_changes), False
    ),
    "public hook on a layer": _Change(
        lambda live: live.model.left.register_state_dict_post_hook(_late_hook), False
    ),
    "early hook that adds": _Change(
        lambda live: live.model.left.register_state_dict_pre_hook(_early_hook_adds), False
    ),
    "early hook that replaces": _Change(
        lambda live: live.model.left.register_state_dict_pre_hook(_early_hook_replaces), True
    ),
    # optimizers
    "rate changed": _Change(_group(lr=0.01), True),
    "rate as a tensor": _Change(_group(lr=torch.tensor(0.01)), True),
    "rates as a long tensor": _Change(_group(lr=torch.rand(20_000)), True),
    "betas changed": _Change(_group(betas=(0.8, 0.9)), True),
    "betas as a list": _Change(_group(betas=[0.8, 0.9]), True),
    "betas as tensors": _Change(_group(betas=(torch.tensor(0.8), torch.tensor(0.9))), True),
    "betas as a list of tensors": _Change(
        _group(betas=[torch.tensor(0.8), torch.tensor(0.9)]), True
    ),
    "option as a mapping": _Change(_group(note={"deep": 1}), True),
    "option as an empty mapping": _Change(_group(note={}), True),
    "option as a list of mappings": _Change(_group(note=[{"deep": 1}]), True),
    "option much longer": _Change(_group(note="x" * 50_000), True),
    "option much longer still": _Change(_group(note="x" * 500_000), True),
    "option of another kind": _Change(_group(note=1.0), True),
    "option that is code": _Change(_group(note=_Halved()), True),
    "option added": _Change(_group(initial_lr=0.1), True),
    "option removed": _Change(lambda live: live.optimizer.param_groups[0].pop("note"), True),
    "group added": _Change(
        lambda live: live.optimizer.add_param_group(
            {"params": [live.model.left.weight], "note": 3}
        ),
        False,
    ),
    "group removed": _Change(
        lambda live: live.optimizer.state.pop(live.optimizer.param_groups.pop()["params"][0]), False
    ),
    "groups copied": _Change(_copy_groups, True),
    "group turned": _Change(
        lambda live: live.optimizer.param_groups[0]["params"].reverse(), False
    ),
    "parameter in another group": _Change(_split_group, False),
    "state loaded": _Change(_reload_optimizer, True),
    "state loaded in part": _Change(_reload_without_one, False),
    "state cleared": _Change(lambda live: live.optimizer.state.clear(), False),
    "state looked at": _Change(
        lambda live: live.optimizer.state[live.model.left.weight], False
    ),
    "state entry added": _Change(_state(more=torch.ones(3)), False),
    "state entry removed": _Change(lambda live: _entry(live).pop("exp_avg"), False),
    "state entry renamed": _Change(
        lambda live: _entry(live).update(moved=_entry(live).pop("exp_avg")), False
    ),
    "state entry of another type": _Change(_state(exp_avg=torch.ones(4, 4).half()), True),
    "state entry a number": _Change(_state(step=7), True),
    "state entry a tuple": _Change(_state(step=(1, 2)), True),
    "state entry a list of tensors": _Change(_state(exp_avg=[torch.ones(2)]), False),
    "state entry an empty mapping": _Change(_state(exp_avg={}), False),
    "state under a number": _Change(
        lambda live: _entry(live).update({0: torch.ones(1)}), False
    ),
    "state of nobody": _Change(
        lambda live: live.optimizer.state.update({"all": {"count": 1}}), False
    ),
    "another optimizer": _Change(lambda live: _new_optimizer(live, False), False),
    "another optimizer with its state": _Change(lambda live: _new_optimizer(live, True), False),
    "an optimizer just like it": _Change(_twin_optimizer, False),
    "optimizer added": _Change(_append_optimizer, False),
    "optimizer left out": _Change(lambda live: setattr(live, "optimizer", None), False),
    "optimizer hook": _Change(_optimizer_late_hook, False),
    "optimizer early hook": _Change(_optimizer_early_hook, False),
    "optimizer of another class": _Change(
        lambda live: setattr(live.optimizer, "__class__", _Doubling), False
    ),
    "state_dict of an optimizer": _Change(_override_optimizer_on_instance, False),
    # several
    "a step of several": _Change(step, True, _several),
    "rate of the second": _Change(
        lambda live: live.optimizer[1].param_groups[0].update(lr=3.0), True, _several
    ),
    "optimizers in another order": _Change(
        lambda live: live.optimizer.reverse(), False, _several
    ),
    "models in another order": _Change(lambda live: live.model.reverse(), False, _several),
    "second model replaced": _Change(
        lambda live: live.model.__setitem__(1, nn.Linear(2, 2)), False, _several
    ),
}  # fmt: skip


GETTERS_FAIL = {
    "state of nobody", "parameter replaced behind the optimizer",
    "layer replaced behind the optimizer", "parameter set to None", "bias removed",
    "layer removed", "layer set to None", "optimizer of another class", "state looked at",
    "second model replaced",
}  # fmt: skip
"""Changes after which torch's getters know no name for something."""


# -- the claim -----------------------------------------------------------------------------------


def _content(checkpoint: Path) -> dict[str, Any]:
    """Read what a checkpoint says of every name, but for what each save has anew."""
    file = (checkpoint / "__0_0.distcp").read_bytes()
    body = file[: int.from_bytes(file[-16:-8], "little")]
    found: dict[str, Any] = {}
    for each in read_index(body):
        if each.name in (RNG, DATA, TRAIN_STATE):
            continue
        if each.payload_offset is not None:
            value: Any = body[each.payload_offset : each.payload_offset + each.payload_bytes]
        else:
            stream = io.BytesIO(body[each.offset : each.offset + each.length])
            value = digest(torch.load(stream, weights_only=True))
        found[each.name] = (each.path, each.dtype, each.size, value)
    return found


def _outcome(manager: DefaultCheckpointManager, root: Path, live: Any, number: int) -> Any:
    """Save, and return what can be read back, or the type of the refusal."""
    try:
        live.save(manager, number)
        manager.finalize_async_saves(live.state, blocking=True)
    except CheckpointError as error:
        return type(error)
    return _content(root / f"iter_{number:07d}")


def _disturb(live: Any) -> None:
    """Change every value in place, so that a copy of an earlier one cannot pass for it."""
    models = [live.model] if isinstance(live.model, nn.Module) else live.model
    with torch.no_grad():
        for model in models:
            for each in [*model.parameters(), *model.buffers()]:
                if each.is_complex() or each.is_floating_point():
                    each.add_(1)
                else:
                    each.sub_(3)


class _Quick(LocalFilesystem):
    """Nobody takes the power away here."""

    def sync_file(self, path: Path, stream: Any) -> None:
        """Leave it to the page cache."""

    def sync_directory(self, path: Path) -> None:
        """Likewise."""


def _manager(root: Path) -> DefaultCheckpointManager:
    return manager_of(root, _Quick(), async_save=True)


@pytest.mark.parametrize("name", CHANGES)
def test_a_followed_save_is_what_a_fresh_one_would_be(tmp_path: Path, name: str) -> None:
    """Whatever changed since the last save, and whatever comes after, a manager that has saved
    before writes what a manager that has not writes, or refuses as that does.
    """
    change = CHANGES[name]
    live = change.build()
    followed = _manager(tmp_path / "a")
    live.save(followed, 1)
    followed.finalize_async_saves(live.state, blocking=True)
    change.make(live)
    for number in (2, 3):
        _disturb(live)
        fresh = _manager(tmp_path / f"b{number}")
        found = _outcome(followed, tmp_path / "a", live, number)
        assert found == _outcome(fresh, tmp_path / f"b{number}", live, number)
    followed.finalize_async_saves(live.state, terminate=True)


def _app(live: Any) -> AppState:
    return AppState(live.model, live.optimizer, None, None, Place(0, 1, 0, 1))


@pytest.mark.parametrize("name", [*CHANGES])
def test_the_getters_are_asked_again_only_where_they_must(name: str) -> None:
    """What is replaced in its place is followed; what is added, removed or hooked is bound anew."""
    change = CHANGES[name]
    live = change.build()
    bindings = _app(live).capture().bindings
    assert bindings is not None
    change.make(live)
    app = _app(live)
    assert (bindings.follow(app._model, app.optimizers) is not None) == change.followed


@pytest.mark.parametrize("name", [each for each in CHANGES if each != "option that is code"])
def test_what_is_taken_in_place_is_what_the_getters_give(name: str) -> None:
    """After any change the state found without torch's getters is theirs, or they are asked."""
    change = CHANGES[name]
    live = change.build()
    change.make(live)
    app = _app(live)
    views: Any = [OptimizerView(each) for each in app.optimizers]
    walk = ModelWalk.find_unhooked(app._model)
    model = read_model(walk)
    if model is not None:
        expected = get_model_state_dict(app._model)
        assert list(model) == list(expected)
        assert digest(model) == digest(expected)
    if app.optimizers and name not in GETTERS_FAIL:
        optimizer = look_up(app._model, app.optimizers, walk)
        assert isinstance(optimizer, NamedOptimizers)
        expected = get_optimizer_state_dict(app._model, views)
        assert digest(optimizer.state("optimizer")) == digest(expected["state"])
        groups: Any = expected["param_groups"]
        assert digest([dict(each.options) for each in optimizer.groups("optimizer")]) == digest(
            [{key: each[key] for key in each if key != "params"} for each in groups]
        )
        assert [[*each.names] for each in optimizer.groups("optimizer")] == [
            each["params"] for each in groups
        ]


# -- wrapped in process groups -------------------------------------------------------------------


@pytest.fixture
def _one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def _wrap_in_ddp(live: Any) -> None:
    live.model = nn.parallel.DistributedDataParallel(live.model)


def _shard(live: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = [name for name, each in live.model.named_parameters() if each.requires_grad]
    fully_shard(live.model, mesh=init_device_mesh("cpu", (1,)))
    parameters = dict(live.model.named_parameters())
    live.optimizer = torch.optim.AdamW([parameters[name] for name in names], lr=0.1)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("wrap", [_wrap_in_ddp, _shard])
def test_a_wrapped_model_is_followed_and_never_stale(
    tmp_path: Path, wrap: Callable[[Any], None]
) -> None:
    """Wrapping a model between two saves binds it anew; wrapped, it is followed through steps."""
    live = _plain()
    followed = _manager(tmp_path / "a")
    live.save(followed, 1)
    wrap(live)
    for number in (2, 3, 4):
        fresh = _manager(tmp_path / f"b{number}")
        found = _outcome(followed, tmp_path / "a", live, number)
        assert found == _outcome(fresh, tmp_path / f"b{number}", live, number)
        fresh.finalize_async_saves(live.state, terminate=True)
        loss = live.model(torch.rand(2, 4)).sum()
        loss.backward()
        live.optimizer.step()
    app = _app(live)
    bindings = app.capture().bindings
    assert bindings is not None
    live.model(torch.rand(2, 4)).sum()  # leaves FSDP's parameters gathered
    leaves = bindings.follow(app._model, app.optimizers)
    assert leaves is not None
    assert {name: digest(each) for name, each in leaves.values.items()} == {
        name: digest(each) for name, each in app.capture().leaves.values.items()
    }
    followed.finalize_async_saves(live.state, terminate=True)

"""What is taken where it lies is what torch's getters give, or torch is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, not in __all__
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from holdfast.errors import UnsupportedStateError
from holdfast.state.model import ModelWalk, read_model
from holdfast.state.optimizer import FlattenedOptimizers, look_up


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.inner[0].weight  # type: ignore[assignment]  # it is a linear layer
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.register_buffer("absent", None)
        self.module = nn.Linear(4, 4)  # named as what DDP adds, and no wrapper

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.module(self.tied(self.inner(inputs)) * self.scale)
        return found


def _around(net: nn.Module) -> nn.Module:
    return nn.ModuleList([net, nn.Linear(2, 2)])


def _part_compiled(net: nn.Module) -> nn.Module:
    assert isinstance(net, _Net)
    net.inner = torch.compile(net.inner)  # type: ignore[assignment]  # wrapped
    return net


def _sharded(net: nn.Module) -> nn.Module:
    assert isinstance(net, _Net)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(net.module, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


PLAIN: dict[str, Callable[[nn.Module], nn.Module]] = {
    "a module": lambda net: net,
    "a list of modules": _around,
    "compiled": torch.compile,  # type: ignore[dict-item]  # a module, of a module
    "compiled in part": _part_compiled,
    "DDP": nn.parallel.DistributedDataParallel,
    "compiled DDP": lambda net: torch.compile(nn.parallel.DistributedDataParallel(net)),  # type: ignore[return-value]
    "DDP inside": lambda net: _around(nn.parallel.DistributedDataParallel(net)),
    "FSDP2": _sharded,
}


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def _is_where(one: Any, other: Any) -> bool:
    """Whether two values are one, or tensors over the same memory."""
    if not isinstance(one, Tensor):
        return bool(one == other)
    mine, theirs = (getattr(each, "_local_tensor", each) for each in (one, other))
    return (
        one.shape == other.shape
        and mine.dtype == theirs.dtype
        and mine.data_ptr() == theirs.data_ptr()
        and mine.stride() == theirs.stride()
    )


def _stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    return optimizer


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile imports it
@pytest.mark.parametrize("kind", PLAIN)
def test_it_is_what_the_getters_give(kind: str) -> None:
    """The same names in the same order, of the same memory, and the same groups."""
    torch.manual_seed(0)
    model = PLAIN[kind](_Net())
    optimizer = _stepped(model)
    found, expected = read_model(ModelWalk.find_unhooked(model)), get_model_state_dict(model)
    assert found is not None
    assert list(found) == list(expected)
    assert all(_is_where(found[name], expected[name]) for name in found)
    for walk in (ModelWalk.find_unhooked(model), None):  # None: torch gives the names
        own = look_up(model, [optimizer], walk)
        theirs: Any = get_optimizer_state_dict(model, optimizer)
        assert [
            {**each.options, "params": list(each.names)} for each in own.groups("optimizer")
        ] == theirs["param_groups"]
        state = own.state("optimizer")
        assert list(state) == list(theirs["state"])
        for name, entries in state.items():
            assert list(entries) == list(theirs["state"][name])
            assert all(entries[key] is theirs["state"][name][key] for key in entries)


def test_sharded_parameters_are_in_shards_again() -> None:
    """Where a forward left them whole, FSDP2's parameters are taken as a state dict shows them."""
    model = _sharded(_Net())
    model(torch.rand(3, 4))  # without a backward
    found, expected = read_model(ModelWalk.find_unhooked(model)), get_model_state_dict(model)
    assert found is not None
    assert all(_is_where(found[name], expected[name]) for name in expected)


class _Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"count": 1}


def _listening(net: nn.Module) -> nn.Module:
    net.register_state_dict_pre_hook(lambda *_: None)
    return net


def _late(net: nn.Module) -> nn.Module:
    net.register_state_dict_post_hook(lambda *_: None)
    return net


def _renaming(net: nn.Module) -> nn.Module:
    net._fqn_modifiers = lambda: {"scale": "other"}  # type: ignore[assignment]  # as torch asks
    return net


def _holding_more(net: nn.Module) -> nn.Module:
    wrapped = nn.parallel.DistributedDataParallel(net)
    wrapped.more = nn.Linear(2, 2)
    return wrapped


class _Odd(Tensor):
    """A type that may show itself as something else."""


def _of_another_type(net: nn.Module) -> nn.Module:
    net.register_buffer("odd", torch.ones(2).as_subclass(_Odd))
    return net


def _leaving_out(net: nn.Module) -> nn.Module:
    return nn.ModuleDict({"_checkpoint_wrapped_module": net})


OTHERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "extra state": lambda net: nn.ModuleList([net, _Extra(2, 2)]),
    "a parameter that is not there yet": lambda net: nn.ModuleList([net, nn.LazyLinear(3)]),
    "an early hook": _listening,
    "a late hook": _late,
    "names of its own": _renaming,
    "a part that is left out of names": _leaving_out,
    "a wrapper that holds more": _holding_more,
    "a tensor of another type": _of_another_type,
    "activation checkpointing": checkpoint_wrapper,
    "FSDP1": lambda net: FullyShardedDataParallel(net, device_id=torch.device("cpu")),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", OTHERS)
def test_torch_is_asked_where_it_must_be(kind: str) -> None:
    """Hooks, overrides and wrappers of their own are left to torch."""
    assert read_model(ModelWalk.find_unhooked(OTHERS[kind](_Net()))) is None


def test_an_optimizer_that_has_no_place_is_refused_by_name() -> None:
    """One that trains nothing of the model, or has state of no parameter, is not passed over."""
    model = _Net()
    stranger = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    loose = torch.optim.SGD(model.parameters(), lr=0.1)
    loose.state["all"] = {"count": 1}  # type: ignore[index]  # state of no parameter
    for optimizer, part in ((stranger, "is no parameter of the model"), (loose, "for 'all'")):
        with pytest.raises(UnsupportedStateError, match=part):
            look_up(model, [optimizer], ModelWalk.find_unhooked(model))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_what_fsdp1_flattened_is_left_to_torch() -> None:
    """Only torch's getters know its parameters by name."""
    model = FullyShardedDataParallel(_Net(), device_id=torch.device("cpu"))
    found = look_up(model, [torch.optim.SGD(model.parameters(), lr=0.1)], None)
    assert isinstance(found, FlattenedOptimizers)

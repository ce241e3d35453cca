"""State that was read into live tensors, and how little is then left to give back.

Owns the question whether a model or an optimizer has all of its restored state already because it
was read into its own tensors, and the short way of giving an optimizer the rest. Torch's setters
walk every module and rebuild every dictionary to copy tensors onto themselves. Promises to answer
yes only for state dicts that nothing overrides or hooks into, and whose every entry is the live
tensor itself; whatever is not in plain sight takes torch's way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from holdfast.state.plain import is_plain_module, is_plain_optimizer, only_shard

_LOADING = ("load_state_dict", "_load_from_state_dict", "set_extra_state")
"""What a module may bring of its own for being loaded."""


def has_landed(model: nn.Module, live: Mapping[str, Any], restored: Mapping[str, Any]) -> bool:
    """Whether every restored entry of a model is the live tensor that its state dict shows."""
    return all(map(_takes_as_is, model.modules())) and _are_same(restored, live)


def finish_optimizers(
    optimizers: Sequence[Optimizer], live: Mapping[str, Any], restored: Mapping[str, Any]
) -> bool:
    """Give optimizers whose tensors hold their state already what else there is, if all is alike.

    `live` and `restored` are nested as torch's getter shows them. False: nothing was changed, since
    names, groups or options differ, or something is not in plain sight.
    """
    groups, saved_groups = live["param_groups"], restored.get("param_groups", ())
    own_groups = [group for each in optimizers for group in each.param_groups]
    if not (
        all(map(_optimizer_takes_as_is, optimizers))
        and len(own_groups) == len(groups) == len(saved_groups)
        and live["state"].keys() == restored["state"].keys()
        and all(map(_is_alike, own_groups, groups, saved_groups))
        and all(
            live["state"][name].keys() == state.keys() and _are_same(state, live["state"][name])
            for name, state in restored["state"].items()
        )
    ):
        return False
    for group, saved in zip(own_groups, saved_groups, strict=True):
        group.update({key: deepcopy(saved[key]) for key in saved if key != "params"})
    for each in optimizers:
        # What torch's own loading ends with: some optimizers complete older state here.
        each.__setstate__({"state": each.state, "param_groups": each.param_groups})
    return True


def _are_same(restored: Mapping[str, Any], live: Mapping[str, Any]) -> bool:
    return all(
        isinstance(value, torch.Tensor) and live.get(name) is value
        for name, value in restored.items()
    )


def _is_alike(own: Mapping[str, Any], live: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Whether a group has the same parameters in the same order, and the same plain options."""
    return (
        own.keys() == live.keys() == saved.keys()
        and len(own["params"]) == len(live["params"])
        and live["params"] == saved["params"]
        and not any(
            isinstance(each, torch.Tensor)
            for key in saved
            if key != "params"
            for each in (own[key], saved[key])
        )
    )


def _takes_as_is(module: nn.Module) -> bool:
    kind, given = type(module), vars(module)
    return (
        is_plain_module(module)
        and all(
            getattr(kind, name) is getattr(nn.Module, name) and name not in given
            for name in _LOADING
        )
        and only_shard(module._state_dict_pre_hooks.values())
        and only_shard(module._load_state_dict_pre_hooks.values())
        and only_shard(module._load_state_dict_post_hooks.values())
    )


def _optimizer_takes_as_is(optimizer: Optimizer) -> bool:
    return (
        is_plain_optimizer(optimizer)
        and type(optimizer).load_state_dict is Optimizer.load_state_dict
        and "load_state_dict" not in vars(optimizer)
        and not optimizer._optimizer_load_state_dict_pre_hooks
        and not optimizer._optimizer_load_state_dict_post_hooks
    )

"""What a newcomer may do wrong, and the message that each mistake gets.

Each call is the first one of a fresh manager. Nothing may be touched by it: neither live state nor
the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast import (
    CallbackManager,
    CheckpointConfig,
    CheckpointLoadContext,
    CheckpointSaveContext,
    DefaultCheckpointManager,
    GlobalState,
    TrainState,
    create_checkpoint_manager,
)
from holdfast.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    NothingLoadedError,
    UnsupportedStateError,
    WrongArgumentError,
)
from tests.support.managers import Live, linear
from tests.support.stores import tree


class Newcomer:
    """A model, its optimizer and scheduler, and a fresh manager of an empty directory."""

    def __init__(self, root: Path) -> None:
        live = linear()
        self.live = Live(live.model, live.optimizer, state=live.state)
        self.live.scheduler = torch.optim.lr_scheduler.ConstantLR(live.optimizer)
        self.model: Any = live.model
        self.optimizer: Any = live.optimizer
        self.scheduler: Any = self.live.scheduler
        self.state: Any = live.state
        self.state.train_state.step = 1
        self.other: Any = nn.Linear(4, 2)
        self.own_entry: Any = nn.Sequential(OwnEntry(4, 2))
        self.root = root
        self.file = root / "notes.txt"
        self.file.write_text("a file")
        (root / "circle").symlink_to(root / "circle")

    def manager(self, directory: str = "store", **values: Any) -> Any:
        """Return a manager; directories are relative to the test's own."""
        for section in ("load", "local"):
            if "directory" in values.get(section, ()):
                values[section]["directory"] = str(self.root / values[section]["directory"])
        persistent = {"directory": str(self.root / directory)}
        return DefaultCheckpointManager({"persistent": persistent, **values})

    def save(self, *arguments: Any, listener: Any = None, **given: Any) -> None:
        """Save with a context of these arguments."""
        self.manager().save(self.context(*arguments, **given), listener)

    def load(self, *arguments: Any, **given: Any) -> None:
        """Load with a context of these arguments."""
        given = {"kind": CheckpointLoadContext, **given}
        self.manager(**given.pop("config", {})).load(self.context(*arguments, **given))

    def context(self, *arguments: Any, kind: Any = CheckpointSaveContext, **given: Any) -> Any:
        """Return a context: of these arguments in their order, or of what is right but for some."""
        right = {
            "state": self.state,
            "model": self.model,
            "optimizer": self.optimizer,
            "opt_param_scheduler": self.scheduler,
        }
        return kind(*arguments) if arguments else kind(**{**right, **given})


class Wrapper:
    """An optimizer around another, as LARC and Lookahead are: no torch Optimizer."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state)


class OwnShape(torch.optim.AdamW):
    def state_dict(self) -> Any:
        return {"base": super().state_dict(), "extra": 1}


class OwnEntry(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "history"] = torch.ones(2)


def _stepped(optimizer: Any, model: nn.Module) -> Any:
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _save_own_entry(it: Newcomer) -> None:
    it.save(model=it.own_entry, optimizer=None, opt_param_scheduler=None)


def _save_stranger(it: Newcomer) -> None:
    it.save(optimizer=_stepped(torch.optim.AdamW(it.other.parameters()), it.other))


Call = Callable[[Newcomer], Any]
WRONG, CONFIG, STATE = WrongArgumentError, ConfigError, UnsupportedStateError
CALLS: list[tuple[str, Call, type[CheckpointError], str]] = [
    # contexts
    ("load with a save context", lambda it: it.load(kind=CheckpointSaveContext),
     WRONG, "load: ctx is a CheckpointSaveContext.\nPass holdfast.CheckpointLoadContext("),
    ("save with a load context", lambda it: it.save(kind=CheckpointLoadContext),
     WRONG, "save: ctx is a CheckpointLoadContext.\nPass holdfast.CheckpointSaveContext("),
    ("save the state", lambda it: it.manager().save(it.state),
     WRONG, "save: ctx is a GlobalState, which has no state, model, optimizer"),
    ("save the class", lambda it: it.manager().save(CheckpointSaveContext),
     WRONG, "ctx is the class CheckpointSaveContext, not an object of it"),
    ("load nothing", lambda it: it.manager().load(None), WRONG, "load: ctx is None, which has no"),
    # models
    ("a state_dict as model", lambda it: it.save(model=it.model.state_dict()),
     WRONG, "save: model is an OrderedDict of tensors, as model.state_dict() returns"),
    ("a dict of tensors as model", lambda it: it.load(model={"weight": torch.ones(2)}),
     WRONG, "load: model is a dict of tensors"),
    ("models by numbers", lambda it: it.save(model={0: it.model}),
     WRONG, "model is a dict of modules with the key 0, which is no string"),
    ("a model with a dot", lambda it: it.save(model={"actor.old": it.model}),
     WRONG, "model is a dict of modules with the key 'actor.old': names have no dots"),
    ("a model named as a method", lambda it: it.load(model={"train": it.model}),
     WRONG, "with the key 'train', which is an attribute of every nn.ModuleDict"),
    ("a hole among models", lambda it: it.load(model={"actor": it.model, "critic": None}),
     WRONG, "model is a dict of modules whose 'critic' is None"),
    ("no model", lambda it: it.load(model=None),
     WRONG, "load: model is None.\nPass the nn.Module itself"),
    ("a list with a hole", lambda it: it.save(model=[it.model, None]),
     WRONG, "model is a list whose item 1 is None"),
    ("the class of a model", lambda it: it.load(model=nn.Linear),
     WRONG, "model is the class Linear, not an object of it"),
    # optimizers and schedulers
    ("optimizer and scheduler swapped",
     lambda it: it.save(it.state, it.model, it.scheduler, it.optimizer),
     WRONG, "optimizer is a ConstantLR, a scheduler.\nPass the torch.optim.Optimizer"),
    ("model and optimizer swapped", lambda it: it.load(it.state, it.optimizer, it.model, None),
     WRONG, "model is an AdamW.\nPass the nn.Module itself, a list of modules, or a dict"),
    ("an optimizer as scheduler", lambda it: it.load(opt_param_scheduler=it.optimizer),
     WRONG, "opt_param_scheduler is an AdamW, an optimizer"),
    ("parameters as optimizer", lambda it: it.save(optimizer=it.model.parameters()),
     WRONG, "optimizer is a generator.\nPass the torch.optim.Optimizer"),
    ("an optimizer's state_dict", lambda it: it.load(optimizer=it.optimizer.state_dict()),
     WRONG, "optimizer is a dict, as optimizer.state_dict() returns"),
    ("optimizers by numbers", lambda it: it.load(optimizer={1: it.optimizer}),
     WRONG, "optimizer is a dict of optimizers with the key 1, which is no string"),
    ("a hole among named optimizers",
     lambda it: it.save(optimizer={"actor": it.optimizer, "critic": None}),
     WRONG, "optimizer is a dict of optimizers whose 'critic' is None"),
    ("strictness of a word", lambda it: it.load(strict="log"),
     WRONG, "strict is 'log'; it must be true or false, or as {names: warn}"),
    ("strictness of nothing", lambda it: it.load(strict={"name": "warn"}),
     WRONG, "strict.name is unknown; the subjects are names, shapes"),
    ("strictness with another word",
     lambda it: it.load(config={"load": {"strict": {"names": "log"}}}),
     CONFIG, "checkpoint.load.strict.names is 'log'; choose one of raise, warn, ignore"),
    ("a hole among optimizers", lambda it: it.save(optimizer=[it.optimizer, 5]),
     WRONG, "optimizer is a list whose item 1 is 5"),
    ("a list of schedulers", lambda it: it.save(opt_param_scheduler=[it.scheduler]),
     WRONG, "opt_param_scheduler is a list, which has no state_dict and load_state_dict"),
    # states and what goes along
    ("no state", lambda it: it.save(state=None), WRONG, "save: state is None, which has no train"),
    ("a number as state", lambda it: it.load(state=5), WRONG, "load: state is 5, which has no"),
    ("counters as state", lambda it: it.save(state=TrainState()),
     WRONG, "state is a TrainState.\nPass a holdfast.GlobalState(train_state=...)"),
    ("the class of the state", lambda it: it.load(state=GlobalState),
     WRONG, "state is the class GlobalState, not an object of it"),
    ("counters that are a dict", lambda it: it.save(state=GlobalState(train_state={"step": 1})),
     WRONG, "state.train_state is a dict, which has no step"),
    ("finalize nothing", lambda it: it.manager().finalize_async_saves(None),
     WRONG, "finalize_async_saves: state is None"),
    ("finalize a step", lambda it: it.manager().finalize_async_saves(100, blocking=True),
     WRONG, "finalize_async_saves: state is 100"),
    ("finalize a context", lambda it: it.manager().finalize_async_saves(it.context()),
     WRONG, "state is a CheckpointSaveContext.\nPass the context's state"),
    ("a function as callback manager", lambda it: it.save(listener=print),
     WRONG, "which has no fire(name, event).\nPass a holdfast.CallbackManager()"),
    ("a callback that is none", lambda it: CallbackManager().register("on_checkpoint_save", 5),
     WRONG, "register: callback is of type int"),
    ("operations in a tensor",
     lambda it: it.save(num_floating_point_operations_so_far=torch.ones(())),
     WRONG, "num_floating_point_operations_so_far is a Tensor.\nPass a plain number"),
    ("a step that is a text", lambda it: it.save(state=GlobalState(None, TrainState(step="5"))),
     STATE, "train_state.step is '5', which names no iteration"),
    # configurations
    ("no config", lambda it: DefaultCheckpointManager(None),
     CONFIG, "checkpoint is None; pass a CheckpointConfig or a mapping"),
    ("a path as config", lambda it: create_checkpoint_manager("checkpoints"),
     CONFIG, "checkpoint is of type str"),
    ("the class of the config", lambda it: DefaultCheckpointManager(CheckpointConfig),
     CONFIG, "checkpoint is the class CheckpointConfig"),
    ("no directory", lambda it: create_checkpoint_manager({}),
     CONFIG, "checkpoint.persistent.directory is null; name where checkpoints are kept"),
    ("a section left out", lambda it: it.manager(keep={"last": 3}),
     CONFIG, "checkpoint.keep is unknown; did you mean checkpoint.persistent.keep.last?"),
    ("a section left out, and flat", lambda it: create_checkpoint_manager({"directory": "x"}),
     CONFIG, "checkpoint.directory is unknown; did you mean checkpoint.persistent.directory?"),
    ("dots in place of levels", lambda it: create_checkpoint_manager({"load.step": 3}),
     CONFIG, 'checkpoint.load.step is unknown; nest it: {"load": {"step": ...}}'),
    ("an underscore for a level", lambda it: create_checkpoint_manager(
        {"persistent": {"keep_last": 3}}), CONFIG, "did you mean checkpoint.persistent.keep.last?"),
    # directories
    ("a file as directory", lambda it: it.manager("notes.txt"),
     CONFIG, "notes.txt is a file; name a directory"),
    ("a directory under a file", lambda it: it.manager("notes.txt/store"),
     CONFIG, "notes.txt is a file, so that {root}/notes.txt/store cannot be made"),
    ("a file as local directory", lambda it: it.manager(local={"directory": "notes.txt"}),
     CONFIG, "checkpoint.local.directory: {root}/notes.txt is a file"),
    ("links in a circle", lambda it: it.manager("circle"),
     CONFIG, "circle cannot be reached: ELOOP"),
    ("a name too long", lambda it: it.manager("a" * 300), CONFIG, "ENAMETOOLONG"),
    ("a null character", lambda it: it.manager("a\0b"), CONFIG, "it holds a null character"),
    ("load from nowhere", lambda it: it.load(config={"load": {"directory": "nowhere"}}),
     CheckpointNotFoundError, "checkpoint.load.directory: {root}/nowhere does not exist"),
    ("load from a file", lambda it: it.load(config={"load": {"directory": "notes.txt"}}),
     CheckpointNotFoundError, "notes.txt is a file, and belongs to no checkpoint"),
    ("load through a circle", lambda it: it.load(config={"load": {"directory": "circle"}}),
     CheckpointNotFoundError, "circle is a link that leads nowhere"),
    ("load from a name too long", lambda it: it.load(config={"load": {"directory": "a" * 300}}),
     CheckpointNotFoundError, "cannot be reached: ENAMETOOLONG"),
    ("open nothing", lambda it: holdfast.open_tensors(None),  # type: ignore[arg-type]
     WRONG, "open_tensors: path is of type NoneType"),
    ("restore before a load", lambda it: it.manager().restore_rng(),
     NothingLoadedError, "call load first"),
    # state of a shape of its own
    ("an optimizer of another model", _save_stranger,
     STATE, "optimizer (AdamW): param_groups[0].params[0], of shape (2, 4), is no parameter of"),
    ("an optimizer with a state_dict of its own",
     lambda it: it.save(optimizer=OwnShape(it.model.parameters())),
     STATE, "optimizer (OwnShape): its state_dict() has base, extra, not state and param_groups"),
    ("a model with an entry of its own", _save_own_entry,
     STATE, "model.0.history: state_dict() of the model has it"),
    ("a wrapped optimizer, overlapped", lambda it: it.load(
        optimizer=Wrapper(it.optimizer), config={"staging": "overlapped"}),
     STATE, "checkpoint.staging=overlapped: a Wrapper has no register_step_pre_hook"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "kind", "part"), [pytest.param(*rest, id=name) for name, *rest in CALLS]
)
def test_a_wrong_call_is_refused_by_name(
    tmp_path: Path, call: Call, kind: type[CheckpointError], part: str
) -> None:
    """Each mistake gets a typed error that names it, in three lines, and nothing was touched."""
    it = Newcomer(tmp_path)
    before, on_disk = it.live.digests(), tree(tmp_path)
    with pytest.raises(kind) as caught:
        call(it)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert part.replace("{root}", str(tmp_path)) in message
    assert len(message.splitlines()) <= 3
    assert it.live.digests() == before
    if kind is not UnsupportedStateError:  # which is found in a save that has been admitted
        assert tree(tmp_path) == on_disk


RIGHT: list[tuple[str, Call]] = [
    ("lists", lambda it: it.save(model=[it.model], optimizer=[it.optimizer])),
    ("no optimizer", lambda it: it.save(optimizer=None, opt_param_scheduler=None)),
    ("no optimizers", lambda it: it.load(optimizer=[])),
    ("a wrapped optimizer", lambda it: it.save(optimizer=Wrapper(it.optimizer))),
    ("a listener of another kind", lambda it: it.save(listener=SimpleNamespace(fire=max))),
    ("counters of another kind",
     lambda it: it.save(state=SimpleNamespace(cfg=None, train_state=TrainState(step=1)))),
    ("a context of another kind",
     lambda it: it.manager().save(SimpleNamespace(**vars(it.context())))),
]  # fmt: skip


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in RIGHT])
def test_what_has_the_right_attributes_passes(tmp_path: Path, call: Call) -> None:
    """Contexts, states and optimizers of other trainers are told from mistakes."""
    call(Newcomer(tmp_path))

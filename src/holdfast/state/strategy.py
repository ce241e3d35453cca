"""What a load restores and what it leaves as it is: one table of parts and rules.

Owns `LoadStrategy`, what its parts depend on (`decide`, a pure function that returns what is done
and why, for the strategy together with `load.override`, `load.rng`, `load.pretrained.what` and
`skip_load_to_model_and_opt`), and names: those that are left as they are (globs), and those that
were saved under another name. Refuses what names nothing, and lists what is near.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from holdfast.errors import ConfigError
from holdfast.messages import name_first, suggest
from holdfast.state.groups import GROUPS
from holdfast.state.model import MODEL, migrate_names
from holdfast.state.naming import STATE, is_root
from holdfast.state.overrides import COMPONENTS
from holdfast.state.saved import SavedTensors

PARTS = ("model", "optimizer", "scheduler", "data", "metrics", "rng", "iteration")
_SETTING = "checkpoint.load.strategy"
_RESTORED = "restored"
_KEPT_BY = {"iteration": "train_state", "metrics": "components.metrics"}
"""What `load.override` calls a part, where it is not the part's name."""


@dataclass(frozen=True)
class LoadStrategy:
    """Which parts of a checkpoint a load restores; the others keep their live state."""

    model: bool = True
    optimizer: bool = True
    """Not without the model: moments belong to the weights that they were made with."""
    scheduler: bool = True
    data: bool = True
    """The position in the data."""
    metrics: bool = True
    """The component `metrics`."""
    rng: bool = True
    iteration: bool = True
    """The counters. False: the load's result is iteration 0, and all counters are as they are."""
    ignore_keys: tuple[str, ...] = ()
    """Globs of names as a checkpoint has them, `model.head.*` or `components.ema`, that keep their
    live values; of parameters the optimizer state too."""
    rename: tuple[tuple[str, str], ...] = ()
    """Pairs of a regular expression and what replaces it (`re.sub`), applied in order to the saved
    names of the model, as its state dict has them. A mapping is taken as its pairs."""

    @classmethod
    def of(cls, given: LoadStrategy | Mapping[str, Any] | None) -> LoadStrategy:
        """Return a strategy from one, from a mapping of its fields, or the default from None.

        Raises:
            ConfigError: with every problem.
        """
        if given is None:
            return cls()
        values = vars(given) if isinstance(given, LoadStrategy) else given
        if not isinstance(values, Mapping):
            raise ConfigError([f"{_SETTING} is {given!r}; it must be a mapping"])
        names = [each.name for each in fields(cls)]
        problems: list[str] = []
        found: dict[str, Any] = {}
        for name, value in values.items():
            if name not in names:
                near = suggest(str(name), names)
                known = f"did you mean {near}?" if near else f"it has {', '.join(names)}"
                problems.append(f"{_SETTING}.{name} is unknown; {known}")
            elif name == "ignore_keys":
                found[name] = _read_globs(value, problems)
            elif name == "rename":
                found[name] = _read_pairs(value, problems)
            elif not isinstance(value, bool):
                problems.append(f"{_SETTING}.{name} is {value!r}; it must be true or false")
            else:
                found[name] = value
        if problems:
            raise ConfigError(problems)
        return cls(**found)

    def ignores(self, name: str) -> bool:
        """Whether a name of the checkpoint, or its parameter in the model, is left as it is."""
        root, _, rest = name.partition(".")
        names = (name, MODEL + rest) if is_root(root) else (name,)
        return any(fnmatch.fnmatchcase(one, each) for one in names for each in self.ignore_keys)

    def keeps_component(self, override: Collection[str], name: str) -> bool:
        """Whether a component keeps its live value; `components` in `override`: all do."""
        full = f"components.{name}"
        is_part = full in self.kept(()) or self.ignores(full)
        return is_part or full in override or "components" in override

    def kept(self, override: Collection[str], **given: bool) -> set[str]:
        """Return the components that keep their live values; `given`: as of `decide`."""
        decisions = decide(self, override, **given)
        parts = {part for part, each in decisions.items() if not each.is_restored}
        small = {each for each in COMPONENTS if self.ignores(each)}
        return {_KEPT_BY.get(each, each) for each in parts - {"iteration"}} | small


def _read_globs(value: Any, problems: list[str]) -> tuple[str, ...]:
    if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        return tuple(value)
    problems.append(f"{_SETTING}.ignore_keys is {value!r}; it must be a list of names or globs")
    return ()


def _read_pairs(value: Any, problems: list[str]) -> tuple[tuple[str, str], ...]:
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    where = f"{_SETTING}.rename"
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(each, list | tuple) and len(each) == 2 and all(type(s) is str for s in each)
        for each in pairs
    ):
        problems.append(f"{where} is {value!r}; it must be a mapping, or a list of pairs")
        return ()
    for pattern, replacement in pairs:
        try:
            re.sub(pattern, replacement, "")
        except (re.error, IndexError) as error:
            problems.append(f"{where} has {pattern!r} -> {replacement!r}: {error}")
    return tuple((pattern, replacement) for pattern, replacement in pairs)


@dataclass(frozen=True)
class PartDecision:
    """What a load does with one part."""

    is_restored: bool
    reason: str = _RESTORED


def decide(
    strategy: LoadStrategy,
    override: Collection[str] = (),
    *,
    rng: bool = True,
    weights_only: bool = False,
    skips_tensors: bool = False,
) -> dict[str, PartDecision]:
    """Return what a load does with each part, and why.

    `override`: as `load.override`. `rng`: as `load.rng`. `weights_only`: the run starts from
    `load.pretrained` with `what: weights`. `skips_tensors`: as `skip_load_to_model_and_opt`.
    """
    found: dict[str, PartDecision] = {}
    for part in PARTS:
        reasons = {
            "skip_load_to_model_and_opt": skips_tensors and part in ("model", "optimizer"),
            f"strategy.{part}=false": not getattr(strategy, part),
            "load.pretrained.what=weights": weights_only and part != "model",
            f"load.override={_KEPT_BY.get(part, part)}": _KEPT_BY.get(part, part) in override,
            "load.rng=false": part == "rng" and not rng,
            "the model is not restored, and moments belong to its weights": (
                part == "optimizer" and not found["model"].is_restored
            ),
        }
        reason = next((text for text, applies in reasons.items() if applies), None)
        found[part] = PartDecision(reason is None, reason or _RESTORED)
    return found


# -- names ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Renaming:
    """New names of the saved state of a model, by the saved ones; others stay."""

    forward: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def find(
        cls,
        strategy: LoadStrategy,
        saved: SavedTensors,
        model: nn.Module,
    ) -> Renaming:
        """Apply the strategy's pairs to saved names, and ask the model what it makes of them.

        Raises:
            ConfigError: a pair changes no name, or two names become one.
            Exception: whatever a hook of the model raised.
        """
        owners = {name: path[1] for name, path in saved.key_paths.items() if path[0] == "model"}
        names = {each: each for each in owners.values()}
        for pattern, replacement in strategy.rename:
            changed = {old: re.sub(pattern, replacement, now) for old, now in names.items()}
            if changed == names:
                shown = name_first(sorted(names.values()))
                problem = f"{_SETTING}.rename: {pattern!r} changes none of the saved names: {shown}"
                raise ConfigError([problem])
            names = changed
        forms = {
            names[owner]: (saved.tensors[name].size, saved.tensors[name].properties.dtype)
            for name, owner in owners.items()
            if name in saved.tensors
        }
        migrated = migrate_names(model, forms)
        names = {old: migrated.get(now, now) for old, now in names.items()}
        for now, count in Counter(names.values()).items():
            if count > 1:
                olds = ", ".join(sorted(old for old, each in names.items() if each == now))
                raise ConfigError([f"{_SETTING}.rename: {olds} would all become {now}"])
        return cls({old: now for old, now in names.items() if old != now})

    def apply(self, saved: SavedTensors) -> SavedTensors:
        """Return what a checkpoint holds under its new names."""
        if not self.forward:
            return saved
        names = {name: self.name(name, path) for name, path in saved.key_paths.items()}
        paths = {names[name]: self._path(path) for name, path in saved.key_paths.items()}
        return replace(
            saved,
            tensors={names[name]: each for name, each in saved.tensors.items()},
            values={names[name]: self._value(name, each) for name, each in saved.values.items()},
            key_paths=paths,
            hollow=[self._path(each) for each in saved.hollow],
            records={
                name: [self._value(name, each) for each in found]
                for name, found in saved.records.items()
            },
            kinds={names[name]: each for name, each in saved.kinds.items()},
        )

    def name(self, name: str, path: Sequence[Any]) -> str:
        """Return the new flat name of one with these nested keys."""
        now = self._path(path)
        return name if now == tuple(path) else ".".join(map(str, now))

    def _path(self, path: Sequence[Any]) -> tuple[Any, ...]:
        at = 1 if path[0] == "model" else 2
        is_named = path[0] == "model" or (is_root(path[0]) and path[1:2] == (STATE,))
        if not is_named or len(path) <= at:
            return tuple(path)
        return (*path[:at], self.forward.get(path[at], path[at]), *path[at + 1 :])

    def _value(self, name: str, value: Any) -> Any:
        if not name.endswith(f".{GROUPS}") or not isinstance(value, list):
            return value
        return [
            {**each, "params": [self.forward.get(one, one) for one in each["params"]]}
            if isinstance(each, Mapping) and isinstance(each.get("params"), list)
            else each
            for each in value
        ]


def find_unused(strategy: LoadStrategy, names: Collection[str]) -> list[str]:
    """Return the globs that none of these names matches."""
    return [
        each
        for each in strategy.ignore_keys
        if not any(fnmatch.fnmatchcase(name, each) for name in names)
    ]


def make_unused_error(unused: Sequence[str], names: Collection[str]) -> ConfigError:
    """Return the error for globs that match nothing, with names that are near."""
    known = sorted(names)
    parts = (name.split(".") for name in known)
    starts = {".".join(each[: at + 1]): None for each in parts for at in range(len(each))}
    problems = []
    for each in unused:
        near = suggest(each.rstrip(".*"), [*starts])
        hint = f"did you mean {near}?" if near else f"there are {name_first(known)}"
        problems.append(f"{_SETTING}.ignore_keys: {each} matches no name; {hint}")
    return ConfigError(problems)

"""Select the checkpoint to load: one pure function of the settings and of what exists.

Owns every rule about which checkpoint a load takes, when it may take another one instead, when a
run starts fresh or from another run's checkpoint, and when it is refused. Promises that equal facts
give the same choice on every rank, with its reason. Reads nothing: `survey` and, for the local
tier, `local.availability` supply each commit's condition, and `search` asks again after it found a
checkpoint damaged. `docs/loading.md` has these rules as a table.

`load.step` takes effect in `effective_step`: it applies once per run. `search` reads from the
attempts which of them applied it; the first save after the load records it in its attempt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from holdfast.errors import CheckpointError
from holdfast.storage.manifest import LOCAL


class Condition(Enum):
    """What is known of a checkpoint before its tensors are read."""

    SOUND = "sound"
    """Judged by its record and the sizes of its files."""
    DAMAGED = "damaged"
    """Its record or its files are not what was committed, or cannot be read."""
    TOO_NEW = "too new"
    """A later version of holdfast wrote it."""
    SUPERSEDED = "superseded"
    """A later start of the run resumed from an earlier iteration."""
    OTHER_RUN = "another run's"
    """It is in this store, but belongs to another run or to none."""


@dataclass(frozen=True)
class Commit:
    """One checkpoint of one tier, as surveyed."""

    tier: str
    iteration: int | None
    """None: it cannot be read."""
    sequence: int | None
    """Its place in the order of commits over both tiers. None: it cannot be read."""
    condition: Condition = Condition.SOUND
    reason: str = ""
    """Why it is not sound."""
    path: str = ""
    error: CheckpointError | None = field(default=None, compare=False)
    """The error to raise if this one was requested and cannot be loaded."""

    @property
    def order(self) -> tuple[int, bool]:
        """Larger is tried first: the newest commit; of two equally new, the local one."""
        return (self.sequence or 0, self.tier == LOCAL)


@dataclass(frozen=True)
class Asked:
    """The settings of a load."""

    names_other_place: bool = False
    """`load.directory` is set, and is not the run's own store."""
    step: int | None = None
    """`load.step`."""
    spent_by: int | None = None
    """The attempt of this run that has already applied this `load.step`."""
    pretrained: bool = False
    """`load.pretrained.directory` is set."""
    pretrained_step: int | None = None
    required: bool = False
    """`load.on_missing` is `error`."""
    allow_rewind: bool = False


@dataclass(frozen=True)
class Seen:
    """The checkpoints that exist. None: not surveyed yet."""

    own: Sequence[Commit] = ()
    """Of the run itself, in both tiers."""
    other: Sequence[Commit] | None = None
    """At `load.directory`, where that is another place."""
    parent: Sequence[Commit] | None = None
    """At `load.pretrained.directory`."""


class Action(Enum):
    """What a load does next."""

    LOAD = "load"
    """The chosen commit, which belongs to the run itself."""
    LOAD_OTHER = "load from load.directory"
    LOAD_PARENT = "load from load.pretrained"
    LOOK_AT_OTHER = "look at load.directory"
    """Then choose again."""
    LOOK_AT_PARENT = "look at load.pretrained"
    START_FRESH = "start fresh"
    REFUSE = "refuse"


class Refusal(Enum):
    """Why a load ends with an error."""

    NOT_THERE = "not there"
    """A place or an iteration was named that holds no checkpoint."""
    NOTHING = "nothing there"
    """The run has no checkpoint, and `load.on_missing` is `error`."""
    OWN_EXISTS = "the run has its own"
    """`load.directory` names another place, and the run has checkpoints of its own."""
    DAMAGED = "damaged"
    """The one named checkpoint is damaged."""
    NONE_LOADABLE = "none loadable"
    """Checkpoints exist, and none of them can be loaded."""
    TOO_NEW = "too new"


@dataclass(frozen=True)
class Choice:
    """The decision, with its reason."""

    action: Action
    commit: Commit | None = None
    refusal: Refusal | None = None
    reason: str = ""
    step: int | None = None
    """The requested iteration, if it applies; None: the newest was requested."""

    def __str__(self) -> str:
        what = self.refusal.value if self.refusal is not None else ""
        if self.commit is not None:
            what = f"{self.commit.tier} {self.commit.iteration}"
        return f"{self.action.value}: {what}" if what else self.action.value


def effective_step(asked: Asked) -> int | None:
    """Return the requested iteration of the run itself; None: the newest.

    A `load.step` that stays in the configuration applies once: if an earlier attempt has applied
    it, a later start continues from the newest checkpoint, unless `allow_rewind` is set.
    """
    if asked.names_other_place or asked.spent_by is None or asked.allow_rewind:
        return asked.step
    return None


def choose(asked: Asked, seen: Seen) -> Choice:
    """Choose what a load does, from the settings and the existing checkpoints."""
    step = effective_step(asked)
    if asked.names_other_place:
        own = [each for each in seen.own if each.condition is not Condition.OTHER_RUN]
        if own:
            reason = _name_newest(own)
            return Choice(Action.REFUSE, refusal=Refusal.OWN_EXISTS, reason=reason, step=step)
        if seen.other is None:
            return Choice(Action.LOOK_AT_OTHER, step=step)
        return _choose_from(seen.other, step, Action.LOAD_OTHER)
    if seen.own or step is not None:
        return _choose_from(seen.own, step, Action.LOAD)
    if asked.pretrained:
        if seen.parent is None:
            return Choice(Action.LOOK_AT_PARENT)
        return _choose_from(seen.parent, asked.pretrained_step, Action.LOAD_PARENT)
    if asked.required:
        return Choice(Action.REFUSE, refusal=Refusal.NOTHING)
    return Choice(Action.START_FRESH)


def object_to(asked: Asked, iteration: int, superseded: str | None) -> str | None:
    """Return why a sound commit of the run itself must not be loaded; None: it may be.

    The local tier calls this while its ranks agree on what they can load.
    """
    step = effective_step(asked)
    if step is not None:
        return None if iteration == step else f"load.step is {step}"
    return superseded


def mark_damaged(
    commits: Sequence[Commit], damaged: Commit, reason: str, error: CheckpointError
) -> tuple[Commit, ...]:
    """Return the commits after a load has found one of them damaged."""
    found = replace(damaged, condition=Condition.DAMAGED, reason=reason, error=error)
    return tuple(found if each == damaged else each for each in commits)


def _choose_from(commits: Sequence[Commit], step: int | None, load: Action) -> Choice:
    """Choose among the checkpoints of one place, or of the run itself in both tiers."""
    ordered = sorted(commits, key=lambda each: each.order, reverse=True)
    if step is None:
        return _choose_newest(ordered, load)
    named = [each for each in ordered if each.iteration == step]
    for each in named:
        # Requested by number: that it was superseded or is of another run does not matter.
        if each.condition not in (Condition.DAMAGED, Condition.TOO_NEW):
            return Choice(load, each, step=step)
    for each in named:
        if each.condition is Condition.TOO_NEW:
            return _refuse_too_new(each, step)
    if named:
        reason = "; ".join(each.reason for each in named)
        return Choice(Action.REFUSE, named[0], Refusal.DAMAGED, reason, step)
    return Choice(Action.REFUSE, refusal=Refusal.NOT_THERE, step=step)


def _choose_newest(ordered: Sequence[Commit], load: Action) -> Choice:
    sound = next((each for each in ordered if each.condition is Condition.SOUND), None)
    for each in ordered:
        if each.condition is Condition.TOO_NEW and (sound is None or _may_be_newer(each, sound)):
            return _refuse_too_new(each, None)
    if sound is not None:
        return Choice(load, sound)
    if ordered:
        return Choice(Action.REFUSE, refusal=Refusal.NONE_LOADABLE)
    return Choice(Action.REFUSE, refusal=Refusal.NOT_THERE)


def _may_be_newer(later: Commit, sound: Commit) -> bool:
    """Whether a checkpoint of a later version may be newer than a sound one."""
    if later.sequence is not None and sound.sequence is not None:
        return later.sequence > sound.sequence
    if later.iteration is None or sound.iteration is None:
        return True
    return later.iteration >= sound.iteration


def _refuse_too_new(commit: Commit, step: int | None) -> Choice:
    return Choice(Action.REFUSE, commit, Refusal.TOO_NEW, commit.reason, step)


def _name_newest(commits: Sequence[Commit]) -> str:
    newest = max(commits, key=lambda each: each.order)
    if newest.iteration is None:
        return f"a checkpoint in the {newest.tier} tier"
    return f"iteration {newest.iteration} in the {newest.tier} tier"

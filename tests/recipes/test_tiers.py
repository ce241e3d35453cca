"""Two tiers as a user meets them: often into memory, now and then to disk, and back from either."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from display import describe_source
from due import LOCAL, PERSISTENT, find_due_tier
from holdfast import CheckpointConfig
from holdfast.messages import describe_size
from holdfast.protocol import ShardSource
from losses import read_losses
from lost_node import Origin, ShardFile, find_newest, read_origins
from tests.recipes.conftest import ROOT, Outcome

Pretrain = Callable[..., Outcome]
TIERED = ["recipe=tiered", "run_dir=run", "checkpoint.local.save_interval=1"]
STORE = Path("run/checkpoints")


def _printed(outcome: Outcome) -> str:
    assert outcome.status == 0, outcome.complained
    return outcome.printed


@pytest.mark.parametrize(
    ("step", "persistent", "local", "directory", "due"),
    [
        (10, 100, 10, "/memory", LOCAL),
        (15, 100, 10, "/memory", None),
        (100, 100, 10, "/memory", PERSISTENT),
        (100, 100, None, None, PERSISTENT),
        (10, 100, 10, None, None),
        (10, None, 10, "/memory", LOCAL),
        (1000, None, 10, "/memory", PERSISTENT),
        (1000, None, 10, None, None),
        (1000, 300, None, None, PERSISTENT),
        (1000, None, None, None, None),
    ],
)
def test_which_tier_is_due(
    step: int, persistent: int | None, local: int | None, directory: str | None, due: str | None
) -> None:
    """The persistent tier wins where both are due, and the last save of a run is persistent."""
    config = CheckpointConfig()
    config.persistent.save_interval = persistent
    config.local.save_interval, config.local.directory = local, directory
    assert find_due_tier(config, step, last_step=1000) == due


def test_a_run_saves_to_both_tiers_and_says_which(pretrain: Pretrain, memory: Path) -> None:
    """Each save names its tier, the table counts the local ones, and the end is persistent."""
    printed = _printed(pretrain(*TIERED, "steps=5"))
    assert f"no checkpoint of this run in {STORE} or {memory} yet" in printed
    assert f"local tier at {memory}" in printed, "how much room it takes"
    for iteration in (1, 3):
        assert f"checkpoint {iteration} committed locally: " in printed
    for iteration in (2, 4, 5):
        assert f"checkpoint {iteration} committed: " in printed
    assert "2 local" in printed
    assert "2 committed" in printed
    assert sorted(path.name for path in STORE.glob("iter_*")) == [
        "iter_0000002", "iter_0000004", "iter_0000005",
    ]  # fmt: skip
    (local,) = memory.iterdir()
    assert f"take room until you say: rm -r {local}" in printed
    shutil.rmtree(memory)
    assert "already complete: 5 of 5 steps" in _printed(pretrain(*TIERED, "steps=5"))


def test_a_run_resumes_from_memory_and_without_it_from_disk(
    pretrain: Pretrain, memory: Path
) -> None:
    """Whatever is left, the curve is that of a run left alone, to the last bit."""
    _printed(pretrain(*TIERED, "run_dir=whole", "steps=9"))
    overrides = [*TIERED, "steps=9", "checkpoint.persistent.save_interval=4"]
    for lost, iteration, tier in ((False, 6, "local"), (True, 4, "persistent")):
        _leave_at(pretrain, 6, 4, memory, overrides)
        if lost:
            shutil.rmtree(memory)
        printed = _printed(pretrain(*overrides, interval=None))
        assert f"resumed from iteration {iteration} of " in printed
        assert f", {tier} tier" in printed
        assert ("holds nothing newer" in printed) is lost
        curve = read_losses(Path("run"))
        assert curve.resumed_from[-1] == iteration
        assert curve.training == read_losses(Path("whole")).training
        assert curve.validation == read_losses(Path("whole")).validation


def test_what_is_passed_over_in_memory_is_told(pretrain: Pretrain, memory: Path) -> None:
    """A damaged local checkpoint is named with its reason, and the one before it is taken."""
    overrides = [*TIERED, "steps=9", "checkpoint.persistent.save_interval=4"]
    _leave_at(pretrain, 6, 4, memory, overrides)
    (newest,) = memory.glob("*/0/iter_0000006_0_local.pt")
    with newest.open("r+b") as file:
        file.truncate(newest.stat().st_size // 2)
    printed = _printed(pretrain(*overrides, interval=None))
    assert "warning: iteration 5 is loaded although later ones are there" in printed
    assert "0/iter_0000006_0_local.pt: does not end as a shard file does: it was torn" in printed
    assert "resumed from iteration 5 of " in printed


def test_another_run_begins_from_disk_and_goes_on_from_its_own_memory(
    pretrain: Pretrain, memory: Path
) -> None:
    """Another run's checkpoint is taken from disk, newer local ones or not, and that once."""
    overrides = [*TIERED, "steps=9", "checkpoint.persistent.save_interval=4"]
    _leave_at(pretrain, 6, 4, memory, overrides)
    named = ["checkpoint.load.pretrained.directory=run/checkpoints", "run_dir=tuned"]
    named.append("checkpoint.load.pretrained.what=everything")
    # It dies before its first persistent save: what it has is in memory alone.
    printed = _printed(pretrain(*overrides, *named, "steps=7", interval=None))
    assert f"starting from step 4 with what {STORE.absolute()}/iter_0000004 holds" in printed
    shutil.rmtree("tuned/checkpoints/iter_0000007")
    printed = _printed(pretrain(*overrides, *named, interval=None))
    assert "resumed from iteration 7 of " in printed
    assert ", local tier" in printed


def test_an_end_that_reached_memory_alone_is_made_up_for(pretrain: Pretrain) -> None:
    """A run that died between its last two commits is complete only when the disk has it too."""
    _printed(pretrain(*TIERED, "steps=4"))
    shutil.rmtree(STORE / "iter_0000004")
    (STORE / "latest_checkpointed_iteration.txt").write_text("2")
    printed = _printed(pretrain(*TIERED, "steps=4"))
    assert "resumed from iteration 4 of " in printed
    assert "checkpoint 4 committed: " in printed
    assert (STORE / "iter_0000004" / "manifest.json").exists()
    assert "checkpoint 4 committed" not in _printed(pretrain(*TIERED, "steps=4"))


def test_a_mirror_is_of_the_disk_alone(pretrain: Pretrain) -> None:
    """The example manager copies no local checkpoint, and resumes from one all the same."""
    overrides = [*TIERED[1:], "recipe=custom_manager", "checkpoint=tiered"]
    _printed(pretrain(*overrides, "steps=3"))
    mirrored = sorted(path.name for path in Path("run/mirror").glob("iter_*"))
    assert mirrored == ["iter_0000002", "iter_0000003"]
    printed = _printed(pretrain(*overrides, "steps=4"))
    assert "resumed from iteration 3 of " in printed
    assert ", local tier" in printed


def test_the_two_tiers_of_the_readme_run(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied word by word, the example saves to both tiers, and the newest comes back."""
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "README.md").read_text().split("## Two tiers")[1].split("\n## ")[0]
    for command in ("recipes/pretrain.py recipe=tiered", "make lost-node"):
        assert command in section
    (block,) = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {"holdfast": holdfast}
    exec(block.replace("/dev/shm/holdfast-me", str(memory)), names)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters())
    state = holdfast.GlobalState()
    manager = holdfast.create_checkpoint_manager(names["config"])
    for step in (1, 20, 200, 220):
        state.train_state.step = step
        names["save_if_due"](manager, state, model, optimizer, None)
    manager.finalize_async_saves(state, blocking=True, terminate=True)
    assert [path.name for path in Path("checkpoints").glob("iter_*")] == ["iter_0000200"]
    manager = holdfast.create_checkpoint_manager(names["config"])
    result = manager.load(holdfast.CheckpointLoadContext(state, model, optimizer, None))
    manager.finalize_async_saves(state, blocking=True, terminate=True)
    assert (result.iteration, result.tier) == (220, "local")


def test_a_restart_goes_on_from_the_newest_that_is_whole() -> None:
    """In memory if every shard is there and it is newer; else on disk."""
    both = [ShardFile(50, owner, holder, 7) for owner in (0, 1) for holder in (0, 1)]
    half = [each for each in both if each.holder == 0]
    torn = [ShardFile(60, 0, 0, 7)]
    assert find_newest(both, 40, 2) == 50
    assert find_newest(half + torn, 40, 2) == 50
    assert find_newest(half, 60, 2) == 60
    assert find_newest(torn, 40, 2) == 40


def test_the_drill_reads_what_the_load_has_told() -> None:
    """Each source in words that the table shows, by rank and in the order of the load."""
    sources = [
        [ShardSource("persistent", "iter_0000040/__0_0.distcp", 7_000_000, 0)],
        [
            ShardSource("local", "run/0/x", 2_500, 1, 0, "node0"),
            ShardSource("local", "run/1/y", 10, 1, 1, "node1"),
            ShardSource("local", "run/1/z", 10, 0, 1, "node1"),
        ],
    ]
    lines = [
        f"source: rank {rank} has {describe_size(each.size_bytes)} from "
        f"{describe_source(each, rank)}"
        for rank, files in enumerate(sources)
        for each in files
    ]
    assert read_origins("\n".join(["resumed", *lines, "step 1"])) == [
        Origin(0, "6.7 MiB", "persistent tier"),
        Origin(1, "2.4 KiB", "peer: rank 0 on node0"),
        Origin(1, "10 B", "own file"),
        Origin(1, "10 B", "own copy for rank 0"),
    ]


def test_a_lost_node_comes_back_from_its_peer() -> None:
    """The command in the overlay, with one process on each node: equal to the last bit."""
    overlay = (ROOT / "configs/recipe/lost_node.yaml").read_text().splitlines()
    assert overlay[0] == "# @package _global_"
    program, script = shlex.split(overlay[1].removeprefix("# "))
    assert program == "python"
    before = set(Path("/dev/shm").iterdir())
    finished = subprocess.run(
        [sys.executable, str(ROOT / script), "--processes-per-node", "1"],
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert finished.returncode == 0, finished.stdout
    assert "   0  node0 " in finished.stdout
    assert "peer: rank 0 on node0\n" in finished.stdout
    assert "resumed from iteration 50: 0 of 80 steps differ" in finished.stdout
    assert "equal to the run left alone, to the last bit" in finished.stdout
    left = [each for each in set(Path("/dev/shm").iterdir()) - before if "lost-node" in each.name]
    assert left == []


def _leave_at(
    pretrain: Pretrain, local: int, persistent: int, memory: Path, overrides: list[str]
) -> None:
    """Leave what a run has that died after the local save of one step: nothing newer."""
    shutil.rmtree("run", ignore_errors=True)
    shutil.rmtree(memory, ignore_errors=True)
    # The last save of a run is persistent; taken away, it leaves its local copy.
    _printed(pretrain(*overrides, f"steps={local}", interval=None))
    shutil.rmtree(STORE / f"iter_{local:07d}")
    (STORE / "latest_checkpointed_iteration.txt").write_text(str(persistent))

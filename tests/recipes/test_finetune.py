"""Fine-tuning with adapters: it begins from pretraining, dies, resumes, and spares its base."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import holdfast
from losses import read_losses
from tests.recipes.conftest import Outcome
from tests.support.stores import tree

Program = Callable[..., Outcome]
BASE = Path("runs/pretrain/checkpoints")
STORE = Path("runs/finetune/checkpoints")


@pytest.fixture
def finetune(
    pretrain: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Program:
    """Return the program, as `pretrain` does; it begins from a short run of that."""
    import finetune as program  # after the path was extended

    assert pretrain("steps=4").status == 0
    short = [each for each in sys.argv[1:] if each != "steps=4"]

    def run(*overrides: str) -> Outcome:
        base = f"checkpoint.load.pretrained.directory={BASE}"
        monkeypatch.setattr(sys, "argv", ["recipes/finetune.py", *short, base, *overrides])
        status = program.main()
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


def test_a_run_that_died_goes_on_bit_for_bit(finetune: Program) -> None:
    """It holds adapters alone, equals the uninterrupted run, and its base is untouched."""
    before = tree(BASE)
    whole = finetune("run_dir=whole", "steps=6")
    assert whole.status == 0, whole.complained
    assert f"starting from step 0 with what {BASE.absolute()}/iter_0000004 holds" in whole.printed
    assert finetune("run_dir=again", "steps=6").status == 0
    # Take away what came after step 4, as if the run had died before the save of 6.
    shutil.rmtree("again/checkpoints/iter_0000006")
    resumed = finetune("run_dir=again", "steps=6")
    assert "resumed from iteration 4 of" in resumed.printed, resumed.complained
    losses = read_losses(Path("again"))
    assert losses.resumed_from == [0, 4]
    assert losses.training == read_losses(Path("whole")).training
    assert losses.validation == read_losses(Path("whole")).validation
    assert tree(BASE) == before, "the base was written to"
    names = [each for each in holdfast.open_tensors("again/checkpoints") if "model." in each]
    assert names
    assert all("lora_" in each for each in names)


def test_it_begins_where_pretraining_stood(finetune: Program) -> None:
    """Its first validation is the last one of the base: fresh adapters change nothing."""
    bits = read_losses(Path("runs/pretrain")).validation[4] / math.log(2)
    assert f"validation after step 0: {bits:.3f} bits/byte" in finetune("steps=1").printed


def test_another_model_is_refused_with_both_sides(finetune: Program) -> None:
    """The guard names each setting that differs, before anything is read."""
    outcome = finetune("model.layers=1", "model.dropout=0.2")
    assert outcome.status == 1
    for named in ("model.layers is 2 in the checkpoint, 1 here", "model.dropout is 0.1"):
        assert named in outcome.complained
    assert not list(STORE.glob("iter_*"))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("lora.rank=0", "lora.rank is 0"),
        ("lora.targets=[head]", "lora.targets is ['head']; choose among query_key_value"),
        ("parallel=tp", "parallel.kind is 'tp'; adapters work with single"),
        ("checkpoint.load.pretrained.directory=null", "name the checkpoints of pretraining"),
        ("checkpoint.load.pretrained.directory=nowhere", "nowhere"),
    ],
)
def test_impossible_settings_are_named(finetune: Program, override: str, named: str) -> None:
    """In at most three lines."""
    outcome = finetune(override)
    assert outcome.status == 1
    assert named in outcome.complained
    assert len(outcome.complained.splitlines()) <= 3


def test_an_adapted_model_computes_what_the_model_did(finetune: Program) -> None:
    """Its names are those of the model and the adapters; every other parameter is frozen."""
    from gpt import GPT
    from lora import adapt
    from run_config import ModelConfig

    torch.manual_seed(1)
    model = GPT(ModelConfig(layers=2, width=16, heads=2, context=8))
    torch.nn.init.normal_(model.head.weight)
    tokens = torch.arange(8)[None]
    before, names = model(tokens, tokens), set(model.state_dict())
    adapt(model, ["query_key_value", "mlp_in"], 2, 4.0)
    assert torch.equal(model(tokens, tokens), before)
    added = {name for name, each in model.named_parameters() if each.requires_grad}
    assert set(model.state_dict()) == names | added
    assert len(added) == 8
    assert all("lora_" in each for each in added)

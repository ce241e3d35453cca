"""The training loop, around any checkpoint manager.

Owns the order of things: build, load, then step, save when due, finalize, validate, until the last
step. Talks to checkpoints through the protocol only, so that a manager named in the configuration
takes the default one's place. Promises that the same settings and process count give the same
losses bit for bit, interrupted or not. Prints nothing itself and knows neither Hydra nor the number
of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from crash import CrashPlan, plan_crash
from display import Display
from due import LOCAL, PERSISTENT, find_due_tier
from gpt import GPT, floating_point_operations_per_token
from holdfast import (
    CheckpointLoadContext,
    CheckpointSaveContext,
    GlobalState,
    LoadResult,
    create_checkpoint_manager,
)
from losses import LOSSES_NAME, LossLog, read_losses
from parallel import Processes
from run_config import OptimConfig, RecipeError, RunConfig
from saving import MeasuredSaves
from text_data import ShardedLoader, Text, count_samples, cut_sample, read_text


def train(
    config: RunConfig,
    processes: Processes,
    display: Display,
    adapt: Callable[[nn.Module], None] | None = None,
) -> None:
    """Train up to `config.steps`, going on from the newest checkpoint if there is one.

    `adapt`: changes the model in place before it is divided; what it freezes is not trained.

    Raises:
        RecipeError: text, batch or run directory do not suit.
        CheckpointError: whatever the manager reports.
    """
    run_dir, store = Path(config.run_dir), config.checkpoint.persistent.directory
    job = _build(config, processes, display, adapt)
    progress = job.state.train_state
    manager = create_checkpoint_manager(config.checkpoint)
    result = manager.load(job.load_context())
    progress.step, progress.floating_point_operations_so_far = result
    processes.share_draws()
    display.show_load(progress.step, result, config.checkpoint)
    if config.checkpoint.local.directory is not None and isinstance(result, LoadResult):
        display.show_sources(processes.gather(result.sources))
    saves = MeasuredSaves(manager, display.say)
    if progress.step >= config.steps:
        if _is_in_memory_alone(result):  # the end came between the commits to the two tiers
            saves.save(job.save_context(PERSISTENT))
        saves.finalize(job.state, last=True)
        display.show_complete(progress.step)
        display.show_ways_on(progress.step, config.checkpoint)
        return

    crash = plan_crash(
        config.crash_at_step,
        config.crash_during_save,
        None if store is None else Path(store),
        read_losses(run_dir).furthest_step,
    )
    with LossLog(run_dir, progress.step, processes.rank) as log:
        _run_steps(job, saves, log, crash)
    saves.finalize(job.state, last=True)
    display.show_saves(saves.records, config.checkpoint)
    display.say(f"losses of every step: {run_dir / LOSSES_NAME}")
    display.show_ways_on(config.steps, config.checkpoint)


@dataclass
class _Job:
    """All that the steps of a run work on."""

    config: RunConfig
    processes: Processes
    display: Display
    model: nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR
    loader: ShardedLoader
    held_out: _ValidationSet
    operations_per_token: int
    state: GlobalState

    def make_step(self) -> float:
        """Make one optimizer step, count it, and return its mean loss over all processes."""
        batch = next(self.loader).to(self.processes.device)
        loss: Tensor = self.model(batch[:, :-1], batch[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.processes.clip_gradients(self.model, self.config.optim.gradient_norm_limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        progress, tokens = self.state.train_state, self.tokens_per_step
        progress.step += 1
        progress.consumed_train_samples += self.config.batch_size
        progress.tokens_seen += tokens
        progress.floating_point_operations_so_far += tokens * self.operations_per_token
        return self.processes.mean(loss.detach())

    def load_context(self) -> CheckpointLoadContext:
        """Return where a load puts what it restores."""
        return CheckpointLoadContext(
            self.state,
            self.model,
            self.optimizer,
            self.scheduler,
            pg_collection=self.processes.groups,
            train_data_iterator=self.loader,
        )

    def save_context(self, tier: str) -> CheckpointSaveContext:
        """Return what a save to a tier covers."""
        return CheckpointSaveContext(
            self.state,
            self.model,
            self.optimizer,
            self.scheduler,
            self.state.train_state.floating_point_operations_so_far,
            pg_collection=self.processes.groups,
            train_data_iterator=self.loader,
            non_persistent_ckpt=tier == LOCAL,
        )

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.model.context


def _build(
    config: RunConfig,
    processes: Processes,
    display: Display,
    adapt: Callable[[nn.Module], None] | None,
) -> _Job:
    text = read_text(config.data)
    loader = ShardedLoader(
        text,
        config.model.context,
        config.batch_size,
        config.seed,
        processes.data_rank,
        processes.data_size,
    )
    held_out = _ValidationSet(text, config, processes)
    torch.manual_seed(config.seed)  # the same weights in every process, sharded or not
    bare_model = GPT(config.model)
    if adapt is not None:
        adapt(bare_model)
    operations_per_token = floating_point_operations_per_token(bare_model, config.model)
    parameter_count = sum(parameter.numel() for parameter in bare_model.parameters())
    model = processes.distribute(bare_model)
    optimizer = _build_optimizer(model, config.optim)
    scheduler = _build_scheduler(optimizer, config)
    torch.manual_seed(config.seed + 1 + processes.draw_rank)  # for dropout
    display.say(
        f"{parameter_count:,} parameters on {processes.size} x {processes.device.type}, "
        f"{text.file_count} files, {len(text.training):,} bytes to train on"
    )
    return _Job(
        config,
        processes,
        display,
        model,
        optimizer,
        scheduler,
        loader,
        held_out,
        operations_per_token,
        GlobalState(cfg=config),
    )


def _run_steps(job: _Job, saves: MeasuredSaves, log: LossLog, crash: CrashPlan) -> None:
    """Train from where the state stands to the last step."""
    config, display, state = job.config, job.display, job.state
    progress = state.train_state
    if progress.step == 0:
        display.show_validation(0, job.held_out.measure(job.model))
    display.start_training(progress.step)
    while progress.step < config.steps:
        learning_rate = float(job.scheduler.get_last_lr()[0])
        loss = job.make_step()
        if not math.isfinite(loss):
            raise RecipeError(
                f"The loss became {loss} at step {progress.step}; the last checkpoint is from "
                "before.\nLower optim.learning_rate and start again in another run_dir."
            )
        log.append_training(progress.step, loss)
        display.show_step(progress.step, loss, learning_rate, job.tokens_per_step)
        if progress.step % config.validation_interval == 0 or progress.step == config.steps:
            validation_loss = job.held_out.measure(job.model)
            log.append_validation(progress.step, validation_loss)
            display.show_validation(progress.step, validation_loss)
        crash.crash_if_due(progress.step)
        due_tier = find_due_tier(config.checkpoint, progress.step, config.steps)
        if due_tier is not None:
            if due_tier == PERSISTENT:
                crash.watch_save_if_due(progress.step)
            saves.save(job.save_context(due_tier))
        saves.finalize(state)


def _is_in_memory_alone(result: object) -> bool:
    """Whether a load says that the persistent tier lacks what it took."""
    return isinstance(result, LoadResult) and not result.is_durable


class _ValidationSet:
    """The same held-out batches every time, spread over the whole text and shared by the ranks."""

    def __init__(self, text: Text, config: RunConfig, processes: Processes) -> None:
        length = config.model.context
        available = count_samples(text.validation, length)
        wanted = min(available, config.validation_batches * config.batch_size)
        wanted -= wanted % processes.data_size  # equal shares: then the mean of means is the mean
        if wanted == 0:
            raise RecipeError(
                f"data: {len(text.validation)} held-out bytes are too few to validate on.\n"
                "Name more text, raise data.validation_fraction or lower model.context."
            )
        self._samples = [
            cut_sample(text.validation, number * available // wanted, length)
            for number in range(processes.data_rank, wanted, processes.data_size)
        ]
        self._share = max(config.batch_size // processes.data_size, 1)
        self._processes = processes

    @torch.no_grad()
    def measure(self, model: nn.Module) -> float:
        """Return the mean loss in nats per byte. Draws no random numbers."""
        model.eval()
        total = torch.zeros((), device=self._processes.device)
        for first in range(0, len(self._samples), self._share):
            samples = self._samples[first : first + self._share]
            batch = torch.stack(samples).long().to(self._processes.device)
            total += model(batch[:, :-1], batch[:, 1:]) * len(samples)
        model.train()
        return self._processes.mean(total / len(self._samples))


def _build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    trained = [each for each in model.parameters() if each.requires_grad]
    if config.name == "sgd":
        return SGD(
            trained,
            lr=config.learning_rate,
            momentum=config.beta1,
            weight_decay=config.weight_decay,
        )
    return AdamW(
        trained,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )


def _build_scheduler(optimizer: Optimizer, config: RunConfig) -> LambdaLR:
    warmup, floor = config.optim.warmup_steps, config.optim.final_learning_rate_ratio

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min((step - warmup) / max(config.steps - warmup, 1), 1.0)
        return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2

    return LambdaLR(optimizer, scale)

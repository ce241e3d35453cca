"""The smallest complete run: a GPT learns the source of your Python, with checkpoints.

Owns nothing but the order of the calls; copy it to begin a loop of your own. Runs on the CPU, in
one process or in several (DDP). Kill it at any moment and type the same command again: it goes on
from its newest checkpoint. Every value of configs/minimal.yaml can be given on the command line.

    python recipes/minimal.py
    torchrun --nproc-per-node 2 recipes/minimal.py steps=400 checkpoint.persistent.save_interval=100
"""

from __future__ import annotations

import os
import sys

from entry import run_program  # isort: skip  # first: it sets what torch reads

import hydra
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn

import holdfast
from gpt import GPT
from holdfast import hydra_schema
from run_config import DataConfig
from text_data import ShardedLoader, read_text

hydra_schema.register()  # the settings under `checkpoint`, with their types and defaults


@hydra.main(config_path="../configs", config_name="minimal", version_base="1.3")
def main(config: DictConfig) -> None:
    """Train up to `config.steps`, from the newest checkpoint if there is one."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(config.seed)
    model: nn.Module = GPT(config.model)
    if size > 1:
        dist.init_process_group("gloo")
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)
    text = read_text(DataConfig())
    data = ShardedLoader(text, config.model.context, config.batch_size, config.seed, rank, size)

    state = holdfast.GlobalState(cfg=config)
    counters = state.train_state
    interval = config.checkpoint.persistent.save_interval or config.steps
    manager = holdfast.create_checkpoint_manager(config.checkpoint)
    targets = (state, model, optimizer, scheduler)
    context = holdfast.CheckpointLoadContext(*targets, train_data_iterator=data)
    counters.step, _ = manager.load(context)  # 0 where there is no checkpoint
    if rank == 0:
        store = config.checkpoint.persistent.directory
        print(f"starting at step {counters.step} of {config.steps}; saving to {store}", flush=True)
    while counters.step < config.steps:
        batch = next(data)
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        counters.step += 1
        if counters.step % interval == 0 or counters.step == config.steps:
            manager.save(holdfast.CheckpointSaveContext(*targets, train_data_iterator=data))
        manager.finalize_async_saves(state)  # reports a save that ended, or raises its failure
        if rank == 0 and counters.step % config.log_interval == 0:
            print(f"step {counters.step}: loss {loss.item():.3f}", flush=True)
    manager.finalize_async_saves(state, blocking=True, terminate=True)
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_program(main))

"""How the processes of one run share its work.

Owns the choice of device and backend, the process group, and the wrapping of the model. Promises
that the same training loop serves one process, DDP and FSDP2: it asks `Processes` and never whether
there are several. Refuses a launch that contradicts the configuration, before anything is built.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from commands import name_program
from gpt import GPT
from run_config import ParallelConfig, RecipeError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """One process on its own; the subclasses do the same for several."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def distribute(self, model: GPT) -> nn.Module:
        """Return the model as this run trains it, on this process's device."""
        return model.to(self.device)

    def mean(self, value: Tensor) -> float:
        """Average a number over all processes."""
        return float(value.item())

    def gather(self, value: T) -> list[T]:
        """Return the value of every process, by rank; every process calls this."""
        return [value]

    def close(self) -> None:
        """Leave the process group, when all work is done."""


class _ProcessGroup(Processes):
    def mean(self, value: Tensor) -> float:
        total = value.detach().clone()
        dist.all_reduce(total)
        return float(total.item()) / self.size

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        dist.destroy_process_group()


class _ReplicatedProcesses(_ProcessGroup):
    def distribute(self, model: GPT) -> nn.Module:
        replicas = DistributedDataParallel(model.to(self.device))
        # DDP re-orders its buckets after the first backward, and with them the order of summation:
        # a resumed run would differ in the last bit. So the first one is spent here, on nothing.
        tokens = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        replicas(tokens, tokens).backward()
        replicas.zero_grad()
        return replicas


class _ShardedProcesses(_ProcessGroup):
    def distribute(self, model: GPT) -> nn.Module:
        mesh = init_device_mesh(self.device.type, (self.size,))
        model.to(self.device)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model


def open_processes(config: ParallelConfig) -> Processes:
    """Join the other processes of this run, if it has any.

    Raises:
        RecipeError: the launch and `parallel` contradict one another, or devices are missing.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if config.kind == "single" and size > 1:
        raise RecipeError(
            f"parallel.kind is single, but torchrun started {size} processes.\n"
            "Add parallel=ddp or parallel=fsdp, or start without torchrun."
        )
    if config.kind != "single" and "RANK" not in os.environ:
        raise RecipeError(
            f"parallel.kind is {config.kind}, but there is no process group to join.\n"
            f"Start it as: {name_program('torchrun')} --nproc-per-node 2 recipes/pretrain.py "
            f"parallel={config.kind}, or use parallel=single."
        )
    device = _choose_device(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what the next line demands
        torch.use_deterministic_algorithms(True)
    if config.kind == "single":
        return Processes(device)
    # gloo stays beside nccl: checkpoints are agreed on in CPU memory.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    kind = _ReplicatedProcesses if config.kind == "ddp" else _ShardedProcesses
    return kind(device, dist.get_rank(), dist.get_world_size())


def _choose_device(config: ParallelConfig) -> torch.device:
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpu_count = torch.cuda.device_count()
    if config.device == "cpu" or (config.device == "auto" and gpu_count < local_size):
        return torch.device("cpu")
    if gpu_count < local_size:
        raise RecipeError(
            f"parallel.device is cuda, but {local_size} processes share {gpu_count} GPUs here.\n"
            "Start no more processes than GPUs, or use parallel.device=cpu."
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

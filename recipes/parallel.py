"""How the processes of one run share its work.

Owns the choice of device and backend, the process groups, and the division of the model: replicas
(DDP), shards (FSDP2), shards with replicas (HSDP), slices of layers (tensor parallel), slices that
are sharded, pipeline stages. Promises that the same training loop serves all of them: it asks
`Processes` and never how many there are. Refuses a launch that contradicts the configuration,
before anything is built.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from commands import name_program
from gpt import GPT
from pipeline import STAGES, cut_stage
from run_config import ParallelConfig, RecipeError
from slices import slice_layers

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """One process on its own; the subclasses do the same for several."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    """All processes as a table; a row holds one replica of the model, or slices of its layers."""

    @property
    def data_rank(self) -> int:
        """Rank among those that read different samples."""
        return self.rank

    @property
    def data_size(self) -> int:
        """How many read different samples."""
        return self.size

    @property
    def draw_rank(self) -> int:
        """Equal on processes whose dropout has to draw the same numbers."""
        return self.rank

    @property
    def groups(self) -> SimpleNamespace | None:
        """What a manager is told of the process groups; None: every process reads its own samples.

        Named as Megatron's `pg_collection` is: `dp` is the data-parallel group.
        """
        return None

    def distribute(self, model: GPT) -> nn.Module:
        """Return the model as this run trains it, on this process's device."""
        return model.to(self.device)

    def clip_gradients(self, model: nn.Module, limit: float) -> None:
        """Scale the gradients so that their norm over the whole model is at most `limit`."""
        nn.utils.clip_grad_norm_(model.parameters(), limit)

    def share_draws(self) -> None:
        """Let processes of one `draw_rank` draw alike, whatever a load gave each of them."""

    def mean(self, loss: Tensor) -> float:
        """Average a loss over all samples of all processes."""
        return float(loss.item())

    def gather(self, value: T) -> list[T]:
        """Return the value of every process, by rank; every process calls this."""
        return [value]

    def close(self) -> None:
        """Leave the process group, when all work is done."""


class _ProcessGroup(Processes):
    @property
    def grid(self) -> DeviceMesh:
        assert self.mesh is not None
        return self.mesh

    def mean(self, loss: Tensor) -> float:
        total = loss.detach().clone()
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
        return _replicate(model.to(self.device))


class _ShardedProcesses(_ProcessGroup):
    """FSDP2 over a row of the table; several rows are replicas (HSDP)."""

    def distribute(self, model: GPT) -> nn.Module:
        mesh = self.grid
        _shard(model.to(self.device), mesh if mesh.size(0) > 1 else mesh["inner"])
        return model


class _GroupedProcesses(_ProcessGroup):
    """The processes of a row work on the same samples."""

    @property
    def data_rank(self) -> int:
        return self.grid.get_local_rank("outer")

    @property
    def data_size(self) -> int:
        return self.grid.size(0)

    @property
    def groups(self) -> SimpleNamespace:
        return SimpleNamespace(dp=self.grid.get_group("outer"))


class _SlicingProcesses(_GroupedProcesses):
    """A row slices every layer (tensor parallel); several rows shard their slices (FSDP2)."""

    @property
    def draw_rank(self) -> int:
        return self.data_rank  # dropout acts on activations that the whole row holds

    def share_draws(self) -> None:
        generator = torch.cuda if self.device.type == "cuda" else torch
        state = generator.get_rng_state()
        dist.broadcast(state, group=self.grid.get_group("inner"), group_src=0)
        generator.set_rng_state(state)

    def distribute(self, model: GPT) -> nn.Module:
        slice_layers(model.to(self.device), self.grid["inner"])
        if self.data_size > 1:
            _shard(model, self.grid["outer"])
        return model


class _PipelineProcesses(_GroupedProcesses):
    """Each process of a row holds some blocks; several rows are replicas (DDP)."""

    def distribute(self, model: GPT) -> nn.Module:
        stage = cut_stage(model.to(self.device), self.rank)
        if self.data_size == 1:
            return stage
        return _replicate(stage, self.grid.get_group("outer"))

    def clip_gradients(self, model: nn.Module, limit: float) -> None:
        parameters = list(model.parameters())
        own = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        square = own**2
        dist.all_reduce(square, group=self.grid.get_group("inner"))
        nn.utils.clip_grads_with_norm_(parameters, limit, square.sqrt())

    def mean(self, loss: Tensor) -> float:
        return super().mean(loss) * STAGES  # only last stages know one, the others add 0


_KINDS: dict[str, type[_ProcessGroup]] = {
    "ddp": _ReplicatedProcesses,
    "fsdp": _ShardedProcesses,
    "hsdp": _ShardedProcesses,
    "tp": _SlicingProcesses,
    "fsdp_tp": _SlicingProcesses,
    "pp": _PipelineProcesses,
}


def _replicate(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    replicas = DistributedDataParallel(model, process_group=group)
    # DDP re-orders its buckets after the first backward, and with them the order of summation:
    # a resumed run would differ in the last bit. So the first one is spent here, on nothing.
    tokens = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    replicas(tokens, tokens).backward()
    replicas.zero_grad()
    return replicas


def _shard(model: GPT, mesh: DeviceMesh) -> None:
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


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
    row_size = choose_row_size(config, size)
    device = _choose_device(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what the next line demands
        torch.use_deterministic_algorithms(True)
    if config.kind == "single":
        return Processes(device)
    # gloo stays beside nccl: checkpoints are agreed on in CPU memory.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return divide(config.kind, device, row_size)


def divide(kind: str, device: torch.device, row_size: int) -> Processes:
    """Divide the work among the processes of the process group, in rows of this size."""
    size = dist.get_world_size()
    shape = (size // row_size, row_size)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("outer", "inner"))
    return _KINDS[kind](device, dist.get_rank(), size, mesh)


def choose_row_size(config: ParallelConfig, size: int) -> int:
    """Return how many of `size` processes make a row.

    Raises:
        RecipeError: they do not make whole rows.
    """
    sizes = {"ddp": 1, "hsdp": config.group_size, "fsdp_tp": config.group_size, "pp": STAGES}
    row_size = sizes.get(config.kind, size)
    if size % row_size:
        raise RecipeError(
            f"parallel.kind is {config.kind}, which works in groups of {row_size} processes, but "
            f"torchrun started {size}.\nStart a multiple of {row_size}."
        )
    return row_size


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

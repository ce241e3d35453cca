"""torch's own ways to save and load: torch.save, dcp.save, dcp.async_save by thread and by process.

Owns these peers, each in the fastest configuration that a user can choose: two writer threads, a
cached plan, a stager that is reused. torch.save syncs nothing by itself: its file is synced inside
`save`, as a careful loop would.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.method import (
    SYNC_ADDED,
    WRITER_THREADS,
    Method,
    apply_state_dictionary,
    state_dictionary,
)
from benchmarks.probes import sync_tree

if TYPE_CHECKING:
    from benchmarks.states import State


class TorchSave(Method):
    """torch.save of the two state dictionaries into one file."""

    name = "torch-save"
    label = "torch.save"
    durability = SYNC_ADDED
    note = "load_state_dict of the optimizer adopts the loaded tensors"

    def save(self, step: int) -> None:
        import torch

        self._path = self.folder / f"{step}.pt"
        with self.aside:
            values = {
                "model": self.state.model.state_dict(),
                "optimizer": self.state.optimizer.state_dict(),
            }
        torch.save(values, self._path)
        sync_tree(self._path)

    def load(self) -> None:
        import torch

        loaded = torch.load(self._path, weights_only=True)
        self.state.model.load_state_dict(loaded["model"])
        self.state.optimizer.load_state_dict(loaded["optimizer"])

    def newest(self) -> Path:
        return self._path


class DcpSave(Method):
    """dcp.save with two threads and a cached plan."""

    name = "dcp-save"
    label = "dcp.save"
    many_ranks = True
    note = f"{WRITER_THREADS} threads, cached plan"

    def prepare(self, state: State, folder: Path) -> None:
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

        super().prepare(state, folder)
        self._planner = DefaultSavePlanner(enable_plan_caching=True)

    def save(self, step: int) -> None:
        from torch.distributed.checkpoint.state_dict_saver import save

        save(state_dictionary(self), storage_writer=self._writer(step), planner=self._planner)

    def load(self) -> None:
        from torch.distributed.checkpoint.state_dict_loader import load

        values = state_dictionary(self)
        load(values, checkpoint_id=self._path)
        apply_state_dictionary(self, values)

    def newest(self) -> Path:
        return self._path

    def _writer(self, step: int) -> Any:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter

        self._path = self.folder / f"step_{step}"
        return FileSystemWriter(self._path, thread_count=WRITER_THREADS)


class DcpAsync(DcpSave):
    """dcp.async_save on a thread, with one DefaultStager for all saves."""

    name = "dcp-async"
    label = "dcp.async_save, thread"
    asynchronous = True
    needs_group = True
    note = f"reused DefaultStager, {WRITER_THREADS} threads, cached plan"
    shared_memory = False

    def prepare(self, state: State, folder: Path) -> None:
        from torch import distributed
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        super().prepare(state, folder)
        from_gpu = any(each.is_cuda for each in state.model.parameters())
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=from_gpu,
                use_shared_memory=self.shared_memory,
                use_async_staging=False,
                use_non_blocking_copy=from_gpu,
            )
        )
        self._group = distributed.new_group(backend="gloo")  # its thread must not share a group

    def save(self, step: int) -> None:
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self._future: Any = async_save(
            state_dictionary(self),
            storage_writer=self._writer(step),
            planner=self._planner,
            async_stager=self._stager,
            process_group=self._group,
            async_checkpointer_type=self._kind(),
        )

    def is_done(self) -> bool:
        return bool(self._future.done())

    def wait(self) -> None:
        self._future.result()

    def close(self) -> None:
        self._stager.close()

    def _kind(self) -> Any:
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        return AsyncCheckpointerType.THREAD


class DcpAsyncProcess(DcpAsync):
    """dcp.async_save in a process, with one DefaultStager in shared memory for all saves."""

    name = "dcp-async-process"
    label = "dcp.async_save, process"
    note = f"reused DefaultStager in shared memory, {WRITER_THREADS} threads, cached plan"
    shared_memory = True

    def _kind(self) -> Any:
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        return AsyncCheckpointerType.PROCESS


TORCH: list[type[Method]] = [TorchSave, DcpSave, DcpAsync, DcpAsyncProcess]

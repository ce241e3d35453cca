"""Other packages' ways to save and load: safetensors, torchsnapshot, torch_checkpointing, NVRx.

Owns how each is used, as its documentation has it. NVRx is run on CPU tensors: it calls CUDA
unconditionally, so those calls do nothing in its own process, and its state dictionary for CUDA
tensors is replaced by one that clones CPU tensors. A package that does not import is skipped with
the reason. Where a package never syncs, its files are synced here, and the row says so.
"""

from __future__ import annotations

import functools
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.method import (
    SYNC_ADDED,
    VOLATILE,
    WRITER_THREADS,
    Method,
    apply_state_dictionary,
    state_dictionary,
)
from benchmarks.probes import sync_tree

if TYPE_CHECKING:
    from benchmarks.states import State


class _Package(Method):
    modules: tuple[str, ...] = ()

    def unavailable(self) -> str | None:
        try:
            for each in self.modules:
                import_module(each)
        except Exception as error:  # noqa: BLE001  # whatever its import raises is the reason
            return f"{self.modules[0]} does not import: {error!r}"
        return None

    def newest(self) -> Path:
        return self._path

    def _next(self, step: int) -> Path:
        self._path = self.folder / f"step_{step}"
        return self._path


class Safetensors(_Package):
    """safetensors.torch.save_file of all tensors; numbers and strings are left out."""

    name = "safetensors"
    label = "safetensors"
    package = "safetensors"
    modules = ("safetensors.torch",)
    durability = SYNC_ADDED
    note = "tensors only; each is copied into its place on load"

    def save(self, step: int) -> None:
        with self.aside:
            tensors = dict(self.state.tensors())
        path = self._next(step)
        import_module("safetensors.torch").save_file(tensors, path)
        sync_tree(path)

    def load(self) -> None:
        with self.aside:
            tensors = dict(self.state.tensors())
        with import_module("safetensors").safe_open(self._path, framework="pt") as stored:
            for name, tensor in tensors.items():
                tensor.copy_(stored.get_tensor(name))


class Torchsnapshot(_Package):
    """torchsnapshot.Snapshot.async_take."""

    name = "torchsnapshot"
    label = "torchsnapshot"
    package = "torchsnapshot"
    asynchronous = True
    modules = ("torchsnapshot",)
    durability = SYNC_ADDED

    def save(self, step: int) -> None:
        snapshot = import_module("torchsnapshot").Snapshot
        self._pending = snapshot.async_take(str(self._next(step)), self._app_state())

    def is_done(self) -> bool:
        return bool(self._pending.done())

    def wait(self) -> None:
        self._snapshot = self._pending.wait()
        sync_tree(self._path)

    def load(self) -> None:
        self._snapshot.restore(self._app_state())

    def _app_state(self) -> dict[str, Any]:
        return {"model": self.state.model, "optimizer": self.state.optimizer}


class TorchCheckpointing(_Package):
    """torch_checkpointing's manager, asynchronous as by default."""

    name = "torch-checkpointing"
    label = "torch_checkpointing"
    package = "torch_checkpointing"
    asynchronous = True
    overlapped = True
    many_ranks = True
    modules = ("torch_checkpointing", "torch_checkpointing.storage.filesystem")
    durability = SYNC_ADDED
    note = "direct I/O off: with it, 0.1.1 fails on unaligned sizes"

    def prepare(self, state: State, folder: Path) -> None:
        super().prepare(state, folder)
        package, storage = (import_module(each) for each in self.modules)
        config = package.CheckpointManager.Config.with_async_save()
        config.storage_config = storage.LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager: Any = config.build()

    def save(self, step: int) -> None:
        self._future = self._manager.save(str(self._next(step)), state_dictionary(self))

    def settle(self) -> None:
        with self._manager.lock():  # its own guard of an optimizer step
            pass

    def is_done(self) -> bool:
        return bool(self._future.done())

    def wait(self) -> None:
        self._future.result()
        if os.environ.get("RANK", "0") == "0":  # the others may be done before it renames
            sync_tree(self._path)

    def load(self) -> None:
        values = state_dictionary(self)
        self._manager.load(str(self._path), into=values)
        apply_state_dictionary(self, values)

    def close(self) -> None:
        self._manager.close()


class _Nvrx(_Package):
    """What NVRx's methods share: its queue of asynchronous calls."""

    package = "nvidia-resiliency-ext"
    many_ranks = True
    needs_group = True
    persistent = False
    """Whether one process serves all saves; False: one is forked for each."""

    def prepare(self, state: State, folder: Path) -> None:
        super().prepare(state, folder)
        _empty_cuda_calls()
        core = import_module("nvidia_resiliency_ext.checkpointing.async_ckpt.core")
        self._queue = core.AsyncCallsQueue(persistent=self.persistent)

    def is_done(self) -> bool:
        self._queue.maybe_finalize_async_calls(blocking=False, no_dist=True)
        return self._queue.get_num_unfinalized_calls() == 0  # type: ignore[no-any-return]  # untyped

    def wait(self) -> None:
        self._queue.maybe_finalize_async_calls(blocking=True, no_dist=True)

    def close(self) -> None:
        self._queue.close()


class Nvrx(_Nvrx):
    """NVRx's FileSystemWriterAsync, written by a process forked for each save."""

    name = "nvrx"
    label = "NVRx async writer, fork"
    asynchronous = True
    copies = False
    modules = (
        "nvidia_resiliency_ext.checkpointing.async_ckpt.core",
        "nvidia_resiliency_ext.checkpointing.async_ckpt.filesystem_async",
        "nvidia_resiliency_ext.checkpointing.async_ckpt.state_dict_saver",
    )
    note = f"CUDA calls emptied, {WRITER_THREADS} writer processes; copy-on-write of what changes"

    def prepare(self, state: State, folder: Path) -> None:
        super().prepare(state, folder)
        self._cache = import_module(self.modules[2]).CheckpointMetadataCache()

    def save(self, step: int) -> None:
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

        core, filesystem, saver = (import_module(each) for each in self.modules)
        writer = filesystem.FileSystemWriterAsync(self._next(step), thread_count=WRITER_THREADS)
        planned = saver.save_state_dict_async_plan(
            state_dictionary(self),
            writer,
            planner=DefaultSavePlanner(),
            enable_cache=True,
            metadata_cache=self._cache,
        )
        function, _, arguments = writer.get_save_function_and_args()
        request = core.AsyncRequest(
            function,
            tuple(arguments),
            [functools.partial(saver.save_state_dict_async_finalize, *planned)],
            async_fn_kwargs={},
            preload_fn=functools.partial(writer.preload_tensors, writer.write_buckets, False),
        )
        self._queue.schedule_async_request(request)

    def load(self) -> None:
        from torch.distributed.checkpoint.state_dict_loader import load

        values = state_dictionary(self)
        load(values, checkpoint_id=self._path)
        apply_state_dictionary(self, values)


class NvrxPersistent(Nvrx):
    """The same through NVRx's persistent worker."""

    name = "nvrx-persistent"
    label = "NVRx async writer, worker"
    persistent = True
    note = (
        f"CUDA calls emptied, {WRITER_THREADS} writer processes; shares the live CPU tensors "
        "with its worker: no snapshot of them"
    )


class NvrxLocal(_Nvrx):
    """NVRx's LocalCheckpointManager on a RAM-backed folder, asynchronous by fork."""

    name = "nvrx-local"
    label = "NVRx local (RAM)"
    asynchronous = True
    local = True
    modules = (
        "nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager",
        "nvidia_resiliency_ext.checkpointing.local.basic_state_dict",
        "nvidia_resiliency_ext.checkpointing.async_ckpt.core",
    )
    durability = VOLATILE
    note = "CUDA calls emptied; CPU tensors are cloned in the place of the copy to the CPU"

    def prepare(self, state: State, folder: Path) -> None:
        super().prepare(state, folder)
        self._manager = import_module(self.modules[0]).LocalCheckpointManager(folder / "local")

    def save(self, step: int) -> None:
        state = _cpu_state_class()(state_dictionary(self), clones=self.asynchronous)
        request = self._manager.save(state, step, is_async=self.asynchronous)
        if request is not None:
            self._queue.schedule_async_request(request)

    def load(self) -> None:
        self._manager.latest_iteration = -1
        self._manager.find_latest()
        loaded, _ = self._manager.load()
        apply_state_dictionary(self, loaded.state_dict)

    def newest(self) -> Path:
        return self.folder / "local"


class NvrxLocalSync(NvrxLocal):
    """The same, synchronous: torch.save of the live tensors."""

    name = "nvrx-local-sync"
    label = "NVRx local, sync (RAM)"
    asynchronous = False
    note = "CUDA calls emptied; no copy is made of CPU tensors"


@functools.cache
def _cpu_state_class() -> Any:
    basic = import_module(NvrxLocal.modules[1])
    return make_cpu_state_class(basic.BasicTensorAwareStateDict)


class _CpuStateMixin:
    """NVRx's state dictionary for tensors that are in host memory already."""

    def __init__(self, state_dict: dict[str, Any], clones: bool = False) -> None:
        self.state_dict = _rebuilt(state_dict)  # it maps dictionaries in place: never the live ones
        self._is_hollow = False
        self._clones = clones

    def copy_tensors_to_cpu(self, non_blocking: bool = False) -> None:
        if self._clones:
            self.state_dict = _rebuilt(self.state_dict, clone=True)

    def restore_tensor_device(self, non_blocking: bool = True) -> None:
        pass


def make_cpu_state_class(base: type[Any]) -> type[Any]:
    """Derive the state dictionary for CPU tensors, importable by name for NVRx's pickles."""
    made = type("CpuState", (_CpuStateMixin, base), {"__module__": __name__})
    globals()["CpuState"] = made
    return made


def _rebuilt(value: Any, clone: bool = False) -> Any:
    import torch

    if isinstance(value, dict):
        return {key: _rebuilt(each, clone) for key, each in value.items()}
    if isinstance(value, list):
        return [_rebuilt(each, clone) for each in value]
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if clone else value
    return value


def _empty_cuda_calls() -> None:
    """Let code that synchronises CUDA unconditionally run without any; in this process only."""
    import torch

    if not torch.cuda.is_available():
        for name, replacement in (("synchronize", None), ("current_device", "cpu")):
            setattr(torch.cuda, name, lambda *_, _value=replacement: _value)


PACKAGES: list[type[Method]] = [
    Safetensors,
    Torchsnapshot,
    TorchCheckpointing,
    Nvrx,
    NvrxPersistent,
    NvrxLocal,
    NvrxLocalSync,
]

"""A description of the machine, for a reader who judges a run.

Owns the description that goes into every report: processor, cores, memory, kernel, versions, file
systems, date. Promises that nothing in it names a host or a user.
"""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "safetensors",
    "nvidia-resiliency-ext",
    "torch_checkpointing",
    "torchsnapshot",
    "numpy",
    "xxhash",
)


def describe(folders: dict[str, Path]) -> dict[str, Any]:
    """Describe the machine, with the file system under each named folder."""
    import holdfast

    memory_kib = int((_field("/proc/meminfo", "MemTotal") or "0").split()[0])
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kib / 2**20, 1),
        "huge_pages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "holdfast": holdfast.__version__,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "accelerator": _accelerator(),
        "file_systems": {name: file_system(folder) for name, folder in folders.items()},
    }


def file_system(folder: Path) -> str:
    """Return type and device of the mount that a folder lies on."""
    place = folder.resolve()
    mounts = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, point, kind, *_ = line.split()
        mounts[Path(point)] = f"{kind} on {device}"
    return next((mounts[each] for each in (place, *place.parents) if each in mounts), "unknown")


def load_average() -> float:
    """Return how many processes wanted to run, averaged over the last minute."""
    return os.getloadavg()[0]


def _field(path: str, name: str) -> str | None:
    try:
        for line in Path(path).read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    except OSError:
        pass
    return None


def _chosen(path: str) -> str:
    try:
        return Path(path).read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return "unknown"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None

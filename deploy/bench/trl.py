"""TRL, to compare with: never a dependency, so it is installed on demand beside the environment, not into it."""

import shutil
import subprocess
import sys
from pathlib import Path

VERSION = "1.16.0"
REQUIREMENTS = (
    f"trl=={VERSION}",
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "multiprocess==0.70.19",
    "pandas==3.1.1",
    "pyarrow==26.0.1",
)
"""What TRL imports and the environment does not have; torch, transformers and the rest are the environment's own."""
INSTALL_SECONDS = 300.0


def trl_libraries(*, install: bool) -> Path | None:
    """Directory to append to `sys.path` for TRL, kept for the next time; None if it is not there or cannot be made.

    Args:
        install: fetch it from the package index if it is not there: 280 MB.
    """
    directory = Path(sys.prefix) / "bench" / f"trl-{VERSION}"
    if directory.is_dir():
        return directory
    if not install:
        return None
    fresh = directory.with_name(f".{directory.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    try:
        subprocess.run([*pip, "--target", str(fresh), *REQUIREMENTS], check=True, timeout=INSTALL_SECONDS)
    except (OSError, subprocess.SubprocessError):
        shutil.rmtree(fresh, ignore_errors=True)
        return None  # pip has said why
    fresh.rename(directory)
    return directory

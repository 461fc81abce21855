"""Where a run takes place: memory in use, versions, and folders that can be written."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from weft.errors import WeftError

__all__ = ["DISK_ERRORS", "OutputError", "describe_machine", "memory_bytes", "prove_writable"]

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO})
"""What an OSError says when it is the disk, and not our code, that is in the way."""

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "datasets")


class OutputError(WeftError, OSError):
    """A folder that cannot be used for what a run writes."""


def memory_bytes(device: torch.device | str = "cpu") -> int:
    """Memory held now: on a CPU by the process (resident), on an accelerator by torch."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What the run ran on: versions, processor, threads, device."""
    versions = {"weft": _version("weft"), "python": platform.python_version()}
    versions |= {name: found for name in _PACKAGES if (found := _version(name))}
    place = torch.device(device)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else f"{platform.machine()} CPU"
    return {
        "versions": versions,
        "system": f"{platform.system()} {platform.release()}",
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def prove_writable(folder: Path) -> None:
    """Write and remove a small file, so that a folder that cannot be written is found before training, not after."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(b"weft")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(
            f"the folder {folder} cannot be written ({error.strerror or error}), and the adapter goes there; choose "
            "another with output=FOLDER"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # the folder itself could not be made, which is reported already
            probe.unlink(missing_ok=True)


def _version(package: str) -> str | None:
    if package == "weft":
        return str(sys.modules["weft"].__version__)  # the code that runs, installed or not
    try:
        return version(package)
    except PackageNotFoundError:
        return None

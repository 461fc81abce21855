"""What a machine has and lacks for Weft."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

__all__ = ["Diagnosis", "Package", "diagnose"]

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_USERS = ("quant", "minilm", "tensorboard")
"""The extras that are for users; the others are for those who work on Weft."""
_LITTLE_MEMORY, _LITTLE_DISK = 2 * 1024**3, 1024**3


@dataclass(frozen=True)
class Package:
    """One dependency. version: None when it is not installed; extra: None for what every installation has."""

    name: str
    version: str | None
    extra: str | None


@dataclass(frozen=True)
class Diagnosis:
    """Facts about the machine, the packages, and problems with their remedies."""

    weft: str
    python: str
    system: str
    cores: int
    threads: int
    memory_bytes: int
    free_memory_bytes: int
    free_disk_bytes: int
    temporary_free_bytes: int
    accelerator: str | None
    offline: dict[str, str]
    hub_cache: str
    bundled_base: str | None
    packages: tuple[Package, ...]
    problems: tuple[str, ...]
    hints: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        """Whether everything that Weft needs is there."""
        return not self.problems

    def __str__(self) -> str:
        rows = [
            ("weft", self.weft),
            ("python", self.python),
            ("system", self.system),
            ("processor", f"{self.cores} cores, torch uses {self.threads} thread{'s' * (self.threads != 1)}"),
            ("accelerator", self.accelerator or "none: training runs on the processor"),
            ("memory", f"{_gib(self.free_memory_bytes)} free of {_gib(self.memory_bytes)}"),
            (
                "disk",
                f"{_gib(self.free_disk_bytes)} free here, {_gib(self.temporary_free_bytes)} in {tempfile.gettempdir()}",
            ),
            ("hub", _offline_words(self.offline)),
            ("hub cache", self.hub_cache),
            ("bundled base", self.bundled_base or "MISSING"),
        ]
        lines = [f"{name:14}{value}" for name, value in rows]
        for extra in (None, *dict.fromkeys(p.extra for p in self.packages if p.extra)):
            lines += ["", "packages" if extra is None else f"extra {extra}"]
            lines += [f"  {p.name:24}{p.version or 'not installed'}" for p in self.packages if p.extra == extra]
        lines += ["", *[f"problem: {each}" for each in self.problems], *[f"hint: {each}" for each in self.hints]]
        return "\n".join([*lines, "everything that Weft needs is here"] if self.healthy else lines)


def diagnose() -> Diagnosis:
    """Look at this machine; nothing is changed and nothing is fetched."""
    import psutil

    from weft import __version__

    packages = tuple(_packages())
    missing = [p.name for p in packages if not (p.version or p.extra)]
    problems = [f"{name} is missing; install it with: pip install weft" for name in missing]
    hints = []
    for extra in _USERS:
        absent = [p.name for p in packages if p.extra == extra and p.version is None]
        if absent:
            hints.append(f"for {', '.join(absent)}: pip install 'weft[{extra}]'")
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd()).free
    if memory.available < _LITTLE_MEMORY:
        hints.append(f"only {_gib(memory.available)} of memory is free: lower train.batch_size or data.max_length")
    if disk < _LITTLE_DISK:
        hints.append(
            f"only {_gib(disk)} is free here: runs write checkpoints; choose another folder with output=FOLDER"
        )
    bundled = Path(__file__).parent / "assets" / "pico"
    if not (bundled / "model.safetensors").is_file():
        problems.append(
            f"the bundled base is not in {bundled}; install Weft again with: pip install --force-reinstall weft"
        )
    threads, accelerator = _torch()
    return Diagnosis(
        weft=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cores=os.cpu_count() or 1,
        threads=threads,
        memory_bytes=memory.total,
        free_memory_bytes=memory.available,
        free_disk_bytes=disk,
        temporary_free_bytes=shutil.disk_usage(tempfile.gettempdir()).free,
        accelerator=accelerator,
        offline={name: os.environ[name] for name in _OFFLINE if name in os.environ},
        hub_cache=os.environ.get("HF_HOME") or str(Path("~/.cache/huggingface").expanduser()),
        bundled_base=str(bundled) if (bundled / "model.safetensors").is_file() else None,
        packages=packages,
        problems=tuple(problems),
        hints=tuple(hints),
    )


def _packages() -> list[Package]:
    """Weft's own dependencies, from the metadata that pip reads; only the extras that are for users."""
    try:
        wanted = requires("weft") or []
    except PackageNotFoundError:  # run from its sources, without an installation
        wanted = _declared(Path(__file__).parents[2] / "pyproject.toml")
    found = []
    for text in wanted:
        name = re.split(r"[\s\[<>=!~;(]", text, maxsplit=1)[0]
        marker = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", text)
        extra = marker[1] if marker else None
        if extra is None or extra in _USERS:
            found.append(Package(name, _version(name), extra))
    return found


def _declared(project: Path) -> list[str]:
    """The dependencies that a project's file declares, as its metadata would."""
    if not project.is_file():
        return []
    declared = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    extras = declared["optional-dependencies"]
    return declared["dependencies"] + [f"{each}; extra == '{extra}'" for extra in extras for each in extras[extra]]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> tuple[int, str | None]:
    """Threads, and the accelerator's name."""
    try:
        import torch
    except ImportError:
        return 0, None
    if torch.cuda.is_available():
        return torch.get_num_threads(), torch.cuda.get_device_name()
    kind: Any = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.get_num_threads(), None if kind is None else str(kind)


def _offline_words(variables: dict[str, str]) -> str:
    named = [name for name, value in variables.items() if value.lower() in ("1", "true", "yes", "on")]
    if named:
        return f"offline ({', '.join(named)}): only bundled bases, folders and what the cache holds"
    return "asked only for bases named like owner/model; set HF_HUB_OFFLINE=1 to forbid it"


def _gib(count: float) -> str:
    return f"{count / 1024**3:.1f} GiB"

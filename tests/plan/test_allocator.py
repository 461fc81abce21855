"""What the allocator keeps is counted where it is glibc's own, and nowhere else."""

from __future__ import annotations

import platform

import pytest

from weft.plan.allocator import kept_share
from weft.plan.memory import Memory


@pytest.fixture(autouse=True)
def as_installed(monkeypatch) -> None:
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))


def test_by_default_a_part_is_kept() -> None:
    assert 0.2 < kept_share() < 0.75


@pytest.mark.parametrize(
    ("variables", "kept"),
    [
        ({"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}, False),
        ({"MALLOC_MMAP_THRESHOLD_": "65536"}, True),  # the top of the heap still stays
        ({"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "65536"}, True),
        ({"MALLOC_MMAP_THRESHOLD_": "none", "MALLOC_TRIM_THRESHOLD_": "none"}, True),
        ({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}, False),
    ],
)
def test_what_the_environment_says_counts(monkeypatch, variables: dict[str, str], kept: bool) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (kept_share() > 0) is kept


def test_another_c_library_is_not_known(monkeypatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert kept_share() == 0


def test_weights_and_libraries_are_no_tensors_of_a_step() -> None:
    found = Memory(weights=1, adapters=2, gradients=4, optimizer=8, activations=16, process=32, allocator=64)
    assert found.tensors == 2 + 4 + 8 + 16
    assert found.total == 127

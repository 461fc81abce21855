"""What holds in every test: no network, one thread, the same seeds."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

# Before anything imports the libraries that read these once. Child processes inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HOME=tempfile.mkdtemp(prefix="weft-tests-hf-"),  # a model in the tester's own cache must not make a test pass
    WEFT_CACHE=tempfile.mkdtemp(prefix="weft-tests-cache-"),  # nor the tester's past runs correct a forecast
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


class NetworkForbidden(RuntimeError):
    """A test tried to leave this machine."""


def _forbid_remote(host: Any) -> None:
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost", socket.gethostname()):  # gloo looks its own machine up
        return
    try:
        local = ip_address(host).is_loopback
    except ValueError:  # a name: looking it up would leave the machine already
        local = False
    if not local:
        raise NetworkForbidden(
            f"a test tried to reach {host!r}, and no test may leave this machine: use what is bundled"
        )


def _guarded_connect(original: Any) -> Any:
    def connect(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _forbid_remote(address[0])
        return original(self, address)

    return connect


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Connecting to, or looking up, anything but the loopback raises."""
    look_up = socket.getaddrinfo

    def guarded_look_up(host: Any, *rest: Any, **options: Any) -> Any:
        _forbid_remote(host)
        return look_up(host, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _guarded_connect(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", _guarded_connect(socket.socket.connect_ex))
        patch.setattr(socket, "getaddrinfo", guarded_look_up)
        yield


@pytest.fixture(scope="session", autouse=True)
def known_machine() -> None:
    """Rates of some machine in the cache, where `weft plan` looks: no test but calibration's own measures this one."""
    from dataclasses import asdict

    from weft.plan.cache import write_json
    from weft.plan.calibration import CLASSES, Rates, machine_key

    matmul = {dtype: [[512, 512, 512, 5e-3]] for dtype in ("float32", "bfloat16")}
    passes = {name: [[1e4, 5e-6], [1e8, 5e-2]] for name in CLASSES}
    rates = asdict(Rates(matmul, passes, 2e-5, reference_seconds=1.0, measured="2026-01-01T00:00:00+00:00"))
    rates.pop("notes")
    key = machine_key(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    here = f"{torch.get_num_threads()} threads"
    write_json("machine.json", {key.replace(here, f"{n} threads"): rates for n in (1, 2, 3, 4)})


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random states, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  libraries under test draw from the legacy state
    torch.manual_seed(0)


def pytest_unconfigure() -> None:
    """Remove the cache that this process made."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    shutil.rmtree(os.environ["WEFT_CACHE"], ignore_errors=True)

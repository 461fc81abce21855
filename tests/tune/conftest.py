"""The tiny base and data, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tune import runs


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `encoder` and `data`."""
    folder = tmp_path_factory.mktemp("tiny")
    runs.make_base(folder / "base")
    runs.make_encoder(folder / "encoder")
    runs.make_data(folder / "data")
    return folder

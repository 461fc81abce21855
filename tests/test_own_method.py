"""A user's own method, in a file or in a package with an entry point, gets every feature without touching Weft."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import weft
from weft.checks import MethodError, Report, check_method
from weft.core.method import _METHODS

OWN = '''
"""Two-sided: a low-rank update with a trained gain in the middle."""
from dataclasses import dataclass

import weft


@dataclass(frozen=True)
class TwoSided(weft.Method):
    """y = W x + B diag(g) A x.

    Nobody 2025.
    """

    name = "two-sided"
    kinds = frozenset({"linear", "conv"})
    rank: int = weft.option(4, help="inner size", minimum=1)

    def init(self, site, op):
        a = site.normal(self.rank, *site.shape[1:], std=site.in_features**-0.5)
        return {"A": a, "g": site.ones(self.rank), "B": site.zeros(site.out_features, self.rank)}

    def forward(self, c, x, op):
        h = op.scale(op.project(x, c["A"]), c["g"])
        return op.expand(h, c["B"], onto=op(x))
'''


@pytest.fixture(autouse=True)
def registry():
    """Methods that a test defines are forgotten after it."""
    weft.methods()
    before = dict(_METHODS)
    yield
    _METHODS.clear()
    _METHODS.update(before)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The module of a method in a user's own file."""
    path = tmp_path / "my_method.py"
    path.write_text(OWN)
    spec = importlib.util.spec_from_file_location("my_method", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "my_method", module)
    spec.loader.exec_module(module)
    return module


def test_defining_a_method_registers_it(own):
    assert weft.methods()["two-sided"] is own.TwoSided
    assert own.TwoSided is weft.TwoSided


def test_it_passes_the_common_checks(own):
    report = check_method(own.TwoSided, options={"rank": 2})
    assert isinstance(report, Report)
    assert report.merge == {"linear": "merges", "conv": "merges"}
    assert report.num_parameters["conv"] == 2 * 8 * 9 + 2 + 12 * 2


def test_it_trains_mixes_merges_and_composes(own):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(32, 8)
    y = x[:, :1] * x[:, 1:2]
    weft.attach(model, own.TwoSided(rank=4), ["0", "2"], name="mine")
    optimizer = torch.optim.Adam(weft.parameters(model, "mine"), lr=0.05)
    first = torch.nn.functional.mse_loss(model(x), y).item()
    for _ in range(60):
        loss = torch.nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    weft.attach(model, weft.LoRA(rank=2), ["0", "2"], name="lora")
    weft.use(model, ["mine", "lora", None, "mine"])
    together = model(x[:4])
    weft.use(model, "mine")
    torch.testing.assert_close(together[3:], model(x[3:4]))
    live = model(x)
    weft.merge(model, "mine")
    torch.testing.assert_close(model(x), live, rtol=1e-4, atol=1e-5)


BROKEN = {
    "does not start at the base": (
        "site.zeros(site.out_features, self.rank)",
        "site.ones(site.out_features, self.rank)",
    ),
    "has a tensor that does nothing": ('"g": site.ones', '"idle": site.ones(2), "g": site.ones'),
    "has a gain that nothing uses": ('op.scale(op.project(x, c["A"]), c["g"])', 'op.project(x, c["A"])'),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_method_is_found_out(what, tmp_path):
    old, new = BROKEN[what]
    source = OWN.replace(old, new).replace("two-sided", f"broken {len(what)}").replace("TwoSided", f"Broken{len(what)}")
    assert source.count(new), "the edit did not apply"
    path = tmp_path / "broken.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"broken_{len(what)}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(MethodError, match=f"broken {len(what)} at linear"):
        check_method(getattr(module, f"Broken{len(what)}"), options={"rank": 2})


def test_options_that_do_not_fit_the_tiny_models_say_so(own):
    with pytest.raises(MethodError, match="smaller options"):
        check_method(weft.OFT, options={"block_size": 64})


def test_a_package_with_an_entry_point_is_found(tmp_path):
    """A new process, with nothing but an installed package, knows the method by name and checks it."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "their_method.py").write_text(OWN.replace("two-sided", "theirs").replace("TwoSided", "Theirs"))
    info = site / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[weft.methods]\ntheirs = their_method\n")
    program = textwrap.dedent(
        """
        import weft
        from weft.registry import method_from_spec
        from weft.checks import check_method

        method = method_from_spec({"name": "theirs", "rank": 2})
        print(type(method).__module__, sorted(check_method(type(method), options={"rank": 2}).merge))
        """
    )
    source = str(Path(weft.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": f"{site}:{source}", "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "their_method ['conv', 'linear']"


@pytest.mark.parametrize("name", ["prompt", "prefix", "llama_adapter"])
def test_virtual_tokens_pass_the_common_checks(name):
    cls = weft.methods()[name]
    report = weft.check_method(cls, options={"num_tokens": 3})
    assert report.unchecked == ()
    assert report.merge.keys() == cls.kinds
    assert all("virtual tokens" in why for why in report.merge.values())

"""LoHa, LoKr, FourierFT and SHiRA against HF PEFT: the same tensors at one layer give the same outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import FourierFTConfig, LoHaConfig, LoKrConfig, ShiraConfig, get_peft_model
from torch import Tensor, nn

import weft
from weft.attach import records

pytestmark = pytest.mark.oracle

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 36), (3, 5, 24)),
    "square": (lambda: nn.Linear(32, 32, bias=False), (4, 32)),
    "prime": (lambda: nn.Linear(13, 30), (4, 13)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 7, 7)),
    "pointwise": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 4, 4)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2, padding=1), (2, 8, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 5, padding=2), (2, 8, 9)),
}
LOHA = {f"w{n}_{ours}": f"hada_w{n}_{theirs}" for n in (1, 2) for ours, theirs in (("b", "a"), ("a", "b"))}
LOHA |= {"t1": "hada_t1", "t2": "hada_t2"}
LOKR = {name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}


def agree(layer: str, config: Any, method: weft.Method, names: dict[str, str]) -> None:
    """PEFT's layer, with its tensors made random, and ours with those tensors compute the same."""
    make, shape = LAYERS[layer]
    plain = nn.Sequential(make())
    ours = nn.Sequential(make())
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(shape)
    config.target_modules = ["0"]
    theirs = get_peft_model(plain, config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) * 0.5)
                assert "default" in name
        weft.attach(ours, method, targets=["0"])
        found = theirs.base_model.model[0]
        for name, tensor in records(ours)["default"].adapters["0"].tensors().items():
            if name in names:
                tensor.copy_(getattr(found, names[name])["default"].reshape(tensor.shape))
        expected, result = theirs(x), ours(x)
        assert_close(result, expected)
        weft.use(ours, None)
        assert (ours(x) - expected).abs().max() > 1e-2  # the adapter really does something


def assert_close(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5 * max(1.0, expected.abs().max().item()))


CASES = [
    *((layer, False) for layer in LAYERS),
    ("conv2d", True),
    ("pointwise", True),
    ("grouped", True),
    ("conv1d", True),
]


@pytest.mark.parametrize(("layer", "effective"), CASES)
@pytest.mark.parametrize("rank", [2, 5])
def test_loha(layer: str, effective: bool, rank: int) -> None:
    config = LoHaConfig(r=rank, alpha=3, use_effective_conv2d=effective)
    agree(layer, config, weft.LoHa(rank=rank, alpha=3.0, effective_conv=effective), LOHA)


@pytest.mark.parametrize(("layer", "effective"), CASES)
@pytest.mark.parametrize(
    ("rank", "both", "factor"), [(1, False, -1), (1, True, 4), (2, False, 5), (8, False, -1), (2, True, 12)]
)
def test_lokr(layer: str, effective: bool, rank: int, both: bool, factor: int) -> None:
    if layer == "conv1d" and (effective or rank != 1):
        pytest.skip("peft 0.21 gets a Conv1d's w2 with a kernel axis wrong: torch.kron of [a, c] with [b, d, k]")
    config = LoKrConfig(r=rank, alpha=3, decompose_both=both, decompose_factor=factor, use_effective_conv2d=effective)
    wanted = None if factor < 0 else factor
    method = weft.LoKr(rank=rank, alpha=3.0, decompose_both=both, decompose_factor=wanted, effective_conv=effective)
    agree(layer, config, method, LOKR)


@pytest.mark.parametrize("layer", ["linear", "square", "prime"])
def test_fourierft(layer: str) -> None:
    config = FourierFTConfig(n_frequency=40, scaling=30.0, random_loc_seed=123)
    method = weft.FourierFT(num_frequencies=40, scaling=30.0, location_seed=123)
    make, _ = LAYERS[layer]
    module = nn.Sequential(make())
    weft.attach(module, method, targets=["0"])
    theirs = get_peft_model(
        nn.Sequential(make()), FourierFTConfig(n_frequency=40, random_loc_seed=123, target_modules=["0"])
    )
    rows, columns = theirs.base_model.model[0].indices["default"]
    own = records(module)["default"].adapters["0"].tensors()["places"]
    assert torch.equal(own.long(), rows * module[0].in_features + columns)  # the same draw, so a folder needs no places
    agree(layer, config, method, {"spectrum": "fourierft_spectrum"})


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # peft's sparse delta
@pytest.mark.parametrize("layer", ["linear", "square", "prime"])
def test_shira(layer: str) -> None:
    agree(
        layer, ShiraConfig(r=2, random_seed=7), weft.SHiRA(rank=2),
        {"values": "shira_weight", "indices": "shira_indices"},
    )  # fmt: skip

"""Sets of adapters made smaller together: what is shared is there once, on disk and in memory, and each is ordinary."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import weft
from tests.common.language import ids, llama
from weft.adapter import AdapterFileError, native_tensors
from weft.attach import AdapterError, records
from weft.borrowed import lend, lent
from weft.compressing import compress_together, lost

M = weft.methods()
TARGETS = ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]


def carrying(count: int, method: str = "lora") -> nn.Module:
    """Adapters whose changes are alike: all on the same eight directions of each side."""
    torch.manual_seed(0)
    model = llama()
    for n in range(count):
        weft.attach(model, M[method](rank=3), TARGETS, name=f"a{n}", seed=n)
        for adapter in records(model)[f"a{n}"].adapters.values():
            site, draw = adapter.site, torch.Generator().manual_seed(len(adapter.site.address))
            u = torch.randn(site.out_features, 5, generator=draw)
            v = torch.randn(5, site.in_features, generator=draw)
            with torch.no_grad():
                adapter.A.copy_(torch.randn(3, 5) @ v * 0.1)
                adapter.B.copy_(u @ torch.randn(5, 3) * 0.1)
    weft.use(model, None)
    return model


def together(model: nn.Module, **options):
    sources = [*records(model)]
    return compress_together(model, sources, [f"{n}-s" for n in sources], **options)


def logits(model: nn.Module, route) -> torch.Tensor:
    torch.manual_seed(5)
    with torch.no_grad(), weft.using(model, route):
        return model(ids(3, 6)).logits


@pytest.mark.parametrize("way", ["joint", "eigenlorax"])
def test_what_is_alike_loses_nothing_and_is_held_once(way: str) -> None:
    model = carrying(3)
    found = together(model, way=way, rank=5)
    assert found.worst[2] < 1e-5
    names = ["a0", "a1", "a2"]
    new = [f"{n}-s" for n in names]
    assert {s.method.name for s in records(model)["a0-s"].plan.sites} == {
        "shared_basis" if way == "joint" else "eigenlorax"
    }
    for name in names:
        torch.testing.assert_close(logits(model, f"{name}-s"), logits(model, name), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model, new), logits(model, names), rtol=1e-4, atol=1e-4)  # one batch of all
    blend = logits(model, {new[0]: 0.5, new[1]: 0.5})
    torch.testing.assert_close(blend, logits(model, {"a0": 0.5, "a1": 0.5}), rtol=1e-4, atol=1e-4)
    for address in records(model)["a0-s"].adapters:
        held = {records(model)[n].adapters[address]._buffers["U"].data_ptr() for n in new}
        assert len(held) == 1


@pytest.mark.parametrize("options", [{"rank": 2}, {"rank": 2, "diagonal": True}, {"rank": 2, "clusters": 2}])
def test_losses_are_those_of_the_tensors(options: dict) -> None:
    model = carrying(4)
    found = together(model, **options)
    assert found.worst[2] > 0.05
    for name, losses in found.losses.items():
        measured = lost(model, name, f"{name}-s")
        assert losses == pytest.approx(measured, rel=1e-3)
    assert found.mean <= found.worst[2]


def test_a_loss_is_held_with_the_fewest_directions() -> None:
    model = carrying(4)
    found = together(model, loss=0.3)
    assert found.worst[2] <= 0.3
    ranks = {s.site.address: s.method.rank for s in records(model)["a0-s"].plan.sites}
    assert set(ranks.values()) <= {2, 3, 4, 5}
    for name in [*records(model)]:
        if name.endswith("-s"):
            weft.detach(model, name)
    for rank in set(ranks.values()):
        fewer = together(model, rank=rank - 1)
        for address, r in ranks.items():
            assert r != rank or max(own[address] for own in fewer.losses.values()) > 0.3
        for name in fewer.names:
            weft.detach(model, name)


def test_a_loss_per_token_is_held_by_every_adapter_with_the_fewest_directions() -> None:
    model = carrying(3)

    def loss_of(name: str) -> float:
        """Grows by half of what is lost of the weights."""
        source = name.removesuffix("-s")
        return 2.0 if name == source else 2.0 * (1 + 0.5 * max(lost(model, source, name).values()))

    found = together(model, loss=0.2, loss_of=loss_of)
    assert 0.01 < max(found.growth.values()) <= 0.2
    assert found.growth == pytest.approx({n: 0.5 * max(own.values()) for n, own in found.losses.items()}, rel=1e-3)
    (rank,) = {s.method.rank for s in records(model)["a0-s"].plan.sites}
    for name in found.names:
        weft.detach(model, name)
    assert max(together(model, rank=rank - 1, loss_of=loss_of).growth.values()) > 0.2
    for name in found.names:
        weft.detach(model, name)
    with pytest.raises(AdapterError, match=r"loss per token of a\d grows by 5.000% with all 32 directions of joint"):
        together(model, loss=0.01, loss_of=lambda name: 2.1 if name.endswith("-s") else 2.0)
    assert [*records(model)] == ["a0", "a1", "a2"]


def test_adapters_of_any_method_that_a_weight_expresses(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama()
    weft.attach(model, M["oft"](block_size=4), ["q_proj"], name="oft")
    weft.attach(model, M["lora"](rank=2), ["q_proj", "up_proj"], name="lora")
    with torch.no_grad():
        for p in weft.parameters(model):
            p.add_(0.1 * torch.randn(p.shape))
    found = together(model, rank=64)
    assert found.worst[2] < 1e-4
    weft.attach(model, M["norm_tuning"](), "norms", name="norms")
    with pytest.raises(AdapterError, match="changes a norm here, which no basis of matrices holds"):
        compress_together(model, ["norms"], ["x"], rank=2)


def test_options_that_do_not_fit_are_refused() -> None:
    model = carrying(2)
    with pytest.raises(ValueError, match="give one of them"):
        together(model)
    with pytest.raises(ValueError, match="no way 'jiont'"):
        together(model, way="jiont", rank=1)
    with pytest.raises(ValueError, match="of the way joint"):
        together(model, way="eigenlorax", rank=1, diagonal=True)
    assert [*records(model)] == ["a0", "a1"]


def test_a_loss_that_no_basis_holds_is_refused_with_the_figures() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    for n in range(20):  # more than four products of two vectors can be made of by weighing them
        weft.attach(model, M["lora"](rank=2), ["0"], name=f"a{n}", seed=n)
        with torch.no_grad():
            for p in weft.parameters(model, f"a{n}"):
                p.normal_()
    said = r"0: joint loses \d+\.\d+% of an adapter's change with all 4 directions that there are, more than 10.000%"
    with pytest.raises(AdapterError, match=said):
        together(model, loss=0.1, diagonal=True)
    assert len(records(model)) == 20


@pytest.fixture
def written(tmp_path: Path) -> tuple[nn.Module, Path]:
    """Two adapters of a set on disk."""
    model = carrying(2)
    found = together(model, rank=5)
    lend(tmp_path / "set" / "basis.safetensors", found.bases)
    for name in found.names:
        own = {k: t for k, t in native_tensors(records(model)[name]).items() if k not in found.shared[name]}
        place = tmp_path / "set" / name
        facts = lent(place, tmp_path / "set" / "basis.safetensors", found.shared[name])
        weft.save(model, place, name, held=(own, {"borrowed": facts}))
    return model, tmp_path / "set"


def test_a_set_on_disk_holds_the_basis_once_and_so_does_memory(written, tmp_path: Path) -> None:
    model, folder = written
    assert {k.rpartition(".")[2] for k in load_file(folder / "a0-s" / "adapter_model.safetensors")} == {"S"}
    moved = shutil.move(folder, tmp_path / "moved")
    for name in ("a0-s", "a1-s"):
        before = native_tensors(records(model)[name])
        weft.load(model, Path(moved) / name, f"{name}-read")
        after = native_tensors(records(model)[f"{name}-read"])
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)
    for address in records(model)["a0-s"].adapters:
        held = {records(model)[f"a{n}-s-read"].adapters[address]._buffers["V"].data_ptr() for n in (0, 1)}
        assert len(held) == 1


def test_an_adapter_without_its_basis_is_refused(written, tmp_path: Path) -> None:
    model, folder = written
    shutil.copytree(folder / "a0-s", tmp_path / "alone" / "a0-s")
    with pytest.raises(AdapterFileError, match=r"basis.safetensors, which is not there: move the folders of a set tog"):
        weft.load(model, tmp_path / "alone" / "a0-s", "x")
    lend(folder / "basis.safetensors", {"other": torch.zeros(3)})
    with pytest.raises(AdapterFileError, match="which was written anew since: it is damaged"):
        weft.load(model, folder / "a0-s", "x")
    (folder / "basis.safetensors").write_bytes(b"short")
    with pytest.raises(AdapterFileError, match="written anew since"):
        weft.load(model, folder / "a0-s", "x")

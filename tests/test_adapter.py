"""Adapters by name on a model and on disk: what a user does with them, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weft
from tests.common.language import ids, llama
from weft.adapter import INFO, TENSORS, AdapterFileError
from weft.attach import AdapterError, records
from weft.targets import TargetError


def trained(model: nn.Module, *names: str, method: Any = None, **options: Any) -> nn.Module:
    for seed, name in enumerate(names):
        weft.attach(model, method or weft.LoRA(rank=2), name=name, seed=seed, **options)
    with torch.no_grad():
        for p in weft.parameters(model):
            p.add_(torch.randn_like(p) * 0.1)
    return model


def test_a_merge_inside_using_is_not_applied_twice() -> None:
    model, x = trained(llama(), "a"), ids()
    live = model(x).logits
    with weft.using(model, None):
        weft.merge(model, "a")
    torch.testing.assert_close(model(x).logits, live)


def test_using_does_not_bring_back_a_route_that_is_gone() -> None:
    model = trained(llama(), "a", "b")
    weft.use(model, "a")
    with weft.using(model, "b"):
        weft.detach(model, "a")
    assert model.weave.route is None


@pytest.mark.parametrize("route", [{}, None])
def test_nothing_is_no_blend_and_cannot_be_merged(route: Any) -> None:
    model = trained(llama(), "a")
    with pytest.raises(ValueError, match=r"at least one adapter|nothing to merge"):
        weft.merge(model, route)
    assert model.weave.route == "a"


def test_kept_coefficients_notice_new_base_weights() -> None:
    model, x = trained(nn.Sequential(nn.Linear(4, 4)), "a", "b", method=weft.DoRA(rank=2)), torch.randn(2, 4)
    for route in ("a", ["a", "b"]):
        weft.use(model, route)
        with torch.no_grad():
            model(x)
            model[0].weight.copy_(torch.randn(4, 4))
            kept = model(x)
        torch.testing.assert_close(kept, model(x))


@pytest.mark.parametrize(
    ("build", "targets", "shape"),
    [
        (lambda: nn.Linear(8, 8), "re:.*", (2, 3, 8)),
        (lambda: nn.Conv2d(3, 8, 3), "re:.*", (2, 3, 5, 5)),
        (lambda: nn.MultiheadAttention(8, 2, batch_first=True), ["in_proj_weight", "out_proj"], (2, 3, 8)),
        (lambda: nn.GRU(8, 8, batch_first=True), ["weight_ih_l0"], (2, 3, 8)),
    ],
    ids=["linear", "conv", "attention", "gru"],
)
def test_the_model_may_itself_be_the_site(build: Callable[[], nn.Module], targets: Any, shape: tuple[int, ...]) -> None:
    model, x = build().eval(), torch.randn(shape)
    args = (x, x, x) if isinstance(model, nn.MultiheadAttention) else (x,)
    first = {"type": type(model), "keys": [*model.state_dict()], "own": model.__dict__.keys() - {"_flat_weights"}}

    def run(m: nn.Module = model) -> Tensor:
        y = m(*args)
        return y[0] if isinstance(y, tuple) else y

    with torch.no_grad():
        base = run()
        trained(model, "a", targets=targets)
        live = run()
        assert (live - base).abs().max() > 1e-3
        weft.use(model, ["a", None])
        torch.testing.assert_close(run(), torch.stack([live[0], base[1]]), atol=1e-5, rtol=0)
        weft.use(model, ["a"] * 3)
        with pytest.raises(ValueError, match="3 rows and the batch has 2"):
            run()
        weft.use(model, "a")
        assert torch.equal(run(pickle.loads(pickle.dumps(model))), live)
        weft.merge(model, "a")
        torch.testing.assert_close(run(), live, atol=1e-5, rtol=1e-5)
        weft.unmerge(model)
        weft.detach(model)
        torch.testing.assert_close(run(), base, atol=1e-6, rtol=0)
    assert (type(model), [*model.state_dict()]) == (first["type"], first["keys"])
    assert model.__dict__.keys() - {"_flat_weights"} == first["own"]


def test_positions_given_first_do_not_count_as_rows() -> None:
    model, x = trained(llama(), "a"), ids(2, 5)
    weft.use(model, ["a", None])
    positions = torch.arange(5).unsqueeze(0)
    assert torch.equal(model(position_ids=positions, input_ids=x).logits, model(x).logits)


@pytest.mark.parametrize("taken", ["adapters", "records", "weave"])
def test_a_name_that_the_base_uses_itself_is_refused(taken: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    setattr(model, taken, nn.ModuleList([nn.Linear(4, 4)]) if taken == "adapters" else [1])
    before = [*model.state_dict()]
    with pytest.raises(AdapterError, match=f"'{taken}' of its own"):
        weft.attach(model, weft.VeRA(rank=2), "0")
    assert [*model.state_dict()] == before
    assert type(model) is nn.Sequential


def test_a_map_that_no_weight_expresses_is_refused_where_the_weight_is_read() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)})
    with pytest.raises(TargetError, match=r"a\.out_proj.*no weight can express it"):
        weft.attach(model, weft.TopK(experts=weft.experts(weft.LoRA(rank=2), 2)), "out_proj")


def test_norm_tuning_finds_the_norms_by_itself() -> None:
    assert {s.site.kind for s in weft.resolve(llama(), weft.methods()["norm_tuning"]()).sites} == {"norm"}


def test_calibration_sees_the_base_alone(tmp_path: Path) -> None:
    x = ids()
    batches = [{"input_ids": x, "labels": x}]
    plain, busy = llama(), None
    busy = trained(copy.deepcopy(plain), "other")
    method = weft.SHiRA(rank=1, mask="gradient")
    for model in (plain, busy):
        model.train()
        weft.attach(model, method, name="s", calibration=batches)
        assert model.training
    one, two = (records(m)["s"].adapters for m in (plain, busy))
    assert all(torch.equal(one[a].indices, two[a].indices) for a in one)
    with pytest.raises(ValueError, match="labels"):
        weft.attach(plain, method, name="t", calibration=[{"input_ids": x}])
    with pytest.raises(ValueError, match="starts from no data"):
        weft.attach(plain, weft.LoRA(rank=2), name="t", calibration=batches)


def test_the_base_is_known_again_after_a_merge_for_good(tmp_path: Path) -> None:
    model = trained(llama(), "a")
    weft.save(model, tmp_path / "a")
    weft.merge(model, "a", keep=False)
    twin = copy.deepcopy(model)
    trained(model, "b")
    weft.save(model, tmp_path / "b")
    weft.load(twin, tmp_path / "b")
    with pytest.raises(AdapterFileError, match="other weights"):
        weft.load(twin, tmp_path / "a")


def test_nothing_is_saved_while_something_is_merged(tmp_path: Path) -> None:
    model = trained(llama(), "a", "b")
    weft.merge(model, "a")
    with pytest.raises(AdapterError, match="unmerge"):
        weft.save(model, tmp_path / "b", "b")


def test_a_module_may_be_called_shared(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(x)

    base, x = Holder(), torch.randn(2, 4)
    model = trained(copy.deepcopy(base), "a", targets="shared.0")
    weft.save(model, tmp_path / "a", format="weft")
    weft.load(base, tmp_path / "a")
    assert torch.equal(base(x), model(x))


def test_a_folder_that_is_no_adapter_is_not_replaced(tmp_path: Path) -> None:
    model, mine = trained(llama(), "a"), tmp_path / "mine"
    mine.mkdir()
    weft.save(model, mine)  # empty
    weft.save(model, mine)  # an adapter
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AdapterFileError, match="is no adapter"):
        weft.save(model, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    base = llama()
    folder = tmp_path_factory.mktemp("adapters") / "a"
    weft.save(trained(copy.deepcopy(base), "a", targets="q_proj"), folder, format="weft")
    return base, folder


KEY = "model.layers.0.self_attn.q_proj"


def tensors_changed(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)

    return edit


def info_changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        info = json.loads((folder / INFO).read_text())
        change(info)
        (folder / INFO).write_text(json.dumps(info))

    return edit


def pickled(folder: Path) -> None:
    (folder / TENSORS).rename(folder / "adapter_model.bin")


def cut(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-8])


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (tensors_changed(lambda t: t.pop(f"{KEY}.A")), rf"{KEY} lacks A"),
        (tensors_changed(lambda t: t.update({f"{KEY}.C": torch.ones(1)})), rf"{KEY} has an unknown C"),
        (tensors_changed(lambda t: t.update({"other.A": torch.ones(1)})), "tensors for other"),
        (tensors_changed(lambda t: t.update({f"{KEY}.A": torch.ones(2, 3)})), r"is \(2, 3\), and \(2, 32\)"),
        (tensors_changed(lambda t: t.update({f"{KEY}.A": t[f"{KEY}.A"].int()})), "torch.int32"),
        (pickled, "a pickle"),
        (cut, "damaged or cut short"),
        (lambda folder: (folder / INFO).write_text("["), "not readable"),
        (info_changed(lambda i: i.pop("layout")), "lacks layout"),
        (info_changed(lambda i: i.pop("sites")), "lacks sites"),
        (info_changed(lambda i: i.update(format="x")), "not readable"),
        (info_changed(lambda i: i.update(format=99)), "upgrade weft"),
        (info_changed(lambda i: i["method"].update(name="lorra")), "did you mean 'lora'"),
        (info_changed(lambda i: i["method"].update(rank=0)), "at least 1"),
        (info_changed(lambda i: i["sites"][KEY].update(method={"name": "lorra"})), "did you mean 'lora'"),
        (info_changed(lambda i: i.update(method={"name": "norm_tuning"})), "kind linear here"),
        (
            info_changed(lambda i: i["sites"].update({"nowhere": {"kind": "linear"}})),
            "'nowhere', which this model lacks",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_before_anything_changes(
    written: tuple[nn.Module, Path], tmp_path: Path, edit: Callable[[Path], None], sentence: str
) -> None:
    base, folder = written
    shutil.copytree(folder, tmp_path / "a")
    edit(tmp_path / "a")
    with pytest.raises(AdapterFileError, match=sentence):
        weft.load(base, tmp_path / "a")
    assert "weave" not in base.__dict__
    assert not any("adapters" in key for key in base.state_dict())


def test_another_base_and_a_name_in_use_are_refused(written: tuple[nn.Module, Path]) -> None:
    base, folder = written
    torch.manual_seed(1)
    with pytest.raises(AdapterFileError, match="other weights"):
        weft.load(llama(), folder)
    model = trained(copy.deepcopy(base), "a")
    with pytest.raises(AdapterError, match="already has an adapter 'a'"):
        weft.load(model, folder, "a")
    with pytest.raises(AdapterFileError, match="is not a folder"):
        weft.load(model, folder / TENSORS)

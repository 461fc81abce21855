"""FRoD: PEFT's bases in our method give PEFT's outputs and gradients, and folders cross both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from tests.interop.architectures import ARCHITECTURES, assert_close, base, outputs, quiet, reloaded, shake, trained
from weft.adapter import AdapterFileError
from weft.core.joint import basis, in_basis
from weft.core.router import shared_tensors

pytestmark = pytest.mark.oracle

TARGETS = {
    "llama": ["q_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_fc"],
    "bert": ["query", "attention.output.dense", "intermediate.dense"],
}
FILE = "adapter_model.safetensors"


def config(architecture: str, **options: Any) -> Any:
    with quiet():
        return peft.FrodConfig(target_modules=TARGETS[architecture], progressbar=False, sparse_rate=0.05, **options)


@pytest.mark.parametrize("architecture", TARGETS)
def test_what_peft_wrote_computes_and_learns_the_same_here(architecture: str, tmp_path: Path) -> None:
    batch, model = ARCHITECTURES[architecture].batch(), base(architecture)
    theirs = trained(base(architecture), config(architecture), tmp_path)
    plain = outputs(model, batch)
    weft.load(model, tmp_path, name="a")
    assert_close(outputs(model, batch), outputs(theirs, batch), plain)
    found = []
    for each in (theirs, model):
        each(**batch).logits.square().sum().backward()
        ends = ("frod_lambda_l.default", "frod_lambda_s_values.default") if each is theirs else ("a.d", "a.s")
        found.append([[p.grad for n, p in each.named_parameters() if n.endswith(end)] for end in ends])
    for wanted, own in zip(*found, strict=True):
        assert len(own) == len(wanted) > 0
        for a, b in zip(own, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
    weft.save(model, tmp_path / "again", name="a", format="peft")
    assert_close(outputs(reloaded(base(architecture), tmp_path / "again"), batch), outputs(model, batch), plain)


@pytest.mark.parametrize("architecture", TARGETS)
def test_what_we_wrote_computes_the_same_there(architecture: str, tmp_path: Path) -> None:
    batch, model = ARCHITECTURES[architecture].batch(), base(architecture)
    plain = outputs(model, batch)
    weft.attach(
        model, weft.FRoD(sparse_rate=0.05, places_seed=3), f"re:.*({'|'.join(TARGETS[architecture])})$", name="a"
    )
    assert torch.equal(outputs(model, batch), plain)
    shake(weft.parameters(model), 0.1)
    weft.save(model, tmp_path, name="a", format="peft")
    wanted = outputs(model, batch)
    assert_close(outputs(reloaded(base(architecture), tmp_path), batch), wanted, plain)
    again = base(architecture)
    weft.load(again, tmp_path)
    assert_close(outputs(again, batch), wanted, plain)


def test_every_weight_of_a_role_is_written_in_one_basis() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(6, 8, dtype=torch.float64) for _ in range(3)]
    v, inverse = basis(weights, 1e-3)
    torch.testing.assert_close(inverse @ v, torch.eye(8, dtype=torch.float64))
    for w in weights:
        u, scales = in_basis(w, inverse)
        torch.testing.assert_close(u.norm(dim=0), torch.ones(8, dtype=torch.float64))
        torch.testing.assert_close(u * scales @ v.mT, w)
    plain = [w.float() for w in weights]
    assert torch.equal(basis(plain, 1e-3)[0], peft.tuners.frod.model._projection_from_weights(plain, 1e-3))


@torch.no_grad()
def test_layers_of_a_role_share_and_others_do_not() -> None:
    model = base("llama")
    plan = weft.attach(model, weft.FRoD(), ["q_proj", "k_proj"], name="a")
    assert set(plan.shared()["frod"]) == {
        f"{k}/self_attn/{p}_proj/32" for k in ("V", "V_inverse", "places") for p in "qk"
    }
    site = plan.sites[0]
    alone = base("llama")
    weft.attach(alone, weft.FRoD(), ["model.layers.0.self_attn.q_proj"], name="a")
    ours, one = (m.adapters.a.frod._buffers["V/self_attn/q_proj/32"] for m in (model, alone))
    assert not torch.allclose(ours, one)
    router_use = shared_tensors([(site.method, site.site, None)])
    assert not router_use["V/self_attn/q_proj/32"].tensor.any(), "without weights, only the shapes are known"


def test_bases_that_nobody_can_make_again(tmp_path: Path) -> None:
    trained(base("llama"), config("llama", save_projection=False), tmp_path)
    with pytest.raises(AdapterFileError, match="save the adapter with save_projection=True"):
        weft.load(base("llama"), tmp_path)
    with quiet():
        wide = peft.FrodConfig(target_modules=["mlp.c_proj"], progressbar=False)
    trained(base("gpt2"), wide, tmp_path / "wide")
    with pytest.raises(AdapterFileError, match="nothing of 64 directions of its basis"):
        weft.load(base("gpt2"), tmp_path / "wide")
    model, batch = base("gpt2"), ARCHITECTURES["gpt2"].batch()
    weft.attach(model, weft.FRoD(sparse_rate=0.1), ["mlp.c_proj"], name="a")
    shake(weft.parameters(model), 0.3)
    weft.save(model, tmp_path / "ours", name="a", format="peft")
    wanted, plain = outputs(model, batch), outputs(base("gpt2"), batch)
    assert_close(outputs(reloaded(base("gpt2"), tmp_path / "ours"), batch), wanted, plain)
    trained(base("llama"), config("llama"), tmp_path / "two")
    file = tmp_path / "two" / FILE
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "frod_V.mlp_up_proj" not in k}, file)
    with pytest.raises(AdapterFileError, match=r"frod_V\.mlp_up_proj, is not in the file"):
        weft.load(base("llama"), tmp_path / "two")

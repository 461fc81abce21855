"""PEFT's own tensors in our methods give PEFT's outputs, where the equations are easy to get wrong."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import weft
from weft.attach import attach_plan

pytestmark = pytest.mark.oracle


class Net(nn.Module):
    """An embedding and two linear layers of different shapes."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(20, 16), nn.Linear(16, 24), nn.Linear(24, 16, bias=False)

    def forward(self, ids):
        return self.down(torch.tanh(self.up(self.embed(ids))))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


IDS = torch.arange(12).view(3, 4)
LINEARS = ["up", "down"]


def theirs(net, config):
    """A copy of the net with PEFT's adapter, every trained tensor moved away from its start."""
    model = peft.inject_adapter_in_model(config, copy.deepcopy(net))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


def ours(net, method, tensors, shared=None):
    """The net with our method, holding PEFT's tensors: {address: {name: tensor}}."""
    net = copy.deepcopy(net).eval()
    plan = weft.resolve(net, method, list(tensors))
    frozen = {k: {n: weft.core.Frozen(t) for n, t in v.items()} for k, v in (shared or {}).items()}
    copied = {
        a: {k: t if isinstance(t, weft.core.Frozen) else t.detach().clone() for k, t in v.items()}
        for a, v in tensors.items()
    }
    attach_plan(net, plan, tensors=copied, shared=frozen)
    weft.use(net, plan.name)
    return net


def agree(ours, theirs, *batch):
    with torch.no_grad():
        wanted, found = theirs(*batch), ours(*batch)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        weft.use(ours, None)
        assert (ours(*batch) - wanted).abs().max() > 1e-2, "PEFT's adapter did nothing: nothing was compared"


def lora_tensors(module):
    conv = module.lora_A["default"].weight.ndim > 2
    b = module.lora_B["default"].weight
    return {
        "A": module.lora_A["default"].weight,
        "B": b.flatten(1) if conv else b,
        "magnitude": module.lora_magnitude_vector["default"].weight.flatten(),
    }


def test_dora_linear_and_embedding():
    net = Net()
    model = theirs(net, peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["embed", *LINEARS]))
    tensors = {n: lora_tensors(getattr(model, n)) for n in LINEARS}
    e = model.embed
    tensors["embed"] = {
        "A": e.lora_embedding_A["default"],
        "B": e.lora_embedding_B["default"],
        "magnitude": e.lora_magnitude_vector["default"].weight.flatten(),
    }
    agree(ours(net, weft.DoRA(rank=4, alpha=6.0), tensors), model, IDS)


def test_dora_convolution():
    net = ConvNet()
    model = theirs(net, peft.LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=["conv"]))
    agree(ours(net, weft.DoRA(rank=4, alpha=4.0), {"conv": lora_tensors(model.conv)}), model, torch.randn(2, 4, 6, 6))


def test_vera():
    net = Net()
    model = peft.get_peft_model(copy.deepcopy(net), peft.VeraConfig(r=6, projection_prng_key=5, target_modules=LINEARS))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.5)
    inner = model.base_model.model
    tensors = {
        n: {"d": getattr(inner, n).vera_lambda_d["default"], "b": getattr(inner, n).vera_lambda_b["default"]}
        for n in LINEARS
    }
    method = weft.VeRA(rank=6, projection_seed=5)
    drawn = method.shared([s.site for s in weft.resolve(net, method, LINEARS).sites])
    assert torch.equal(drawn["A"].tensor, model.base_model.vera_A["default"]), "the same seed gives the same matrices"
    assert torch.equal(drawn["B"].tensor, model.base_model.vera_B["default"])
    shared = {"vera": {"A": model.base_model.vera_A["default"], "B": model.base_model.vera_B["default"]}}
    agree(ours(net, method, tensors, shared), model.eval(), IDS)


@pytest.mark.parametrize(
    ("theirs_options", "ours_options"),
    [
        ({}, {}),
        ({"use_cayley_neumann": False}, {"neumann_terms": None}),
        ({"num_cayley_neumann_terms": 7}, {"neumann_terms": 7}),
        ({"block_share": True}, {"block_share": True}),
        (
            {"coft": True, "eps": 0.2, "use_cayley_neumann": False},
            {"constrained": True, "eps": 0.2, "neumann_terms": None},
        ),
    ],
)
def test_oft(theirs_options, ours_options):
    net, targets = Net(), ["embed", *LINEARS]
    config = peft.OFTConfig(r=0, oft_block_size=8, target_modules=targets, **theirs_options)
    model = theirs(net, config)
    tensors = {n: {"weight": getattr(model, n).oft_R["default"].weight.clone()} for n in LINEARS}
    tensors["embed"] = {"weight": model.embed.oft_embedding_R["default"].weight.clone()}
    agree(ours(net, weft.OFT(block_size=8, **ours_options), tensors), model, IDS)


def test_oft_convolution_is_what_peft_merges():
    """PEFT's live forward adds overlapping patches up, so its identity is none; its merged weight is the paper's."""
    net = ConvNet()
    model = theirs(net, peft.OFTConfig(r=0, oft_block_size=6, target_modules=["conv"]))
    adapted = ours(net, weft.OFT(block_size=6), {"conv": {"weight": model.conv.oft_R["default"].weight.clone()}})
    model.conv.merge()
    agree(adapted, model, torch.randn(2, 4, 6, 6))


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT looks for its CUDA kernel and says that there is none
def test_boft():
    net = Net()
    model = theirs(net, peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=LINEARS))
    tensors = {
        n: {"A": getattr(model, n).boft_R["default"], "s": getattr(model, n).boft_s["default"].flatten()}
        for n in LINEARS
    }
    agree(ours(net, weft.BOFT(block_size=4), tensors), model, IDS)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("factors", [2, 3])
def test_boft_orders_are_pefts(factors):
    """PEFT runs several factors with its CUDA kernel only; which channels meet is computed without it."""
    from peft.tuners.boft.layer import Linear

    from weft.core.rotations import butterfly_order

    layer = Linear(nn.Linear(32, 8), "default", peft.BOFTConfig(boft_block_size=4))
    for level in range(factors):
        wanted = layer.block_butterfly_perm(32, 8 // 2**level, 2, factors - 1)
        assert torch.equal(butterfly_order(32, 4, level, torch.device("cpu")), wanted)


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_road(variant):
    net = Net()
    model = theirs(net, peft.RoadConfig(variant=f"road_{variant}", group_size=8, target_modules=LINEARS))
    tensors = {
        n: {"theta": getattr(model, n).road_theta["default"], "alpha": getattr(model, n).road_alpha["default"]}
        for n in LINEARS
    }
    agree(ours(net, weft.RoAd(variant=variant, group_size=8), tensors), model, IDS)


@pytest.mark.parametrize("feedforward", [False, True])
def test_ia3(feedforward):
    net = Net()
    config = peft.IA3Config(target_modules=LINEARS, feedforward_modules=LINEARS if feedforward else [])
    model = theirs(net, config)
    tensors = {n: {"gain": getattr(model, n).ia3_l["default"].flatten()} for n in LINEARS}
    agree(ours(net, weft.IA3(feedforward=feedforward), tensors), model, IDS)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_edit_the_base_in_peft_leave_ours_alone(start):
    """PEFT's trained adapter on its edited base is our difference on the base that came in."""
    net = Net().eval()
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=start, target_modules=LINEARS)
    untrained = peft.inject_adapter_in_model(config, copy.deepcopy(net))
    method = weft.LoRA(rank=4, alpha=6.0, start=start)
    fresh = copy.deepcopy(net)
    weft.attach(fresh, method, LINEARS)
    tensors = {}
    trained = copy.deepcopy(untrained)
    for n in LINEARS:
        found, module = getattr(fresh, n).adapters.default, getattr(trained, n)
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        torch.testing.assert_close(found.B @ found.A, b @ a, rtol=1e-4, atol=1e-5)
        start_of = {"A0": weft.core.Frozen(a.detach().clone()), "B0": weft.core.Frozen(b.detach().clone())}
        with torch.no_grad():
            a.add_(torch.randn_like(a) * 0.1)
            b.add_(torch.randn_like(b) * 0.1)
        tensors[n] = {"A": a, "B": b, **start_of}
    agree(ours(net, method, tensors), trained, IDS)


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal"])
def test_several_such_adapters_live_side_by_side(start):
    net = Net().eval()
    before = copy.deepcopy(net.state_dict())
    base = net(IDS)
    weft.attach(net, weft.LoRA(rank=4, start=start), LINEARS, name="one")
    with torch.no_grad():
        for p in weft.parameters(net, "one"):
            p.add_(torch.randn_like(p) * 0.1)
        alone = net(IDS)
        weft.attach(net, weft.LoRA(rank=2, start=start), LINEARS, name="two")
        torch.testing.assert_close(net(IDS), base, rtol=1e-5, atol=1e-5)
        weft.use(net, "one")
        assert torch.equal(net(IDS), alone)
        weft.use(net, None)
        assert torch.equal(net(IDS), base)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items() if "adapters" not in k)


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
def test_corda_starts_from_real_inputs(mode):
    """B0 A0 is the part of W along the largest (or smallest) singular directions of W C, by the paper's algorithm."""
    net = Net().double().eval()
    inputs = []
    handle = net.down.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
    net(IDS)
    handle.remove()
    weft.attach(net, weft.LoRA(rank=4, alpha=8.0, start=f"corda-{mode}"), ["down"], calibration=[IDS])
    c = inputs[0].mT @ inputs[0] / len(inputs[0])
    c = c + 0.01 * c.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    u, s, v = torch.linalg.svd(net.down.weight @ c, full_matrices=False)
    chosen = slice(4) if mode == "instruction" else slice(-4, None)
    wanted = u[:, chosen] @ torch.diag(s[chosen]) @ v[chosen] @ torch.linalg.inv(c)
    adapter = net.down.adapters.default
    torch.testing.assert_close(2.0 * adapter.B @ adapter.A, wanted, rtol=1e-4, atol=1e-6)


def test_dropout_is_for_training_only():
    net = Net()
    weft.attach(net, weft.LoRA(rank=4, dropout=0.5), LINEARS)
    with torch.no_grad():
        for p in weft.parameters(net):
            p.add_(torch.randn_like(p) * 0.1)
    assert not torch.equal(net(IDS), net(IDS))
    net.eval()
    assert torch.equal(net(IDS), net(IDS))


@pytest.mark.parametrize(
    ("options", "target", "words"),
    [
        ({"rank": 3, "start": "orthogonal"}, "up", "even rank"),
        ({"rank": 17, "start": "pissa"}, "up", "16 directions"),
        ({"rank": 2, "start": "corda-knowledge"}, "embed", "linear layer"),
        ({"rank": 2, "freeze_a": True}, "embed", "start='normal'"),
    ],
)
def test_a_start_that_does_not_fit_says_why(options, target, words):
    with pytest.raises(weft.targets.TargetError, match=words):
        weft.attach(Net(), weft.LoRA(**options), [target])


def test_corda_without_data_is_an_error():
    with pytest.raises(ValueError, match="calibration"):
        weft.attach(Net(), weft.LoRA(rank=2, start="corda-instruction"), ["up"])

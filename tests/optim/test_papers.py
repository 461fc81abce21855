"""Every optimiser of our own against its paper's update, written densely, over several steps and new subspaces."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.optim.problems import choice, give_gradients, groups_of, make, make_tensors, setting_of
from weft.errors import WeftError
from weft.optim import Pair, Setting, Trained, ZerothOrder
from weft.optim.own import seed_of
from weft.optim.smmf import square_shape

RATE, STEPS = 0.01, 7
DENSE = {"rtol": 0.0, "atol": 1e-6}


class Adam:
    """The textbook's, for the reference implementations."""

    def __init__(self, eps: float = 1e-8):
        self.m, self.v, self.t, self.eps = 0.0, 0.0, 0, eps

    def __call__(self, g: Tensor) -> Tensor:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        return (self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.999**self.t)).sqrt() + self.eps)


def compare(name: str, directions, *, decay: float = 0.0, layers: int = 2, **options) -> None:
    """An optimiser and `directions(weights, gradients, step) -> what each weight moves against` (None: it stays)."""
    trained = make_tensors(layers, torch.float64)
    weights = [t.parameter.detach().clone() for t in trained]
    optimizer = make(choice(name, **options), trained, decay, seed=3)
    for group in optimizer.param_groups:
        group["lr"] = RATE
    for step in range(STEPS):
        gradients = give_gradients(trained, step)
        optimizer.step()
        for i, move in enumerate(directions(weights, gradients, step)):
            if move is not None:
                shrink = 1 - RATE * decay if weights[i].ndim > 1 else 1.0
                weights[i] = shrink * weights[i] - RATE * move
        for t, w in zip(trained, weights, strict=True):
            torch.testing.assert_close(t.parameter.data, w, **DENSE, msg=f"{t.name} after step {step}")


@pytest.mark.parametrize("density", [0.25, 1.0])
def test_frugal_by_columns(density):
    adams: dict[int, Adam] = {}

    def directions(weights, gradients, step):
        for i, g in enumerate(gradients):
            if g.ndim == 1:
                yield adams.setdefault(i, Adam())(g)
                continue
            if step % 3 == 0:
                adams[i] = Adam()
            draw = torch.Generator().manual_seed(seed_of(3, step // 3, i))
            chosen = torch.randperm(g.shape[1], generator=draw)[: max(1, round(density * g.shape[1]))]
            u = torch.sign(g) * 0.5
            u[:, chosen] = adams[i](g[:, chosen])
            yield u

    compare("frugal", directions, decay=0.1, density=density, update_gap=3, sign_scale=0.5)


def test_frugal_by_singular_directions():
    adams: dict[int, Adam] = {}
    bases: dict[int, Tensor] = {}

    def directions(weights, gradients, step):
        for i, g in enumerate(gradients):
            if g.ndim == 1:
                yield adams.setdefault(i, Adam())(g)
                continue
            tall = g.shape[0] > g.shape[1]
            g = g.mT if tall else g
            if step % 3 == 0:
                values, vectors = torch.linalg.eigh(g @ g.mT)
                adams[i], bases[i] = Adam(), vectors[:, values.argsort(descending=True)[: round(0.5 * len(values))]]
            p = bases[i]
            u = p @ adams[i](p.mT @ g) + torch.sign(g - p @ p.mT @ g)
            yield u.mT if tall else u

    compare("frugal", directions, projection="svd", density=0.5, update_gap=3)


def test_frugal_by_blocks_has_averages_for_some_tensors_and_changes_which():
    trained = make_tensors(4)
    optimizer = make(choice("frugal", projection="blocks", density=0.5, update_gap=2), trained)
    chosen = []
    for step in range(8):
        before = [t.parameter.detach().clone() for t in trained]
        give_gradients(trained, step)
        optimizer.step()
        signs = [
            bool(((t.parameter - b).abs() / 0.01 - 1).abs().max() < 1e-3) and t.parameter.ndim > 1
            for t, b in zip(trained, before, strict=True)
        ]
        if step % 2 == 1:  # Adam's first step is a sign as well
            chosen.append(tuple(signs))
    assert all(any(s) and not all(s) for s in chosen)
    assert len(set(chosen)) > 1


def test_smmf():
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def rank_one(m: Tensor) -> Tensor:
        return torch.outer(m.sum(1), m.sum(0)) / m.sum()

    def directions(weights, gradients, step):
        for i, g in enumerate(gradients):
            square = g.reshape(square_shape(g.numel()))
            b_m, b_v = 0.9 * 0.99**step, 1 - (step + 1) ** -0.5
            m, v = kept.get(i, (torch.zeros_like(square), torch.zeros_like(square)))
            m = b_m * m + (1 - b_m) * square
            v = b_v * v + (1 - b_v) * square**2
            kept[i] = torch.sign(m) * rank_one(m.abs()), rank_one(v)
            yield (m / (v.sqrt() + 1e-8)).view_as(g)

    compare("smmf", directions, decay=0.1, growth=0.99)


@pytest.mark.parametrize(
    ("count", "shape"), [(36, (6, 6)), (48, (8, 6)), (7, (7, 1)), (1, (1, 1)), (2**20, (1024, 1024))]
)
def test_smmf_makes_the_squarest_matrix(count, shape):
    assert square_shape(count) == shape


def test_natural_galore():
    adams: dict[int, Adam] = {}
    bases: dict[int, Tensor] = {}
    past: dict[int, list[Tensor]] = {}

    def directions(weights, gradients, step):
        for i, g in enumerate(gradients):
            if g.ndim == 1:
                yield adams.setdefault(i, Adam())(g)
                continue
            tall = g.shape[0] > g.shape[1]
            g = g.mT if tall else g
            if step % 4 == 0:
                values, vectors = torch.linalg.eigh(g @ g.mT)
                bases[i] = vectors[:, values.argsort(descending=True)[:3]]
                adams[i], past[i] = Adam(), []
            low = bases[i].mT @ g
            past[i] = [*past[i], low.flatten()][-2:]
            fisher = 0.7 * torch.eye(low.numel(), dtype=g.dtype) + sum(torch.outer(h, h) for h in past[i])
            natural = torch.linalg.inv(fisher) @ low.flatten()
            u = 0.25 * bases[i] @ adams[i](natural.view_as(low))
            yield u.mT if tall else u

    compare("natural-galore", directions, decay=0.1, damping=0.7)


def adam_on(chosen, period: int):
    """AdamW on the tensors that `chosen(turn)` names by layer, started anew with every turn."""
    adams: dict[int, Adam] = {}
    layers = [t.layer for t in make_tensors(3)]

    def directions(weights, gradients, step):
        turn, always = chosen(step // period)
        for i, g in enumerate(gradients):
            if layers[i] not in turn:
                yield None
                continue
            if step % period == 0 and not (always and layers[i] is None):
                adams[i] = Adam()
            yield adams.setdefault(i, Adam())(g)

    return directions


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_badam(order):
    def turn(number):
        if order == "random":
            draw = torch.Generator().manual_seed(seed_of(3, number // 4))
            place = int(torch.randperm(4, generator=draw)[number % 4])
        else:
            place = number % 4 if order == "ascending" else 3 - number % 4
        return [(0, 1, 2, None)[place]], False

    compare("badam", adam_on(turn, 2), decay=0.1, layers=3, order=order)


def test_badam_visits_every_block_once_a_round():
    trained = make_tensors(3)
    optimizer = make(choice("badam", period=1), trained)
    for _ in range(3):
        seen = []
        for step in range(4):
            seen.append({t.layer for t in trained if t.parameter.requires_grad})
            give_gradients(trained, step)
            optimizer.step()
        assert sorted(map(str, seen)) == ["{0}", "{1}", "{2}", "{None}"]
    optimizer.finish()
    assert all(t.parameter.requires_grad for t in trained)


def test_lisa():
    def turn(number):
        draw = torch.Generator().manual_seed(seed_of(3, number))
        return [*torch.randperm(3, generator=draw)[:2].tolist(), None], True

    trained = make_tensors(3, torch.float64)
    optimizer = choice("lisa", layers=2, period=3).make(groups_of(trained), setting_of(trained, seed=3))
    weights, directions = [t.parameter.detach().clone() for t in trained], adam_on(turn, 3)
    for step in range(STEPS):
        gradients = give_gradients(trained, step)
        optimizer.step()
        for i, move in enumerate(directions(weights, gradients, step)):
            weights[i] = weights[i] if move is None else weights[i] - RATE * move
        for t, w in zip(trained, weights, strict=True):
            torch.testing.assert_close(t.parameter.data, w, **DENSE)
    with pytest.raises(WeftError, match="only 3 adapted layers"):
        make(choice("lisa", layers=4), make_tensors(3))


@pytest.mark.parametrize("name", ["scaled-adamw", "scaled-sgd"])
def test_riemannian_preconditioning(name):
    adams: dict[int, Adam] = {}
    eye = 0.01 * torch.eye(4, dtype=torch.float64)

    def directions(weights, gradients, step):
        names = [t.name for t in make_tensors(2)]
        for i, g in enumerate(gradients):
            if names[i].endswith("A"):
                b = weights[i + 1]
                g = torch.linalg.inv(b.mT @ b + eye) @ g
            elif names[i].endswith("B"):
                a = old_a[i - 1] if (i - 1) in old_a else weights[i - 1]
                g = g @ torch.linalg.inv(a @ a.mT + eye)
            yield adams.setdefault(i, Adam())(g) if name == "scaled-adamw" else g

    old_a: dict[int, Tensor] = {}

    def simultaneous(weights, gradients, step):
        old_a.update({i: w.clone() for i, w in enumerate(weights)})
        return list(directions(weights, gradients, step))

    compare(name, simultaneous, decay=0.1, damping=0.01)


def test_preconditioning_of_groups_and_experts_is_block_by_block():
    draw = torch.Generator().manual_seed(0)
    down, up = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((2, 3, 5), (2, 7, 3)))
    results = []
    for d, u, pair in ((down, up, {"experts": True}), (down.flatten(0, 1), up.flatten(0, 1), {"groups": 2})):
        p, q = torch.nn.Parameter(d.clone()), torch.nn.Parameter(u.clone())
        trained = [Trained("A", p), Trained("B", q)]
        optimizer = choice("scaled-sgd").make(groups_of(trained), Setting(trained, 0.1, pairs=[Pair(p, q, **pair)]))
        p.grad, q.grad = p.detach().sin(), q.detach().cos()
        optimizer.step()
        results.append((p.detach().reshape(2, 3, 5), q.detach().reshape(2, 7, 3)))
    torch.testing.assert_close(results[0], results[1], **DENSE)
    for e in range(2):
        eye = 1e-6 * torch.eye(3, dtype=torch.float64)
        wanted = down[e] - 0.1 * torch.linalg.inv(up[e].mT @ up[e] + eye) @ down[e].sin()
        torch.testing.assert_close(results[0][0][e], wanted, **DENSE)


def test_a_step_of_the_product_forgets_how_it_is_split():
    """The point of the metric: (A, B) and (c A, B / c) make the same first-order step of B A."""
    moves = []
    for c in (1.0, 5.0):
        draw = torch.Generator().manual_seed(0)
        a = torch.nn.Parameter(c * torch.randn(3, 6, generator=draw, dtype=torch.float64))
        b = torch.nn.Parameter(torch.randn(5, 3, generator=draw, dtype=torch.float64) / c)
        trained = [Trained("A", a), Trained("B", b)]
        optimizer = choice("scaled-sgd", damping=1e-12).make(groups_of(trained), Setting(trained, pairs=[Pair(a, b)]))
        before = (b @ a).detach()
        for group in optimizer.param_groups:
            group["lr"] = 1e-5
        ((b @ a) - 1).square().sum().backward()
        optimizer.step()
        moves.append((b @ a).detach() - before)
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("queries", [1, 3])
def test_mezo_moves_against_central_differences(queries):
    trained = make_tensors(1, torch.float64)
    optimizer = make(choice("mezo", queries=queries, perturbation=1e-3), trained, 0.1, seed=3)
    assert isinstance(optimizer, ZerothOrder)
    targets = [torch.full_like(t.parameter, 0.3) for t in trained]

    def loss(weights):
        return sum(((w - y) ** 2).sum() for w, y in zip(weights, targets, strict=True)).item()

    weights = [t.parameter.detach().clone() for t in trained]
    for step in range(3):
        order = [p for group in optimizer.param_groups for p in group["params"]]
        place = {id(p): i for i, p in enumerate(order)}
        mean = [torch.zeros_like(w) for w in weights]
        for q in range(queries):
            seed = seed_of(3, step, q)
            z = [
                torch.randn(
                    w.shape, generator=torch.Generator().manual_seed(seed + place[id(t.parameter)]), dtype=w.dtype
                )
                for t, w in zip(trained, weights, strict=True)
            ]
            above, below = (loss([w + e * d for w, d in zip(weights, z, strict=True)]) for e in (1e-3, -1e-3))
            mean = [m + (above - below) / 2e-3 * d / queries for m, d in zip(mean, z, strict=True)]
        weights = [w * (1 - RATE * (0.1 if w.ndim > 1 else 0)) - RATE * m for w, m in zip(weights, mean, strict=True)]
        for seed in optimizer.seeds():
            optimizer.move(seed, 1e-3)
            above = loss([t.parameter.data for t in trained])
            optimizer.move(seed, -2e-3)
            below = loss([t.parameter.data for t in trained])
            optimizer.move(seed, 1e-3)
            optimizer.tell(seed, (above - below) / 2e-3)
        optimizer.step()
        for t, w in zip(trained, weights, strict=True):
            torch.testing.assert_close(t.parameter.data, w, **DENSE)


def test_adazeta_asks_for_more_directions_in_later_passes():
    trained = make_tensors(1)
    optimizer = choice("adazeta", factor=1.0, exponent=0.5, queries=3).make(
        groups_of(trained), setting_of(trained, steps_per_epoch=2)
    )
    counts = []
    for _ in range(30):
        seeds = optimizer.seeds()
        counts.append(len(seeds))
        for seed in seeds:
            optimizer.tell(seed, 0.0)
        optimizer.step()
    assert counts == [max(1, min(int(math.sqrt(1 + step // 2)), 3)) for step in range(30)]
    assert (counts[0], counts[-1]) == (1, 3)


def test_the_slope_norm_is_the_estimates_length():
    trained = make_tensors(3)
    optimizer = make(choice("mezo", queries=2), trained)
    before = [t.parameter.detach().clone() for t in trained]
    for slope, seed in zip((2.0, -1.0), optimizer.seeds(), strict=True):
        optimizer.tell(seed, slope)
    told = optimizer.slope_norm()
    optimizer.step()
    moved = sum((t.parameter - b).square().sum().item() for t, b in zip(trained, before, strict=True)) ** 0.5
    assert moved / 0.01 == pytest.approx(told, rel=0.2)


def test_spsa_gc_divides_by_its_direction_and_looks_ahead():
    trained = make_tensors(1, torch.float64)
    options = {"queries": 2, "perturbation": 0.02, "perturbation_decay": 0.5, "momentum": 0.8, "rate_decay": 0.3}
    optimizer = make(choice("spsa-gc", **options), trained, 0.1, seed=3)
    targets = [torch.full_like(t.parameter, 0.3) for t in trained]

    def loss():
        pairs = zip(trained, targets, strict=True)
        return sum(((t.parameter.data - y) ** 2).sum() for t, y in pairs).item()

    gathered = None
    for step in (1, 2, 3):
        before, estimates = [t.parameter.data.clone() for t in trained], []
        assert optimizer.perturbation == pytest.approx(0.02 / step**0.5)
        for seed in optimizer.seeds():
            size = optimizer.perturbation
            optimizer.move(seed, 1.0)
            direction = [t.parameter.data - b for t, b in zip(trained, before, strict=True)]
            assert all(((d.abs() >= 0.5 - 1e-9) & (d.abs() <= 1)).all() for d in direction)
            assert any((d < 0).any() for d in direction)
            assert any((d > 0).any() for d in direction)
            optimizer.move(seed, size - 1.0)
            above = loss()
            optimizer.move(seed, -2 * size)
            below = loss()
            optimizer.move(seed, size)
            optimizer.tell(seed, (above - below) / (2 * size))
            estimates.append([(above - below) / (2 * size * d) for d in direction])
        mean = [sum(each) / 2 for each in zip(*estimates, strict=True)]
        gathered = mean if gathered is None else [0.8 * m + g for m, g in zip(gathered, mean, strict=True)]
        optimizer.step()
        for t, b, g, m in zip(trained, before, mean, gathered, strict=True):
            decay = 1 - RATE * (0.1 if b.ndim > 1 else 0)
            torch.testing.assert_close(t.parameter.data, decay * b - RATE / step**0.3 * (g + 0.8 * m), **DENSE)

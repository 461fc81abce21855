"""Many adapters in one basis: as near as a dense search comes, exact where that can be, and LoRA again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weft.compress import joint_basis, low_rank_change


def draw(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some(count: int, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Adapters that are alike in part, of different ranks and sizes."""
    u, v = draw(9, 4, seed=seed), draw(4, 7, seed=seed + 1)
    pairs = []
    for n in range(count):
        own = (0.3 * draw(9, 1, seed=seed + 10 + n), draw(1, 7, seed=seed + 50 + n))
        pairs.append((torch.cat([u @ draw(4, 4, seed=seed + 90 + n), own[0]], 1) * (n + 1), torch.cat([v, own[1]])))
    return pairs


def lost(pairs: list[tuple[Tensor, Tensor]], found) -> Tensor:
    each = []
    for n, (b, a) in enumerate(pairs):
        u, v = found.pair(n)
        each.append((b @ a - u @ v).norm() / (b @ a).norm())
    return torch.stack(each)


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_loss_is_what_the_tensors_lose(diagonal: bool) -> None:
    pairs = some(6)
    found = joint_basis(pairs, 3, diagonal=diagonal)
    torch.testing.assert_close(lost(pairs, found), found.losses)
    assert found.s.shape == ((6, 3) if diagonal else (6, 3, 3))
    assert found.num_values == 9 * 3 + 3 * 7 + found.s.numel()


def test_full_is_as_near_as_dense_alternation_comes() -> None:
    pairs = some(5)
    changes = torch.stack([b @ a / (b @ a).norm() for b, a in pairs])
    v = torch.linalg.svd(changes.flatten(0, 1))[2][:3]
    for _ in range(300):
        u = torch.linalg.svd(torch.cat([*(changes @ v.mT)], 1))[0][:, :3]
        v = torch.linalg.svd(torch.cat([*(u.mT @ changes)]))[2][:3]
    best = 5 - (u.mT @ changes @ v.mT).square().sum()
    found = joint_basis(pairs, 3, rounds=200, tolerance=0)
    assert found.losses.square().sum().item() == pytest.approx(best.item(), rel=1e-6)
    torch.testing.assert_close(found.u[0].mT @ found.u[0], torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(found.v[0] @ found.v[0].mT, torch.eye(3, dtype=torch.float64))


def test_as_it_is_used_it_is_as_near_as_the_alternation_of_the_paper() -> None:
    """U and V by turns the leading eigenvectors of dense sums, to the end; ours stops early, in single precision."""
    pairs = [(b.float(), a.float()) for b, a in some(40)]
    changes = torch.stack([b @ a / (b @ a).norm() for b, a in pairs]).double()
    v = torch.eye(7).double()[:3]
    for _ in range(200):
        u = torch.linalg.eigh((changes @ v.mT @ v @ changes.mT).sum(0))[1][:, -3:]
        v = torch.linalg.eigh((changes.mT @ u @ u.mT @ changes).sum(0))[1][:, -3:].mT
    theirs = 40 - (u.mT @ changes @ v.mT).square().sum()
    ours = joint_basis(pairs, 3).losses.square().sum()
    assert ours <= 1.001 * theirs


def test_small_losses_are_not_hidden_by_single_precision() -> None:
    u, v = draw(9, 3, seed=1).float(), draw(3, 7, seed=2).float()
    single = joint_basis([(u * draw(3, seed=10 + n).float(), v) for n in range(8)], 3)
    assert single.losses.max() < 1e-6


def test_more_rounds_lose_no_more() -> None:
    pairs = some(6)
    for diagonal in (False, True):
        losses = [
            joint_basis(pairs, 3, diagonal=diagonal, rounds=n, tolerance=0).losses.square().sum().item()
            for n in (1, 5, 50)
        ]
        assert losses == sorted(losses, reverse=True)


def test_one_adapter_is_its_truncated_svd() -> None:
    b, a = some(1)[0]
    found = joint_basis([(b, a)], 2, rounds=100, tolerance=0)
    s = torch.linalg.svdvals(b @ a)
    assert found.losses[0].item() == pytest.approx((s[2:].norm() / s.norm()).item(), rel=1e-6)


def test_what_has_a_joint_basis_is_found() -> None:
    u, v = draw(9, 3, seed=1), draw(3, 7, seed=2)
    diagonal = [(u * draw(3, seed=10 + n), v) for n in range(8)]
    assert joint_basis(diagonal, 3).losses.max() < 1e-6
    assert joint_basis(diagonal, 3, diagonal=True, rounds=500, tolerance=0).losses.max() < 1e-3
    assert joint_basis(diagonal, 2).losses.max() > 0.05


def test_clusters_have_bases_of_their_own() -> None:
    one, other = some(4, seed=0), some(4, seed=500)
    mixed = [pair for both in zip(one, other, strict=True) for pair in both]
    apart, together = joint_basis(mixed, 3, clusters=2), joint_basis(mixed, 3)
    assert apart.cluster.tolist() in ([0, 1] * 4, [1, 0] * 4)
    assert apart.losses.mean() < 0.8 * together.losses.mean()
    torch.testing.assert_close(lost(mixed, apart), apart.losses)


def test_what_does_not_fit_is_refused() -> None:
    pairs = some(2)
    with pytest.raises(ValueError, match="2 adapters make no 3 clusters"):
        joint_basis(pairs, 2, clusters=3)
    with pytest.raises(ValueError, match="different shapes"):
        joint_basis([pairs[0], (pairs[0][1].mT, pairs[0][0].mT)], 2)
    with pytest.raises(ValueError, match="does not fit"):
        joint_basis(pairs, 8)


@pytest.mark.parametrize("given", [{"rank": 2}, {"loss": 0.3}])
def test_a_low_rank_change_is_the_nearest(given: dict[str, float]) -> None:
    tuned, base = draw(2, 6, 5, seed=1), draw(2, 6, 5, seed=2)
    b, a, lost = low_rank_change(tuned, base, **given)
    u, s, v = torch.linalg.svd(tuned - base, full_matrices=False)
    rank = b.shape[-1]
    torch.testing.assert_close(b @ a, u[..., :rank] * s[..., None, :rank] @ v[..., :rank, :])
    torch.testing.assert_close(b.mT @ b, a @ a.mT)  # what is stretched is shared between the two
    assert lost == pytest.approx(((tuned - base - b @ a).norm() / (tuned - base).norm()).item())
    assert rank == 2 or (lost <= 0.3 and rank > 1)
    with pytest.raises(ValueError, match="give one of them"):
        low_rank_change(tuned, base)

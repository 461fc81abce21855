"""Adapters in few bits: the codes come back, and stand for what the equations say."""

from __future__ import annotations

import pytest
import torch

from weft.compress import few_bits, half, ternary
from weft.compress.bits import pack, pack_places, unpack, unpack_places
from weft.compress.one_bit import centroids


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7, 8, 11, 24])
@pytest.mark.parametrize("count", [0, 1, 8, 13])
def test_codes_come_back(bits: int, count: int) -> None:
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(count))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, count).long(), codes)


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="give 1 to 24"):
        pack(torch.zeros(3), 25)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        centroids(9)
    with pytest.raises(ValueError, match="2 bytes are too few for 6 numbers of 3 bits"):
        unpack(torch.zeros(2, dtype=torch.uint8), 3, 6)
    with pytest.raises(ValueError, match="groups of 5 do not divide rows of 12"):
        few_bits(torch.zeros(12, 2), group_size=5)


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 1.0])
def test_places_come_back_in_about_their_entropy(density: float) -> None:
    size = 40_000
    places = (
        torch.rand(size, generator=torch.Generator().manual_seed(7)).argsort()[: round(density * size)].sort().values
    )
    packed, how = pack_places(places)
    assert torch.equal(unpack_places(packed, how), places)
    entropy = sum(-p * torch.tensor(p).log2().item() for p in (density, 1 - density) if p)
    assert 8 * len(packed) / size <= max(1.0 if density == 1 else 0, entropy) + 0.03
    assert len(unpack_places(*pack_places(places[:0]))) == 0
    with pytest.raises(ValueError, match="hold the quotients of"):
        unpack_places(packed, (10 * size, *how[1:]))


def test_centroids_are_medians_of_their_part_of_a_gaussian() -> None:
    torch.testing.assert_close(centroids(1), torch.tensor([-0.67449, 0.67449], dtype=torch.float64), atol=1e-5, rtol=0)
    draws = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = centroids(2)
    nearest = (draws[:, None] - found).abs().argmin(1)
    for k in range(4):
        assert draws[nearest == k].median().item() == pytest.approx(found[k].item(), abs=0.02)


@pytest.mark.parametrize(("turned", "group"), [(False, 0), (True, 0), (False, 3), (True, 3)])
def test_few_bits_are_the_nearest_centroids(turned: bool, group: int) -> None:
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 6)[:, None] + 0.3
    found = few_bits(weight.mT if turned else weight, bits=2, group_size=group)
    wanted = torch.zeros(5, 9)
    for row in range(5):  # by hand: the nearest of all values of the row's, or the group's, own
        for start in range(0, 9, group or 9):
            part = weight[row, start : start + (group or 9)]
            values = centroids(2).float() * part.std(correction=0) + part.mean()
            wanted[row, start : start + len(part)] = values[(part[:, None] - values).abs().argmin(1)]
    torch.testing.assert_close(found.tensor(), wanted.mT if turned else wanted)
    assert found.num_bytes == -(-45 // 4) + 8 * (15 if group else 5)


@pytest.mark.parametrize("shape", [(7,), (2, 8, 4), (2, 4, 8), (3, 4, 2, 2)])
def test_every_shape_has_rows(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    found = few_bits(weight, bits=8).tensor()
    assert found.shape == weight.shape
    assert (found - weight).norm() < 0.03 * weight.norm()


def test_half_loses_its_rounding() -> None:
    weight = 1e-9 * torch.randn(6, 64, generator=torch.Generator().manual_seed(2))  # below what float16 reaches
    found = half(weight)
    assert found.num_bytes == 2 * 6 * 64 + 4
    assert (found.tensor() - weight).norm() < 4e-4 * weight.norm()
    assert torch.equal(half(torch.zeros(3)).tensor(), torch.zeros(3))


def test_more_bits_lose_less_and_a_constant_row_nothing() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    lost = [(few_bits(weight, bits=b).tensor() - weight).norm().item() for b in (1, 2, 4, 8)]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 0.1 * lost[0]
    assert torch.equal(few_bits(torch.full((2, 3), 0.5)).tensor(), torch.full((2, 3), 0.5))
    assert few_bits(weight.bfloat16()).tensor().dtype == torch.bfloat16


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_ternary_keeps_the_signs_of_the_largest(alpha: float | None) -> None:
    change = torch.randn(7, 11, generator=torch.Generator().manual_seed(3))
    found = ternary(change, density=0.2, alpha=alpha)
    kept = change.flatten().abs().argsort(descending=True)[:15]  # 0.2 of 77
    scale = change.flatten()[kept].abs().mean() if alpha is None else 2 * change.std()
    wanted = torch.zeros(77)
    wanted[kept] = scale * change.flatten()[kept].sign()
    torch.testing.assert_close(found.tensor(), wanted.view(7, 11))
    assert found.num_bytes < 15 / 8 + 77 * 0.9 / 8 + 3 + 8  # signs, places, what bytes waste, two scales
    above = ternary(change + 1, density=0.2, alpha=alpha, start=1.0)  # gains start at 1
    torch.testing.assert_close(above.tensor(), wanted.view(7, 11) + 1)


def test_the_scale_of_a_ternary_is_the_nearest() -> None:
    change = torch.randn(400, generator=torch.Generator().manual_seed(4))
    best = (ternary(change, density=0.3).tensor() - change).norm()
    assert all(best < (ternary(change, density=0.3, alpha=a).tensor() - change).norm() for a in (0.5, 1.0, 2.0))
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        ternary(change, density=0)

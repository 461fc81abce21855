"""The laws against figures worked out from their papers, and fits against data that follow the laws."""

from __future__ import annotations

import pytest

from weft.plan.laws import fit_joint, fit_rectified, joint_loss, rectified_loss, step_law_batch, step_law_rate


def test_the_step_law_is_the_papers() -> None:
    # N = 1e9, D = 1e11: 1.79 * 10^(-6.417) * 10^(3.377) and 0.58 * 10^(6.281)
    assert step_law_rate(1e9, 1e11) == pytest.approx(1.79 * 10**-3.04, rel=1e-9)
    assert step_law_batch(1e11) == pytest.approx(0.58 * 10**6.281, rel=1e-9)
    assert step_law_rate(2e9, 1e11) < step_law_rate(1e9, 1e11) < step_law_rate(1e9, 2e11)


LAWS = [{"b": 40.0, "d": 30.0, "beta": 0.6, "e": 1.1}, {"b": 9.0, "d": 3.0, "beta": 0.35, "e": 0.4}]


@pytest.mark.parametrize("law", LAWS)
def test_the_rectified_law_is_found_again(law) -> None:
    points = [(float(n), rectified_loss(n, **law)) for n in (32, 64, 128, 256, 512, 1024)]
    fit = fit_rectified(points, at=8192)
    assert fit.error < 2e-3
    assert fit.prediction == pytest.approx(rectified_loss(8192, **law), rel=0.03)
    assert fit.low <= fit.prediction <= fit.high


def test_a_power_law_alone_is_not_enough_before_the_power_phase() -> None:
    """What the paper shows: with D_l at 0 the flat start cannot be fitted."""
    law = {"b": 2000.0, "d": 900.0, "beta": 0.9, "e": 0.5}
    points = [(float(n), rectified_loss(n, **law)) for n in (32, 64, 128, 256, 512, 1024, 2048)]
    fit = fit_rectified(points, at=10**5)
    assert fit.constants["d"] > 100
    assert fit.error < 2e-3


def test_a_flat_curve_says_so() -> None:
    fit = fit_rectified([(8, 2.0), (16, 2.0), (32, 2.0), (64, 2.0)], at=1000)
    assert fit.prediction == pytest.approx(2.0, abs=1e-6)


def test_the_joint_law_is_found_again() -> None:
    law = {"a": 12.0, "alpha": 0.15, "beta": 0.08, "e": 0.7}
    points = [(x, d, joint_loss(x, d, **law)) for x in (1e8, 1e9, 1e10) for d in (1e3, 1e4, 1e5)]
    fit = fit_joint(points, at=(3e10, 1e6))
    assert fit.prediction == pytest.approx(joint_loss(3e10, 1e6, **law), rel=0.01)
    assert fit.constants["alpha"] == pytest.approx(0.15, rel=0.1)


@pytest.mark.parametrize("fit", [fit_rectified, fit_joint])
def test_few_points_are_refused(fit) -> None:
    with pytest.raises(ValueError, match="four constants"):
        fit([(1, 2, 3)] * 3, at=5)

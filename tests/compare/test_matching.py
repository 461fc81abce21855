"""Sizes are found by the options of the methods themselves, and a method that has none says so."""

from __future__ import annotations

import pytest

import weft
from tests.common.language import llama
from weft.compare.matching import MatchError, match_size, size_options
from weft.registry import method_from_spec
from weft.targets import resolve

MODEL = llama()


def parameters(method) -> float:
    return float(resolve(MODEL, method_from_spec(method)).num_parameters)


def matched(name: str, target: float, tolerance: float = 0.05, **options):
    spec = {"name": name, **options}
    return match_size(spec, parameters, parameters=parameters, target=target, tolerance=tolerance, unit="parameters")


@pytest.mark.parametrize(
    ("name", "options"),
    [("lora", ["rank"]), ("bottleneck", ["width"]), ("fourierft", ["num_frequencies"]), ("ether", []), ("ia3", [])],
)
def test_options_of_size_are_those_that_add_parameters(name: str, options: list[str]) -> None:
    assert size_options({"name": name}, parameters) == options


def test_ranks_come_before_what_is_declared_first() -> None:
    assert size_options({"name": "loretta"}, parameters)[0] == "rank"


def test_a_seed_is_no_size() -> None:
    assert size_options({"name": "vera"}, parameters) == ["rank"]


@pytest.mark.parametrize("name", ["loha", "fourierft", "bottleneck", "shira", "dora"])
@pytest.mark.parametrize("rank", [2, 7])
def test_sizes_are_equal_within_the_tolerance(name: str, rank: int) -> None:
    target = parameters({"name": "lora", "rank": rank})
    found = matched(name, target, 0.25)
    assert found.reached == parameters(found.method)
    assert abs(found.reached / target - 1) <= 0.25
    assert set(found.method) - {"name"} == ({found.option} if found.option else set())


def test_half_of_loha_is_lora() -> None:
    found = matched("loha", parameters({"name": "lora", "rank": 6}), 0.01)
    assert found.method == {"name": "loha", "rank": 3}


def test_a_size_that_fits_stays() -> None:
    own = parameters({"name": "lora", "rank": 8})
    assert matched("lora", own * 1.04, rank=8).option is None
    assert matched("lora", own, rank=8).method == {"name": "lora", "rank": 8}


def test_other_options_stay() -> None:
    found = matched("lora", parameters({"name": "lora", "rank": 3}), alpha=4.0)
    assert found.method == {"name": "lora", "alpha": 4.0, "rank": 3}


def test_a_method_without_a_size_says_so() -> None:
    with pytest.raises(MatchError, match=r"no option that changes its size to"):
        matched("ether", parameters({"name": "lora", "rank": 8}))


def test_what_cannot_be_met_names_the_nearest() -> None:
    with pytest.raises(MatchError, match=r"no rank comes within 5% of 1 parameters; the nearest, rank=1 has"):
        matched("lora", 1)


def test_values_that_a_method_refuses_are_stepped_over() -> None:
    """Only multiples of 6 work: the search goes to a neighbour."""

    def measure(method) -> float:
        rank = method["rank"]
        if rank % 6:
            raise ValueError("a multiple of 6")
        return 10.0 * rank

    found = match_size({"name": "lora", "rank": 12}, measure, parameters=measure, target=300.0, tolerance=0.01, unit="")
    assert (found.option, found.method["rank"], found.reached) == ("rank", 30, 300.0)


def test_the_model_stays_as_it_was() -> None:
    assert "weave" not in MODEL.__dict__
    assert weft.methods()

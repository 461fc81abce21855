"""Weights, options and members are chosen by a loss; a search that was killed ends as one that was not."""

from __future__ import annotations

import math

import pytest

from weft.combine import RuleError
from weft.combining import rule_of
from weft.errors import WeftError
from weft.searching import Greedy, Search, choose, searched_options

START = {"a": 1.0, "b": 1.0}


class Bowl:
    """A loss with its least at a = 0.9, b = 0.3, density = 0.4; it notes what it was asked for."""

    def __init__(self, die_at: int | None = None):
        self.asked: list[tuple[float, ...]] = []
        self.die_at = die_at

    def __call__(self, weights, rule) -> float:
        self.asked.append((*weights.values(), getattr(rule, "density", 0.4)))
        if len(self.asked) == self.die_at:
            raise KeyboardInterrupt
        a, b = weights.get("a", 0.0), weights.get("b", 0.0)
        return (a - 0.9) ** 2 + (b - 0.3) ** 2 + (self.asked[-1][-1] - 0.4) ** 2


def searched(path, loss, rule="ties", how=None, key="one", seed=0):
    how = how or Search(trials=12)
    return choose(how, loss, START, rule_of(rule), file=path / "s.sqlite", key=key, seed=seed)


def test_a_search_begins_with_what_was_asked_for_and_ends_better(tmp_path) -> None:
    bowl = Bowl()
    found = searched(tmp_path, bowl, how=Search(trials=40))
    assert bowl.asked[0] == (1.0, 1.0, 0.2)
    assert bowl.asked[1] == (0.5, 0.5, 0.2)
    assert found.objective == min(t["objective"] for t in found.tried) < 0.05
    assert found.objective == pytest.approx(Bowl()(found.weights, found.rule))
    assert len(found.tried) == 40


def test_the_same_seed_gives_the_same_and_another_one_does_not(tmp_path) -> None:
    bowls = [Bowl(), Bowl(), Bowl()]
    for n, (bowl, seed) in enumerate(zip(bowls, (0, 0, 5), strict=True)):
        searched(tmp_path, bowl, key=str(n), seed=seed)
    assert bowls[0].asked == bowls[1].asked
    assert bowls[0].asked[2:] != bowls[2].asked[2:]


@pytest.mark.parametrize(("sampler", "trials", "die_at"), [("tpe", 12, 10), ("cma", 30, 23)])
def test_a_killed_search_goes_on_and_ends_the_same(tmp_path, sampler, trials, die_at) -> None:
    whole, cut, rest = Bowl(), Bowl(die_at=die_at), Bowl()
    how = Search(trials=trials, sampler=sampler)
    first = searched(tmp_path, whole, key="whole", how=how)
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path, cut, key="cut", how=how)
    second = searched(tmp_path, rest, key="cut", how=how)
    assert cut.asked[:-1] + rest.asked == whole.asked
    assert first == second


def test_cma_closes_in_on_the_best(tmp_path) -> None:
    bowl = Bowl()
    found = searched(tmp_path, bowl, how=Search(trials=90, sampler="cma"))
    assert bowl.asked[0] == (1.0, 1.0, 0.2)
    assert found.objective < 0.01
    off = [math.dist(asked, (0.9, 0.3, 0.4)) for asked in bowl.asked]
    assert sum(off[-20:]) < 0.5 * sum(off[2:22])  # what draws at random gets no nearer
    drawn = Bowl()
    searched(tmp_path, drawn, how=Search(trials=90), key="tpe")
    assert drawn.asked[2:] != bowl.asked[2:]


def test_options_that_are_given_stay_and_a_factor_of_the_weights_is_not_searched(tmp_path) -> None:
    assert set(searched_options(rule_of("ties"))) == {"density", "scale"}
    assert set(searched_options(rule_of("ties"), ("density",))) == {"scale"}
    assert not searched_options(rule_of("task_arithmetic"))
    assert set(searched_options(rule_of("task_arithmetic", {"normalise": True}))) == {"scale"}
    assert set(searched_options(rule_of("slerp"))) == {"t"}
    found = searched(tmp_path, Bowl(), how=Search(trials=6, fixed=("density",)))
    assert found.rule.density == 0.2


def test_what_weights_cost_makes_them_smaller(tmp_path) -> None:
    free = searched(tmp_path, Bowl(), how=Search(trials=16), key="free")
    dear = searched(tmp_path, Bowl(), how=Search(trials=16, l1=1.0), key="dear")
    assert sum(dear.weights.values()) < sum(free.weights.values())
    assert dear.objective == pytest.approx(Bowl()(dear.weights, dear.rule) + sum(dear.weights.values()))


def test_a_soup_takes_what_does_not_make_it_worse(tmp_path) -> None:
    values = {("a",): 1.0, ("b",): 0.5, ("c",): 0.8, ("b", "c"): 0.5, ("b", "c", "a"): 0.7}
    start = dict.fromkeys("abc", 1.0)
    found = choose(
        Greedy(), lambda w, _: values[tuple(w)], start, rule_of("linear"), file=tmp_path / "s", key="", seed=0
    )
    assert list(found.weights) == ["b", "c"]
    assert (found.objective, len(found.tried)) == (0.5, 5)


@pytest.mark.parametrize(
    ("rule", "how", "said"),
    [
        ("ties", Search(low=2.0, high=3.0), "a 1, b 1: outside of the searched weights"),
        ("ties", Search(low=1.0, high=0.0), "a range"),
        ("arcee_fusion", Search(), "no option that could be searched"),
        ("ties", Search(fixed=("densty",)), "did you mean 'density'"),
        ("slerp", Search(sampler="cma"), "two numbers or more"),
        ("ties", Search(sampler="anneal"), "expected 'tpe' or 'cma'"),
    ],
)
def test_what_cannot_be_searched_is_said(tmp_path, rule, how, said) -> None:
    if rule == "arcee_fusion" and rule_of(rule).weighted:
        pytest.fail("the case needs a rule without weights")
    with pytest.raises(RuleError, match=said):
        searched(tmp_path, Bowl(), rule, how)


def test_losses_that_are_no_numbers_are_never_chosen(tmp_path) -> None:
    found = searched(tmp_path, lambda w, _: math.nan if w["a"] == 1.0 else w["a"], how=Search(trials=3))
    assert found.weights["a"] != 1.0
    with pytest.raises(WeftError, match="none of the 2 combinations"):
        searched(tmp_path, lambda *_: math.nan, how=Search(trials=2), key="none")

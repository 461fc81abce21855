"""What a combination is made of, chosen by a loss: coefficients without gradients, or members of a greedy soup."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weft.combine import Rule, RuleError
from weft.errors import WeftError, missing_extra, nearest

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study

__all__ = ["Chosen", "Greedy", "Loss", "Search", "choose", "searched_options"]

_RANGES = {
    "scale": (0.1, 2.0), "density": (0.05, 1.0), "common": (0.1, 1.0), "alpha": (0.0, 1.0), "outliers": (0.0, 0.1),
    "slerp.t": (0.0, 1.0), "nearswap.t": (1e-5, 1e-1),
}  # fmt: skip
"""What is tried of a rule's options: by the option's name, or by rule and name where the same name means another."""
_LOG = {"nearswap.t"}
_DRAWN = 8  # trials before the estimators have seen enough to say where to look

Loss = Callable[[Mapping[str, float], Rule], float]
"""The loss of the combination of {parent: weight} by a rule."""


@dataclass(frozen=True)
class Search:
    """A search of weights and options. trials: combinations that are tried, those of an interrupted search included.

    low, high: what every weight lies between. l1: what a weight's size costs, by which a parent that helps nothing
    gets none (LoraHub: Huang et al. 2023, arXiv 2307.13269, with 0.05 and weights from -1.5 to 1.5).
    fixed: options of the rule that stay as they are.
    sampler: what draws the trials. tpe: where good ones were dense (tree of Parzen estimators); cma: from a Gaussian
    that moves and turns towards them (CMA-ES: Hansen 2016, arXiv 1604.00772), which begins in the middle of all ranges
    and wants more trials, of two numbers or more.
    """

    trials: int = 40
    low: float = 0.0
    high: float = 1.5
    l1: float = 0.0
    fixed: tuple[str, ...] = ()
    sampler: Literal["tpe", "cma"] = "tpe"


@dataclass(frozen=True)
class Greedy:
    """A greedy soup: from the best parent on, each next one stays in if the loss does not get worse.

    Wortsman et al. 2022, arXiv 2203.05482.
    """


@dataclass(frozen=True)
class Chosen:
    """What was found. objective: the smallest value, of the loss and what the weights cost; tried: everything."""

    weights: Mapping[str, float]
    rule: Rule
    objective: float
    tried: tuple[Mapping[str, Any], ...]

    def __str__(self) -> str:
        weights = ", ".join(f"{name} {weight:.3g}" for name, weight in self.weights.items())
        options = "".join(f", {key} {value:.3g}" for key, value in _numbers(self.rule).items())
        return f"chosen of {len(self.tried)}: {weights}{options} ({self.objective:.4f})"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rule = {"name": self.rule.name, **dataclasses.asdict(self.rule)}
        return {**dataclasses.asdict(self), "rule": rule}


def choose(
    how: Search | Greedy,
    loss: Loss,
    start: Mapping[str, float],
    rule: Rule,
    *,
    file: Path,
    key: str,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Chosen:
    """The weights, and with a search the options, for which the loss is smallest.

    start: weights that are tried first. file: SQLite, where a search goes on that was interrupted; key: which search of
        the file it is, to which trials of other models or data do not belong.
    Raises RuleError where there is nothing to search, MissingExtra without optuna or cmaes, WeftError when no loss is
        a number.
    """
    return (
        _soup(loss, start, rule, say)
        if isinstance(how, Greedy)
        else _search(how, loss, start, rule, file, key, seed, say)
    )


def searched_options(rule: Rule, fixed: Sequence[str] = ()) -> dict[str, tuple[float, float]]:
    """The options of a rule that a search varies, and between what. A factor that the weights can be is not one."""
    found = {}
    for field in dataclasses.fields(rule):
        bounds = _RANGES.get(f"{rule.name}.{field.name}", _RANGES.get(field.name))
        if bounds is None or field.name in fixed or isinstance(getattr(rule, field.name), tuple):
            continue
        if field.name == "scale" and rule.weighted and rule.factors((2.0, 4.0)) == _doubled(rule.factors((1.0, 2.0))):
            continue
        found[field.name] = bounds
    return found


def _doubled(factors: Sequence[float] | None) -> tuple[float, ...] | str:
    return "no sum" if factors is None else tuple(2 * f for f in factors)


def _soup(loss: Loss, start: Mapping[str, float], rule: Rule, say: Callable[[str], None]) -> Chosen:
    alone = {name: loss({name: weight}, rule) for name, weight in start.items()}
    order = sorted(alone, key=alone.__getitem__)
    members, best = {order[0]: start[order[0]]}, alone[order[0]]
    tried: list[Mapping[str, Any]] = [{"weights": {name: start[name]}, "loss": alone[name]} for name in order]
    say(f"{order[0]}: loss {best:.4f}, the first of the soup")
    for name in order[1:]:
        more = {**members, name: start[name]}
        found = loss(more, rule)
        tried.append({"weights": more, "loss": found})
        say(f"with {name}: loss {found:.4f}, {'taken' if found <= best else 'left out'}")
        if found <= best:
            members, best = more, found
    return Chosen(members, rule, best, tuple(tried))


def _search(
    how: Search, loss: Loss, start: Mapping[str, float], rule: Rule, file: Path, key: str, seed: int,
    say: Callable[[str], None],
) -> Chosen:  # fmt: skip
    try:
        import optuna
    except ImportError as error:
        raise missing_extra("compare", needs="optuna") from error
    options = _checked(how, start, rule)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{file}", engine_kwargs={"connect_args": {"timeout": 60}})
    with closing(storage.engine.raw_connection()):  # a file that is no database says so here
        pass
    try:
        kept = optuna.create_study(storage=storage, study_name=key, load_if_exists=True)
        study = optuna.create_study()  # in memory: a trial is kept when it is done, so one that was killed never was
        study.add_trials(kept.trials)
        first = _first(how, start, rule, options)
        while (count := len(study.trials)) < how.trials:
            study.sampler = _sampler(how, seed + count)
            if count < len(first):
                study.enqueue_trial(first[count])
            trial = study.ask()
            weights = dict(start)
            if rule.weighted:
                weights = {name: trial.suggest_float(f"w {name}", how.low, how.high) for name in start}
            values = {k: _suggested(trial, rule, k, bounds) for k, bounds in options.items()}
            found = loss(weights, dataclasses.replace(rule, **values))
            value = found + how.l1 * sum(map(abs, weights.values()))
            trial.set_user_attr("loss", found if isfinite(found) else None)
            study.tell(trial, value if isfinite(value) else inf)
            kept.add_trial(study.trials[-1])
            say(f"trial {count + 1}/{how.trials}: {_said(weights | values)}: {value:.4f}")
        return _best(study, start, rule, options)
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _sampler(how: Search, seed: int) -> BaseSampler:
    """A new one for each trial: what it knows is in the trials, so one that was stopped goes on as one that was not."""
    from optuna.samplers import CmaEsSampler, TPESampler

    if how.sampler == "tpe":
        return TPESampler(seed=seed, n_startup_trials=_DRAWN)
    try:
        import_module("cmaes")  # which optuna imports when it draws
    except ImportError as error:
        raise missing_extra("compare", needs="cmaes") from error
    return CmaEsSampler(seed=seed, warn_independent_sampling=False)


def _checked(how: Search, start: Mapping[str, float], rule: Rule) -> dict[str, tuple[float, float]]:
    names = [field.name for field in dataclasses.fields(rule)]
    for name in how.fixed:
        if name not in names:
            raise RuleError(f"{rule.name} has no option {name!r}; {nearest(name, names)}")
    if how.trials < 1 or not how.low < how.high or how.l1 < 0:
        raise RuleError(
            f"trials={how.trials}, weights from {how.low} to {how.high}, l1={how.l1}: expected a trial or more, "
            "a range and a cost of 0 or more"
        )
    outside = [f"{name} {weight:g}" for name, weight in start.items() if not how.low <= weight <= how.high]
    if rule.weighted and outside:
        raise RuleError(f"{', '.join(outside)}: outside of the searched weights, {how.low} to {how.high}")
    if how.sampler not in ("tpe", "cma"):
        raise RuleError(f"sampler={how.sampler!r}: expected 'tpe' or 'cma'")
    options = searched_options(rule, how.fixed)
    if not options and not rule.weighted:
        raise RuleError(f"{rule.name} reads no weights and has no option that could be searched")
    if how.sampler == "cma" and len(options) + rule.weighted * len(start) < 2:
        raise RuleError("sampler='cma' turns towards the best of two numbers or more; search one number with 'tpe'")
    return options


def _first(
    how: Search, start: Mapping[str, float], rule: Rule, options: Mapping[str, tuple[float, float]]
) -> list[dict[str, float]]:
    """What was asked for, and a mean of all: the search ends no worse than these, on the data that it sees."""
    own = {k: min(max(getattr(rule, k), low), high) for k, (low, high) in options.items()}
    if not rule.weighted:
        return [own]
    wanted = [dict(start)]
    if how.low <= 1 / len(start) <= how.high:
        wanted.append(dict.fromkeys(start, 1 / len(start)))
    return [{f"w {name}": weight for name, weight in weights.items()} | own for weights in wanted]


def _suggested(trial: Any, rule: Rule, key: str, bounds: tuple[float, float]) -> float:
    return float(trial.suggest_float(key, *bounds, log=f"{rule.name}.{key}" in _LOG))


def _best(study: Study, start: Mapping[str, float], rule: Rule, options: Mapping[str, Any]) -> Chosen:
    numbered = [t for t in study.trials if t.value is not None and isfinite(t.value)]
    if not numbered:
        raise WeftError(f"the loss of none of the {len(study.trials)} combinations that were tried is a number")
    best = min(numbered, key=lambda t: t.value or 0.0)
    weights = {name: best.params.get(f"w {name}", weight) for name, weight in start.items()}
    tried = tuple({"loss": t.user_attrs.get("loss"), "objective": t.value, **t.params} for t in numbered)
    chosen = dataclasses.replace(rule, **{key: best.params[key] for key in options})
    return Chosen(weights, chosen, float(best.value or 0.0), tried)


def _said(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def _numbers(rule: Rule) -> dict[str, float]:
    found = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    return {k: v for k, v in found.items() if isinstance(v, float)}

"""The page: every section, nothing from outside, everything escaped, numbers and their colours right."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from weft.report import render, write_report

EVIL = "<script>alert('x')</script> & \"quotes\""


def figures(loss: float, accuracy: float) -> dict[str, float]:
    return {"loss": loss, "accuracy": accuracy, "bits_per_byte": loss / 2, "count": 10}


def summary() -> dict[str, Any]:
    lint = {
        "split": "train", "num_rows": 1200, "num_bad": 3, "num_good": 1197, "num_examples": 1197, "num_tokens": 5000,
        "num_trained_tokens": 400, "longest_tokens": 96, "warnings": [],
        "bad": [{"reason": "broken UTF-8", "count": 3, "places": [f"rows.jsonl:7 {EVIL}"]}],
    }  # fmt: skip
    return {
        "name": "docstrings", "base": f"pico {EVIL}", "task": "causal-lm", "method": {"name": "lora", "rank": 8},
        "num_sites": 42, "num_trained": 236544, "num_frozen": 5800000, "num_steps": 30, "num_tokens": 4000,
        "seconds": 125.0, "rival": {},
        "before": {"validation": figures(4.5, 0.25), "forgetting": figures(2.0, 0.5)},
        "after": {"validation": figures(1.5, 0.5), "forgetting": figures(2.25, 0.5)},
        "parity": {
            "passed": False,
            "rows": [
                {"way": way, "max_logit_difference": 3e-6, "kl": 1e-10, "greedy_agreement": 1.0, "tolerance": 1e-4,
                 "passed": way != "merged"} for way in ("saved", "merged")
            ]
            + [
                {"way": "peft", "max_logit_difference": None, "kl": None, "greedy_agreement": None, "tolerance": 1e-4,
                 "passed": True, "note": f"PEFT has no {EVIL}"}
            ],
        },
        "lint": [lint],
        "examples": [{"prompt": EVIL, "expected": EVIL, "before": EVIL, "after": EVIL}],
        "recipe": f"output: {EVIL}\n",
        "machine": {"versions": {"weft": "0.1", EVIL: EVIL}, "system": EVIL, "device": "CPU", "threads": 1, "cores": 2},
    }  # fmt: skip


LOG = [
    {"event": "validation", "step": 0, "loss": 4.5},
    *({"event": "train", "step": i, "loss": 4.0 / i, "learning_rate": 1e-3 / i} for i in range(1, 31)),
    {"event": "end", "step": 30},
]


class Reader(HTMLParser):
    """Checks that tags close in order and notes what the page asks from outside."""

    VOID = frozenset({"meta", "br", "path", "use", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_every_section_in_order():
    page = render(summary(), LOG)
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Learnt and forgotten", "Curves", "Parity", "Examples", "Data", "Recipe and versions"
    ]  # fmt: skip


def test_it_needs_nothing_from_outside_and_no_script():
    page = render(summary(), LOG)
    reader = read(page)
    assert "script" not in reader.seen
    assert all(link.startswith("#") for link in reader.links)
    assert "url(http" not in page
    assert "@import" not in page


def test_everything_from_outside_is_escaped():
    page = render(summary(), LOG)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 11


def test_numbers_and_their_colours():
    page = render(summary(), LOG)
    assert '<span class="good">-3.0000</span>' in page  # loss fell
    assert '<span class="good">+0.2500</span>' in page  # accuracy rose
    assert '<span class="bad">+0.2500</span>' in page  # the base's text got harder
    assert '<span class="">+0.0000</span>' in page
    assert "236,544" in page
    assert "2 min 05 s" in page
    assert page.count('badge good">pass<') == 1
    assert page.count('badge bad">fail<') == 1
    assert '<span class="bad">failed</span>' in page
    assert page.count('badge">none<') == 1  # a form that this adapter has not
    assert "2 forms, largest difference 3.0e-06" in page
    assert "peft: PEFT has no &lt;script&gt;" in page


def test_curves_are_drawn_in_the_colours_of_the_page():
    page = render(summary(), LOG)
    assert page.count("<svg") == 2
    assert "var(--first)" in page
    assert "#070809" not in page
    assert "prefers-color-scheme: dark" in page
    losses = page[page.index("<svg") : page.index("</svg>")]
    assert "training" in losses
    assert "validation" in losses


@pytest.mark.parametrize("missing", ["parity", "forgetting", "examples", "log", "validation"])
def test_what_was_not_measured_is_said_or_left_out(missing):
    known, log = copy.deepcopy(summary()), list(LOG)
    if missing == "parity":
        known["parity"] = None
    elif missing == "examples":
        known["examples"] = []
    elif missing == "log":
        log = []
    else:
        known["before"].pop(missing)
        known["after"].pop(missing)
    page = render(known, log)
    read(page)
    assert ("asked for no parity gate" in page) == (missing == "parity")
    assert ("What was forgotten was not measured" in page) == (missing == "forgetting")
    assert ("<h2>Examples</h2>" in page) == (missing != "examples")
    assert ("<h2>Curves</h2>" in page) == (missing != "log")


def test_it_is_written_whole(tmp_path):
    path = write_report(tmp_path / "report.html", summary(), LOG)
    assert path.read_text().endswith("</html>\n")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]

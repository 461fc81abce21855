"""What a run says while it goes: a bar on a terminal, plain lines when piped, a log that survives a kill."""

from __future__ import annotations

import io
import json

from rich.console import Console

from tests.tune import runs
from weft.tune.log import JsonLines, cut_log, read_log
from weft.tune.progress import Progress
from weft.tune.session import prepare, ranges, short_plan
from weft.units import readable_bytes, readable_seconds


def show(console: Console) -> str:
    with Progress(console, num_steps=10, done=2) as progress:
        progress.update(5, loss=1.25, tokens_per_second=1234.5, memory_bytes=3 * 2**30)
        progress.log(5, loss=1.25, tokens_per_second=1234.5, memory_bytes=3 * 2**30, seconds_left=200)
        progress.note("validation [loss] 1.0")
        progress._bar.refresh()
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_plain_lines_when_piped():
    text = show(Console(file=io.StringIO(), width=120))
    assert text == ("step 5/10  loss 1.2500  1,234 tokens/s  3.0 GiB  3 min 20 s left\nvalidation [loss] 1.0\n")


def test_a_bar_on_a_terminal():
    text = show(Console(file=io.StringIO(), width=120, force_terminal=True))
    assert "5/10" in text
    assert "loss 1.2500  1,234 tokens/s  3.0 GiB" in text
    assert "ETA" in text
    assert "3 min 20 s left" not in text  # the bar says it


def test_units():
    assert [readable_bytes(n) for n in (5, 2048, 3 * 2**20, 2**40)] == ["5 B", "2.0 KiB", "3.0 MiB", "1024.0 GiB"]
    assert [readable_seconds(n) for n in (0.4, 12, 61, 3725)] == ["0.4 s", "12 s", "1 min 01 s", "1 h 02 min"]


def test_a_log_cut_short_is_read_and_cut_to_a_step(tmp_path):
    path = tmp_path / "log.jsonl"
    sink = JsonLines(path)
    for step in range(5):
        sink.write({"event": "train", "step": step, "loss": 1.0})
    sink.close()
    with path.open("a") as file:
        file.write('{"event": "train", "st')
    assert [r["step"] for r in read_log(path)] == [0, 1, 2, 3, 4]
    cut_log(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    cut_log(tmp_path / "none.jsonl", 2)
    assert (tmp_path / "none.jsonl").read_text() == ""


def test_the_short_plan_names_each_module_once(tiny):
    session = prepare(runs.bare(tiny / "base", tiny / "data", "unused"), lambda text: None)
    lines = short_plan(session.plan).splitlines()
    assert lines[0].startswith("unused: LoRA(rank=2")
    assert lines[0].endswith(f"at 14 sites, {session.plan.num_parameters:,} parameters")
    assert lines[1:] == ["  lora: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj in layers 0-1"]
    assert ranges([3, 0, 1, 7, 2]) == "0-3, 7"

"""Help: fast, without torch, with an example on every command."""

from __future__ import annotations

import re
import resource
import subprocess
import sys

import pytest

from weft.cli.main import COMMANDS

PROGRAM = """
import sys; from weft.cli.main import main
code = main(sys.argv[1:]); print(*sorted(sys.modules), file=sys.stderr)
"""


def in_new_process(*arguments: str) -> tuple[str, set[str], float]:
    """Output, imported modules, and seconds of processor time: what it takes on a machine that does nothing else."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, set(done.stderr.split()), seconds


def test_help_is_fast_and_imports_no_torch() -> None:
    out, modules, seconds = in_new_process("--help")
    assert not {"torch", "transformers", "pydantic", "rich"} & modules
    assert seconds < 0.5
    listed = re.findall(r"^  (\w+)  +\S", out.partition("Commands:")[2], flags=re.MULTILINE)
    assert listed == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(command: str, weft) -> None:
    done = weft(command, "--help")
    assert done.code == 0
    assert re.search(rf"Example:\n  .*weft {command}", done.out), done.out


def test_command_help_imports_no_torch() -> None:
    for command in ("tune", "check", "generate"):
        assert "torch" not in in_new_process(command, "--help")[1]


def test_options_are_those_of_the_schema(weft) -> None:
    from weft.recipe import all_keys

    described = {key: field.description for key, field in all_keys()}
    text = " ".join(weft("check", "--help").out.split())
    for key in ("check.tolerance", "check.rows", "check.ways"):
        assert described[key][1:] in text


def test_version(weft) -> None:
    import weft as package

    assert weft("--version").out == f"weft {package.__version__}\n"

"""The program `weft`: finds the command, and turns what a user can put right into one sentence."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from weft import __version__
from weft.errors import WeftError

__all__ = ["COMMANDS", "app", "main"]

COMMANDS = (
    "init", "plan", "tune", "compare", "eval", "generate", "chat", "check", "merge", "combine", "join", "choices",
    "compress", "extract", "convert", "methods", "doctor",
)  # fmt: skip
"""In the order in which a newcomer meets them; the module of the same name holds the command `app`."""

INTERRUPTED = 130

_HINT = re.compile(r"[;:,]\s+(did you mean '[^']*'\?|known: .*|install it with: .*|`weft [^`]*` .*)$")


class Commands(TyperGroup):
    """Commands that are imported when they are asked for: listing them reads the first line of their files."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """The names, in order."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        command = typer.main.get_command(import_module(f"weft.cli.{cmd_name}").app)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Names and summaries, without importing any command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summary(name)) for name in COMMANDS])


def _summary(name: str) -> str:
    """What the first line of a command's file says after its name."""
    first = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8").partition("\n")[0]
    return first.strip('"').partition(": ")[2]


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"weft {__version__}")
        raise typer.Exit


@app.callback(epilog="Start with: weft init, then weft tune recipe.yaml. Each command's --help has an example.")
def weft(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (at any place).")] = False,
) -> None:
    """Adapt pretrained networks, and prove that an adapter behaves the same wherever it runs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 a check failed, 2 wrong use, 130 interrupted."""
    _quieten()
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        app(args=[each for each in given if each != "--debug"], prog_name="weft")
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
        if code == INTERRUPTED:  # typer has caught the KeyboardInterrupt
            print("stopped by Ctrl-C", file=sys.stderr)
        return code
    except BrokenPipeError:  # the reader of our output has seen enough (`weft methods | head`)
        sys.stderr.close()
        return 141
    except (WeftError, OSError) as error:
        if debug:
            raise
        print(as_sentence(error), file=sys.stderr)
        return INTERRUPTED if type(error).__name__ == "Interrupted" else 2
    return 0


def _quieten() -> None:
    """Keep what libraries say to their own developers off the terminal; errors still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # also transformers' bar over the weights
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("torchao").setLevel(logging.ERROR)  # its CUDA kernels do not load on a CPU
    # torchao 0.18 registers enums in a way that torch 2.13 dislikes
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def as_sentence(error: Exception) -> str:
    """`error: what happened`, and a line `hint: what to do` for what the message suggests."""
    text = str(error).replace("any_base=True", "--any-base")
    if isinstance(error, OSError) and not isinstance(error, WeftError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    lines = []
    for sentence in text.splitlines() or [type(error).__name__]:
        hint = _HINT.search(sentence)
        lines.append(f"error: {sentence[: hint.start()] if hint else sentence}")
        lines += [f"hint: {hint[1]}"] if hint else []
    return "\n".join(lines)

"""Claim: `import weft` takes at most 1.1 of `import torch`; `weft --help` takes under 0.5 s."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from benchmarks.common import Claim, absolute, claim, paired


def run() -> list[Claim]:
    start = partial(_python, "-c")
    help_text = partial(_python, "-m", "weft", "--help")
    with_torch = "import torch, weft"
    return [
        claim(
            "import torch and weft",
            *paired(partial(start, with_torch), partial(start, "import torch"), pairs=7),
            target=1.1,
            what="import torch",
        ),
        claim(
            "import weft", *paired(partial(start, "import weft"), partial(start, "import torch"), pairs=7), target=1.1
        ),
        absolute("weft --help", paired(help_text, help_text, pairs=7)[0], target_seconds=0.5, what="whole process"),
    ]


def _python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

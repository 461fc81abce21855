"""The house rules hold, and each rule sees what it is there for.

`test_rule_holds` runs every rule over every file, `test_rule_sees` over a planted offence: a rule that sees nothing is
itself a failure.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from tests import house
from tests.house import Source, defined_in, sources, what_is_taken

Rule = Callable[[Source], Iterator[str]]

CORE, METHOD = "src/weft/core/planted.py", "src/weft/methods/planted.py"
# rule: (path, text) of an offence that it must see
RULES: dict[Rule, list[tuple[str, str]]] = {
    house.imports_point_down: [
        ("src/weft/kinds/planted.py", "def f():\n    from weft.attach import attach\n"),
        ("src/weft/kinds/planted.py", "from ..tune import loop\n"),
        ("src/weft/attach.py", "import importlib\nimportlib.import_module('weft.parity')\n"),
        ("src/weft/tune/planted.py", "import weft\n"),
        ("src/weft/tune/planted.py", "from weft import LoRA\n"),
        ("src/weft/errors.py", "import weft.core.op\n"),
        ("src/weft/unheard_of/planted.py", ""),
    ],
    house.says_what_it_is: [
        ("tests/planted.py", "import ast\n"),
        ("tests/planted.py", '# no\n"""late"""\n'),
        ("tests/planted.py", ""),
    ],
    house.is_short: [
        ("benchmarks/planted.py", "\n" * 401),
        (METHOD, "\n" * 61),
        ("src/weft/planted.py", "def f():\n" + "    x = 1\n" * 51),
    ],
    house.method_knows_only_core: [
        (METHOD, "from torch import nn\n"),
        (METHOD, "import torch\nlayer = torch.nn.Linear(1, 1)\n"),
        (METHOD, "from weft.kinds.seat import Seat\n"),
        (METHOD, "from weft.methods.lora import LoRA\n"),
        (METHOD, "import numpy\n"),
    ],
    house.core_knows_only_torch: [(CORE, "import numpy as np\n"), (CORE, "from transformers import Trainer\n")],
    house.kinds_name_no_method: [("src/weft/kinds/planted.py", "from weft.methods.lora import LoRA\n")],
    house.no_pickles: [
        (CORE, "import pickle\n"),
        (CORE, "import torch\ntorch.load('x')\n"),
        (CORE, "from torch import save\n"),
        (CORE, "import numpy\nnumpy.load('x', allow_pickle=True)\n"),
    ],
    house.no_open_ended_signature: [
        (CORE, "def f(**kwargs): ...\n"),
        (CORE, "class A:\n    def __init__(self, **kwargs): ...\n"),
        ("src/weft/methods/planted.py", "class A:\n    def forward(self, c, x, op, **kwargs): ...\n"),
    ],
    house.reaches_no_hub: [
        ("tests/planted.py", "from huggingface_hub import snapshot_download\nsnapshot_download('a/b')\n"),
        ("tests/planted.py", "import os\nos.environ['HF_HUB_OFFLINE'] = '0'\n"),
    ],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    offences = [sentence for source in sources() for sentence in rule(source)]
    assert not offences, "\n" + "\n".join(offences)


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [(rule, path, text) for rule, planted in RULES.items() for path, text in planted],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_rule_sees(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text)))


def test_what_is_right_is_left_alone() -> None:
    right = Source(
        "src/weft/methods/planted.py",
        '"""A method."""\n\nimport torch.nn.functional as F\nfrom torch.nn.functional import gelu\n\n'
        "from weft.core import Method\nfrom weft.errors import WeftError\n",
    )
    front = Source(
        "src/weft/cli/planted.py", '"""A command."""\n\nimport weft\nfrom weft import LoRA\nfrom weft.tune import run\n'
    )
    for rule in RULES:
        assert [*rule(right), *rule(front)] == []


def test_the_rules_see_the_project() -> None:
    rooms = {source.room for source in sources()}
    assert {"weft", "core", "methods", "kinds", "errors"} <= rooms
    assert sum(source.is_method for source in sources()) >= 2
    assert len([name for source in sources() for name, _ in source.imports()]) > 100
    assert len(list(what_is_taken(sources()))) > 20


# What a room says it offers. -----------------------------------------------------------------------------------------

FRONTS = [s for s in sources() if s.room and (s.path.endswith("__init__.py") or s.path.count("/") == 2)]


@pytest.mark.parametrize("front", FRONTS, ids=lambda front: front.module)
def test_all_is_complete(front: Source) -> None:
    """A front's `__all__` holds what it defines and what others take from it, and everything in it is there."""
    module = importlib.import_module(front.module)
    offered = list(getattr(module, "__all__", []))
    assert len(set(offered)) == len(offered), f"{front.module}.__all__ names something twice"
    missing = [name for name in offered if not hasattr(module, name)]
    assert not missing, f"{front.module}.__all__ names what is not there: {missing}"
    defined = defined_in(front) if front.path.endswith("__init__.py") else set()
    unlisted = dict.fromkeys(defined - set(offered), front.path)
    unlisted |= {
        name: where for room, name, where in what_is_taken(sources()) if room == front.module and name not in offered
    }
    unlisted = {name: where for name, where in unlisted.items() if not name.startswith("__")}
    assert not unlisted, f"{front.module}.__all__ lacks {unlisted}"


def test_the_package_offers_something() -> None:
    weft = importlib.import_module("weft")
    assert {"attach", "detach", "use", "using", "merge", "unmerge", "methods"} <= set(weft.__all__) <= set(dir(weft))


def test_what_is_taken_sees() -> None:
    text = "def f():\n    from weft.kinds import Offer\nfrom weft import core\nfrom weft.data.read import find\n"
    taken = list(what_is_taken([Source("src/weft/attach.py", text)]))
    assert sorted(taken) == [
        ("weft.data.read", "find", "src/weft/attach.py:4"),
        ("weft.kinds", "Offer", "src/weft/attach.py:2"),
    ]


def test_defined_in_sees() -> None:
    lines = ["import os", "LIMIT = 3", "_hidden = 4", "def f(): ...", "class A: ...", "if True:", "    SIZE: int = 5"]
    assert defined_in(Source("src/weft/kinds/__init__.py", "\n".join(lines))) == {"LIMIT", "f", "A", "SIZE"}


def test_version_is_one() -> None:
    assert importlib.import_module("weft").__version__ == version("weft")


# The network. --------------------------------------------------------------------------------------------------------


def test_sockets_stay_on_this_machine() -> None:
    with pytest.raises(RuntimeError, match="no test may leave this machine"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(RuntimeError, match="no test may leave this machine"):
        socket.getaddrinfo("huggingface.co", 443)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=5) as client,
    ):
        assert client.getpeername() == server.getsockname()


def test_the_hub_is_off() -> None:
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    assert constants.HF_HOME == os.environ["HF_HOME"] != str(Path.home() / ".cache" / "huggingface")

"""weft join and weft choices: adapters under a router, and what the router chose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import weft as library
from weft.attach import records
from weft.core.router import Router


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    model, _ = library.load_base("pico")
    for seed, (name, method) in enumerate({"one": library.LoRA(rank=2), "two": library.IA3()}.items()):
        library.attach(model, method, ["q_proj", "up_proj"][: 1 + seed], name=name, layers="0,1")
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in library.parameters(model, name):
                p.add_(0.05 * torch.randn(p.shape, generator=draw))
        library.save(model, folder / name, name)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n"}) + "\n" for i in range(6)))
    return str(file)


@pytest.fixture(scope="module")
def joined(adapters, tmp_path_factory) -> Path:
    model, _ = library.load_base("pico")
    for name in ("one", "two"):
        library.load(model, adapters / name, name)
    library.join(model, library.TopK(k=1), ["one", "two"], name="both")
    return library.save(model, tmp_path_factory.mktemp("joined") / "both", "both")


def test_the_result_is_measured_and_loads(weft, adapters, rows, tmp_path):
    out, folders = tmp_path / "both", [str(adapters / name) for name in ("one", "two")]
    done = weft("join", "top_k", *folders, "--set", "k=1", "--base", "pico", "--eval", rows, "-o", str(out), "--json")
    assert done.code == 0, done.err
    found = done.json()
    assert set(found["losses"]) == {"base", "one", "two", "joined"}
    assert found["parity"]["rows"]
    assert found["num_parameters"] == 2 * (2 + 1) * 256  # router's rows: two experts at q_proj, one at up_proj
    model, _ = library.load_base("pico")
    library.load(model, out)
    method = records(model)["joined"].plan.method
    assert isinstance(method, Router)
    assert [e.name for e in method.experts] == ["one", "two"]


def test_its_choices_are_shown_and_plotted(weft, joined, rows, tmp_path):
    plot = tmp_path / "choices.svg"
    arguments = ["choices", str(joined), "--base", "pico", "--data", rows, "--plot", str(plot)]
    done = weft(*arguments)
    assert done.code == 0, done.err
    head, first, second, *tokens = done.out.splitlines()
    assert head.split() == ["module", "one", "two"]
    assert first.startswith("q_proj")
    assert second.split() == ["up_proj", "0.0%", "100.0%"]
    assert [line.partition(":")[0] for line in tokens] == ["one", "two"]
    assert "up_proj" in plot.read_text()
    shares = json.loads(weft(*arguments, "--json").out)["shares"]
    assert all(sum(own.values()) == pytest.approx(1) for own in shares.values())


def test_a_run_goes_on_from_it(weft, joined, rows, tmp_path):
    recipe = tmp_path / "train.yaml"
    recipe.write_text(
        f"base: {{model: pico}}\ndata: {{train: {rows}}}\nstart: {joined}\n"
        "train: {steps: 2, batch_size: 2, learning_rate: 1.0e-2}\nforgetting: null\n"
    )
    done = weft("tune", str(recipe), f"output={tmp_path / 'run'}")
    assert done.code == 0, done.err
    before, after = (library.load_base("pico")[0] for _ in range(2))
    library.load(before, joined, "a")
    library.load(after, tmp_path / "run" / "adapter", "a")
    for address, adapter in records(after)["a"].adapters.items():
        old = records(before)["a"].adapters[address].tensors()
        for key, tensor in adapter.tensors().items():
            same = torch.equal(tensor, old[key])
            assert same == (key != "G" or len(old["G"]) == 1), f"{address} {key}"  # a choice among one has no gradient
    both = tmp_path / "both.yaml"
    both.write_text(recipe.read_text() + "method: vera\n")
    refused = weft("tune", str(both))
    assert refused.code == 2
    assert "says by itself what is trained: leave method out" in refused.err


def test_what_is_no_router_is_refused(weft, adapters, tmp_path):
    one = str(adapters / "one")
    done = weft("join", "lora", one, "-o", str(tmp_path / "x"))
    assert done.code == 2
    assert "there is no router 'lora'" in done.err
    done = weft("join", "top_k", one, "--set", "k=2", "--base", "pico", "-o", str(tmp_path / "x"))
    assert done.code == 2
    assert "k=2 is more than its 1 experts" in done.err
    assert not (tmp_path / "x").exists()
    done = weft("choices", one, "--base", "pico")
    assert done.code == 2
    assert "only a router chooses" in done.err

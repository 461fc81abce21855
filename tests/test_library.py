"""A library of adapters: groups by their weights, and the nearest ones to a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.common.language import ids, llama
from weft.adapter import AdapterFileError
from weft.attach import records
from weft.differences import differences
from weft.errors import AdapterError


@pytest.fixture
def model() -> nn.Module:
    """Five adapters: two near one change, three near another, of different methods, ranks and starts."""
    torch.manual_seed(0)
    model = llama()
    for i, method in enumerate([weft.LoRA(rank=4)] * 3 + [weft.LoRA(rank=6), weft.DoRA(rank=4)]):
        weft.attach(model, method, ["q_proj", "up_proj"], name=f"a{i}", seed=i)
    common = {0: [0, 3], 1: [1, 2, 4]}
    with torch.no_grad():
        for kind, members in common.items():
            for i in members:
                draw = torch.Generator().manual_seed(10 + kind)
                for address, adapter in records(model)[f"a{i}"].adapters.items():
                    t, rank = adapter.tensors(), adapter.method.rank
                    a = torch.randn(4, t["A"].shape[1], generator=draw)
                    b = torch.randn(t["B"].shape[0], 4, generator=draw)
                    turn = torch.linalg.qr(torch.randn(rank, rank))[0][:, :4]  # other factors of the same product
                    t["A"].copy_(turn @ a + 0.05 * torch.randn_like(t["A"]))
                    t["B"].copy_(b @ turn.mT * rank / 40 + 0.01 * torch.randn_like(t["B"]))
                    assert address
    return model


def test_similarity_is_the_cosine_of_all_changes(model: nn.Module) -> None:
    names = [f"a{i}" for i in range(5)]
    vectors = []
    for name in names:
        changes = differences(model, name)
        vectors.append(torch.cat([changes[a].weight().double().flatten() for a in sorted(changes)]))
    rows = torch.nn.functional.normalize(torch.stack(vectors), dim=-1)
    torch.testing.assert_close(weft.similarity(model), rows @ rows.mT, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weft.similarity(model, names[:2]), (rows @ rows.mT)[:2, :2], rtol=1e-5, atol=1e-5)


def test_adapters_that_change_alike_are_one_group(model: nn.Module) -> None:
    for seed in range(3):
        assert weft.cluster(model, 2, seed=seed) == [["a0", "a3"], ["a1", "a2", "a4"]]
    assert weft.cluster(model, 1, names=["a4", "a0"]) == [["a4", "a0"]]
    assert weft.cluster(model, 2) == weft.cluster(model, 2)


def test_groups_that_cannot_be_made_say_why(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="count=6: 5 adapters make 1 to 5"):
        weft.cluster(model, 6)
    with pytest.raises(AdapterError, match="no adapter 'b'"):
        weft.cluster(model, 1, names=["b"])


WORDS = "sum", "loop", "court"


def counted(texts: Sequence[str]) -> Tensor:
    return torch.tensor([[t.count(w) + 0.01 for w in WORDS] for t in texts])


TEXTS = {"math": ["the sum of two", "sum it up"], "code": "a loop in a loop", "law": ["the court", "court and court"]}


def test_the_nearest_adapters_are_chosen_with_weights() -> None:
    library = weft.Library.of(TEXTS, counted)
    assert [[*row] for row in library.choose(["a loop", "in court"])] == [["code"], ["law"]]
    row = library.choose(["sum sum in a loop"], top=2, temperature=0.5)[0]
    assert [*row] == ["math", "code"]
    score = library.scores(["sum sum in a loop"])[0]
    assert row["math"] / row["code"] == pytest.approx(((score[0] - score[1]) / 0.5).exp().item(), rel=1e-4)
    assert sum(row.values()) == pytest.approx(1)
    assert library.with_only(["law", "math"]).choose(["a loop of sum"]) == [{"math": 1.0}]


def test_a_library_is_saved_and_loaded_and_knows_its_embedding(tmp_path: Path) -> None:
    library = weft.Library.of(TEXTS, counted)
    library.save(tmp_path / "index")
    library.save(tmp_path / "index")
    again = weft.Library.load(tmp_path / "index", counted)
    assert again.names == library.names
    assert torch.equal(again.vectors, library.vectors)
    with pytest.raises(AdapterFileError, match="another way to embed"):
        weft.Library.load(tmp_path / "index", lambda texts: torch.ones(len(texts), 7))
    with pytest.raises(AdapterFileError, match="another way to embed"):
        weft.Library.load(tmp_path / "index", lambda texts: counted(texts) * torch.tensor([1.0, -1, 1]))
    with pytest.raises(AdapterFileError, match="is no library"):
        weft.Library.load(tmp_path, counted)
    with pytest.raises(AdapterFileError, match="is there and is no library"):
        library.save(tmp_path)


def test_the_base_embeds_texts_whatever_is_in_use() -> None:
    class Tokenizer:
        def __call__(self, text: str) -> Tokenizer:
            self.input_ids = [3 + ord(c) % 90 for c in text]
            return self

    torch.manual_seed(0)
    model = llama()
    embed = weft.mean_hidden_state(model, Tokenizer(), batch=2)
    texts = ["a", "some longer text", "another"]
    with torch.no_grad():
        wanted = [model.model(torch.tensor([Tokenizer()(t).input_ids])).last_hidden_state[0].mean(0) for t in texts]
    torch.testing.assert_close(embed(texts), torch.stack(wanted))
    weft.attach(model, weft.LoRA(), name="code")
    weft.attach(model, weft.LoRA(), name="math")
    with torch.no_grad():
        for p in weft.parameters(model):
            p.add_(0.2)
    model.train()
    torch.testing.assert_close(embed(texts), torch.stack(wanted))
    assert model.training
    route = weft.Library.of({"code": texts[:2], "math": texts[2]}, embed).choose(["x", "y"], top=2)
    weft.use(model, route)
    mixed = model.eval()(ids(2)).logits
    assert mixed.isfinite().all()
    with pytest.raises(ValueError, match="2 rows"):
        model(ids(3))


def test_what_cannot_be_chosen_says_why() -> None:
    library = weft.Library.of(TEXTS, counted)
    with pytest.raises(ValueError, match="top=4: this library has 3"):
        library.choose(["x"], top=4)
    with pytest.raises(ValueError, match="temperature=0"):
        library.choose(["x"], temperature=0)
    with pytest.raises(AdapterError, match="no adapter 'maths'"):
        library.with_only(["maths"])
    with pytest.raises(ValueError, match="math has no text"):
        weft.Library.of({"math": []}, counted)
    with pytest.raises(ValueError, match="at least one"):
        weft.Library.of({}, counted)

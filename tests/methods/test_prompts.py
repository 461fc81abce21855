"""Prompts that are made, shared or bounded, and cartridges: equations, tasks by row, and HF PEFT's outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import weft
from tests.common.language import CAUSAL, bert, close, generate, gpt2, ids, llama, padded, tensors
from weft.attach import AdapterError
from weft.core import Progress
from weft.core.evolve import Part
from weft.data.batch import Batch
from weft.objectives import chunked_loss_of
from weft.targets import TargetError


def embedded(model: Any, prompt: Tensor, rows: Tensor) -> Tensor:
    """The logits behind a prompt [N, C], put before the embeddings by hand."""
    with weft.using(model, None):
        own = model.get_input_embeddings()(rows)
        whole = torch.cat([prompt.expand(len(rows), -1, -1), own], 1)
        return model(inputs_embeds=whole).logits[:, len(prompt) :]


@torch.no_grad()
def shaken(model: Any, method: weft.Method, name: str, size: float = 0.3) -> dict[str, Tensor]:
    """A trained-looking adapter at the input, and its tensors."""
    weft.attach(model, method, name=name, seed=len(name))
    for p in weft.parameters(model, name):
        p.add_(torch.randn_like(p) * size)
    (own,) = tensors(model, name).values()
    return own


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_p_tuning_is_a_prompt_that_torchs_own_layers_make(encoder: str) -> None:
    model, rows = llama(), ids()
    t = shaken(model, weft.PTuning(num_tokens=5, encoder=encoder, hidden_size=6), "p", 0.1)
    h = t["H"]
    if encoder == "lstm":
        lstm = nn.LSTM(32, 6, 2, bidirectional=True)
        with torch.no_grad():
            for n, way, end in ((n, way, end) for n in range(2) for way, end in (("f", ""), ("b", "_reverse"))):
                getattr(lstm, f"weight_ih_l{n}{end}").copy_(t[f"input_{way}{n}"])
                getattr(lstm, f"weight_hh_l{n}{end}").copy_(t[f"state_{way}{n}"])
                getattr(lstm, f"bias_ih_l{n}{end}").copy_(t[f"input_{way}{n}_bias"])
                getattr(lstm, f"bias_hh_l{n}{end}").zero_()
        h = lstm(h)[0]
        assert h.shape == (5, 12)
    for n in range(2 if encoder == "lstm" else 3):
        h = nn.functional.linear(h if n == 0 else h.relu(), t[f"W{n}"], t[f"W{n}_bias"])
    close(model(rows).logits, embedded(model, h, rows))


def test_every_tensor_of_p_tuning_learns() -> None:
    model, rows = llama(), ids()
    weft.attach(model, weft.PTuning(num_tokens=3), name="p")
    model(rows, labels=rows).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in weft.parameters(model, "p"))


@pytest.mark.parametrize("rank", [1, 2])
def test_a_multitask_prompt_is_the_shared_one_times_the_tasks_own(rank: int) -> None:
    model, rows = llama(), ids(3)
    t = shaken(model, weft.MultitaskPrompt(num_tokens=4, num_tasks=3, rank=rank), "m")
    expected = []
    for i, k in enumerate((2, 0, 1)):
        own = torch.stack([t["rows"][k][n] @ t["columns"][k] for n in range(4)])
        expected.append(embedded(model, t["tokens"] * own, rows[i : i + 1])[0])
    with weft.given(model, task=[2, 0, 1]):
        close(model(rows).logits, torch.stack(expected))


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_tasks_of_one_batch_generate_as_each_alone(how: dict[str, Any]) -> None:
    model, batch = llama(), padded(ids(4), (0, 2, 1, 0))
    shaken(model, weft.MultitaskPrompt(num_tokens=4, num_tasks=3), "m", 2.0)
    shaken(model, weft.PromptTuning(num_tokens=2), "p", 2.0)
    routes, tasks, alone = ["m", "p", "m", "m"], [2, 0, 0, 1], []
    for i, (route, task) in enumerate(zip(routes, tasks, strict=True)):
        with weft.using(model, route), weft.given(model, task=task):
            alone.append(generate(model, {k: v[i : i + 1] for k, v in batch.items()}, **how))
    with weft.using(model, routes), weft.given(model, task=tasks):
        together = generate(model, batch, **how)
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(alone[0][-6:], alone[2][-6:])


def test_a_fixed_task_needs_nothing_given() -> None:
    model, rows = llama(), ids()
    t = shaken(model, weft.MultitaskPrompt(num_tokens=4, num_tasks=3, task=1), "m")
    close(model(rows).logits, embedded(model, t["tokens"] * (t["rows"][1] @ t["columns"][1]), rows))
    with pytest.raises(TargetError, match="task=3: num_tasks=3"):
        weft.attach(model, weft.MultitaskPrompt(num_tasks=3, task=3), name="n")


def test_tasks_train_their_own_rows_and_the_shared_prompt() -> None:
    model, rows = llama(), ids(2)
    weft.attach(model, weft.MultitaskPrompt(num_tokens=4, num_tasks=3), name="m")
    weft.given(model, task=[2, 0])
    model(rows, labels=rows).loss.backward()
    (own,) = tensors(model, "m").values()
    assert own["tokens"].grad.any()
    assert [bool(own["rows"].grad[k].any()) for k in range(3)] == [True, False, True]


def test_a_context_moves_no_further_than_it_may() -> None:
    model, rows = llama(), ids()
    method = weft.ContextPrompt(init_ids=(5, 6, 7, 8), token_types=(1, 2, 3, 4), epsilon=0.2, format_epsilon=0.1)
    weft.attach(model, method, name="c")
    ((address, own),) = tensors(model, "c").items()
    table = model.get_input_embeddings().weight
    close(model(rows).logits, embedded(model, table[[5, 6, 7, 8]], rows))
    model(rows, labels=rows).loss.backward()
    assert [bool(g.any()) for g in own["delta"].grad] == [True, True, True, False]  # an answer stays as it is
    with torch.no_grad():
        own["delta"].copy_(torch.randn(4, 32))
        own["delta"][1] *= 1e-3
        before = own["delta"].clone()
    site = model.weave.seats[address].site
    method.evolve([Part(site, {k: v.data for k, v in own.items()}, {}, lambda *_: None)], Progress(1, 2))
    unit = (32 / 2048) ** 0.5
    close(own["delta"].norm(dim=1)[[0, 2, 3]], torch.tensor([0.1, 0.1, 0.0]) * unit)
    close(own["delta"][1], before[1], 0.0)  # it was near enough
    close(own["delta"][0] / own["delta"][0].norm(), before[0] / before[0].norm())


CONTEXTS = [  # (types, decay, tokens of an answer): one example, two of them, one with a longer answer
    ((1, 2, 2, 3, 4), 1.0, 1),
    ((2, 4, 5, 6, 8), 0.5, 1),
    ((2, 3, 4, 4, 3), 0.9, 2),
]


@pytest.mark.oracle
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("types", "decay", "answer"), CONTEXTS)
def test_a_context_learns_its_own_answers_as_pefts_does(
    types: tuple[int, ...], decay: float, answer: int, chunked: bool
) -> None:
    model, rows, context = llama(), ids(3), (5, 6, 7, 8, 9)
    config = peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[*context], cpt_mask=[1] * 5, cpt_tokens_type_mask=[*types],
        opt_weighted_loss_type="decay", opt_loss_decay_factor=decay,
    )  # fmt: skip
    other = peft.get_peft_model(copy.deepcopy(model), config).train()
    labels = torch.full_like(rows, -100)
    labels[:, -answer:] = rows[:, -answer:]
    other(input_ids=rows, labels=labels).loss.backward()

    weft.attach(model, weft.ContextPrompt(init_ids=context, token_types=types, decay=decay), name="c")
    model.train()
    if chunked:
        batch = Batch(rows, torch.ones_like(rows), labels, num_trained=3 * answer, num_tokens=rows.numel())
        loss, said = chunked_loss_of("causal-lm", model)
        assert said is None
        total, count, _ = loss(model, batch)
        (total / count).backward()
    else:
        model(rows, labels=labels).loss.backward()
    ((_, own),) = tensors(model, "c").items()
    answers = len({k for k in types if k % 4 == 0})
    wanted = other.prompt_encoder["default"].delta_embedding.weight.grad * (1 + answers)  # PEFT's is a mean of them all
    close(own["delta"].grad, wanted)
    assert wanted.abs().max() > 1e-3


def test_the_answers_of_a_context_count_in_training_alone_and_by_row() -> None:
    model, rows = llama(), ids(4)
    for name, types in (("c", (2, 3, 4)), ("d", (2, 2, 2))):
        weft.attach(model, weft.ContextPrompt(init_ids=(5, 6, 7), token_types=types), name=name)
    weft.attach(model, weft.PromptTuning(num_tokens=2), name="p")
    before = {name: t["delta"] for name in "cd" for t in tensors(model, name).values()}

    def slopes(route: Any, train: bool = True) -> Tensor:
        model.train(train)
        with weft.using(model, route):
            model(rows, labels=torch.full_like(rows, -100).index_fill(1, torch.tensor([6]), 9)).loss.backward()
        found, before["c"].grad = before["c"].grad, None
        return found

    own, without = slopes("c"), slopes("c", train=False)
    alone = own - without  # of the answer alone
    assert alone.abs().max() > 1e-3
    part = slopes(["d", "c", "p", "c"]) - slopes(["d", "c", "p", "c"], train=False)
    close(part, alone)  # once for a batch, whatever else is in it
    stacked = slopes(weft.Stack("p", "c")) - slopes(weft.Stack("p", "c"), train=False)
    assert stacked.abs().max() > 1e-3
    assert "counts" not in next(iter(tensors(model, "d").values()))


def test_a_model_that_cannot_learn_the_answers_of_a_context() -> None:
    model = bert()
    weft.attach(model, weft.ContextPrompt(init_ids=(5, 6, 7), token_types=(2, 3, 4)), name="c")
    model(ids())
    with pytest.raises(ValueError, match="has no head that predicts one token after another"):
        model.train()(ids())
    capped = llama()
    capped.config.final_logit_softcapping = capped.model.config.final_logit_softcapping = 30.0
    weft.attach(capped, weft.ContextPrompt(init_ids=(5, 6, 7), token_types=(2, 3, 4)), name="c")
    with pytest.raises(ValueError, match="shapes its logits"):
        capped.train()(ids())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init_ids": (5, 6), "num_tokens": 3}, "the context has 2 tokens"),
        ({"init_text": "x"}, "say with num_tokens"),
        ({"init_ids": (5, 6), "token_types": (1,)}, "the context has 2 tokens"),
        ({"init_ids": (5, 200)}, "the vocabulary has ids 0 to 95"),
    ],
)  # fmt: skip
def test_a_context_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises((TargetError, ValueError), match=said):
        weft.attach(llama(), weft.ContextPrompt(**options), name="c")


@pytest.mark.parametrize("make", [llama, gpt2])
def test_an_untrained_cartridge_is_the_document_before_the_input(make: Callable[[], Any]) -> None:
    model, document, rows = make(), tuple(ids(1, 9)[0].tolist()), ids()
    first = torch.tensor([document[:6]]).expand(2, -1)
    expected = model(torch.cat([first, rows], 1)).logits[:, 6:]
    plan = weft.attach(model, weft.Cartridge(num_tokens=6, num_frozen=2, init_ids=document), name="c")
    close(model(rows).logits, expected)
    assert plan.num_parameters == sum(p.numel() for p in weft.parameters(model)) == 2 * 4 * _widths(model)
    model(rows, labels=rows).loss.backward()
    assert all(p.grad.any() for p in weft.parameters(model))
    with pytest.raises(AdapterError, match="virtual tokens are inputs"):
        weft.merge(model, "c")


def _widths(model: Any) -> int:
    return sum(s.site.out_features for s in weft.adapters(model)["c"].sites)


def test_a_document_too_short_or_two_of_them() -> None:
    with pytest.raises(ValueError, match="has 3 tokens"):
        weft.attach(llama(), weft.Cartridge(num_tokens=6, init_ids=(4, 5, 6)))
    with pytest.raises(TargetError, match="give one"):
        weft.attach(llama(), weft.Cartridge(num_tokens=6, init_ids=(4, 5, 6), init_text="x"))
    with pytest.raises(TargetError, match="one at least must train"):
        weft.attach(llama(), weft.Cartridge(num_tokens=2, num_frozen=2))


# HF PEFT -------------------------------------------------------------------------------------------------------------


def _p_tuning(kind: str) -> tuple[Any, weft.Method]:
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_reparameterization_type=kind, encoder_hidden_size=6
    )
    return config, weft.PTuning(num_tokens=5, encoder=kind.lower(), hidden_size=6)


CONTEXT = {"epsilon": 3.0, "format_epsilon": 2.0}
PAIRS: dict[str, Callable[[], tuple[Any, weft.Method]]] = {
    "mlp": lambda: _p_tuning("MLP"),
    "lstm": lambda: _p_tuning("LSTM"),
    "multitask": lambda: (
        peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_tasks=3, num_ranks=2),
        weft.MultitaskPrompt(num_tokens=5, num_tasks=3, rank=2),
    ),
    "cpt": lambda: (
        peft.CPTConfig(
            task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7, 8, 9], cpt_mask=[1] * 5,
            cpt_tokens_type_mask=[1, 2, 2, 3, 4], opt_projection_epsilon=3.0, opt_projection_format_epsilon=2.0,
        ),
        weft.ContextPrompt(init_ids=(5, 6, 7, 8, 9), token_types=(1, 2, 2, 3, 4), **CONTEXT),
    ),
    "cartridge": lambda: (
        peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_frozen_tokens=2),
        weft.Cartridge(num_tokens=5, num_frozen=2),
    ),
}  # fmt: skip


@torch.no_grad()
def theirs_of(model: nn.Module, config: Any) -> Any:
    other = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for n, p in enumerate(other.prompt_encoder.parameters()):
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n)) * 0.3)
    return other


def asked(model: Any, rows: Tensor, tasks: list[int] | None) -> Tensor:
    if tasks is None:
        return model(rows).logits
    if isinstance(model, peft.PeftModel):
        return model(input_ids=rows, task_ids=torch.tensor(tasks)).logits
    with weft.given(model, task=tasks):
        return model(rows).logits


@torch.no_grad()
def filled(model: Any, method: weft.Method, encoder: Any) -> None:
    """Our adapter with the numbers of PEFT's."""
    weft.attach(model, method, name="ours")
    own = tensors(model, "ours")
    if method.name == "cartridge":
        rows = encoder.weight.chunk(2 * len(own), dim=1)
        for i, t in enumerate(own.values()):
            for j, k in enumerate(("keys", "values")):
                t[f"frozen_{k}"].copy_(rows[2 * i + j][:2])
                t[k].copy_(rows[2 * i + j][2:])
        return
    (t,) = own.values()
    if method.name == "p_tuning":
        t["H"].copy_(encoder.embedding.weight)
        for n, layer in enumerate(m for m in encoder.mlp_head if isinstance(m, nn.Linear)):
            t[f"W{n}"].copy_(layer.weight)
            t[f"W{n}_bias"].copy_(layer.bias)
        for n, way, end in ((n, w, e) for n in range(2) for w, e in (("f", ""), ("b", "_reverse"))):
            if (lstm := getattr(encoder, "lstm_head", None)) is not None:
                t[f"input_{way}{n}"].copy_(getattr(lstm, f"weight_ih_l{n}{end}"))
                t[f"state_{way}{n}"].copy_(getattr(lstm, f"weight_hh_l{n}{end}"))
                bias = getattr(lstm, f"bias_ih_l{n}{end}") + getattr(lstm, f"bias_hh_l{n}{end}")
                t[f"input_{way}{n}_bias"].copy_(bias)
        return
    if method.name == "cpt":
        encoder(torch.arange(5))  # which projects
        t["delta"].copy_(encoder.delta_embedding.weight)
        return
    t["tokens"].copy_(encoder.embedding.weight)
    t["rows"].copy_(encoder.prefix_task_cols)
    t["columns"].copy_(encoder.prefix_task_rows)


@pytest.mark.oracle
@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("pair", PAIRS)
def test_the_same_numbers_give_pefts_outputs(pair: str, family: str) -> None:
    config, method = PAIRS[pair]()
    model, rows = CAUSAL[family](), ids()
    other = theirs_of(model, config)
    tasks = [2, 0] if pair == "multitask" else None
    filled(model, method, other.prompt_encoder["default"])
    found, wanted = asked(model, rows, tasks), asked(other, rows, tasks)
    close(found, wanted[:, -7:])
    with weft.using(model, None):
        assert (model(rows).logits - found).abs().max() > 1e-3


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("pair", PAIRS)
def test_folders_cross_both_ways(pair: str, family: str, tmp_path: Path) -> None:
    config, method = PAIRS[pair]()
    model, rows = CAUSAL[family](), ids()
    base, tasks = copy.deepcopy(model), [2, 0] if pair == "multitask" else None
    other = theirs_of(model, config)
    other.save_pretrained(tmp_path / "theirs")
    weft.load(model, tmp_path / "theirs", name="theirs")
    close(asked(model, rows, tasks), asked(other, rows, tasks)[:, -7:])

    filled(model, method, other.prompt_encoder["default"])
    weft.use(model, "ours")
    wanted = asked(model, rows, tasks)
    weft.save(model, tmp_path / "ours", name="ours", format="peft")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    close(asked(back, rows, tasks)[:, -7:], wanted)
    again = copy.deepcopy(base)
    weft.load(again, tmp_path / "ours")
    close(asked(again, rows, tasks), wanted)
    exact = copy.deepcopy(base)
    weft.save(model, tmp_path / "exact", name="ours")  # a renaming as PEFT's, else our own layout
    weft.load(exact, tmp_path / "exact")
    assert torch.equal(asked(exact, rows, tasks), wanted)
    before, after = tensors(model, "ours"), tensors(exact, "ours" if "ours" in weft.adapters(exact) else "exact")
    assert all(torch.equal(v, after[a][k]) for a, t in before.items() for k, v in t.items())


def test_bert_takes_the_tasks_of_its_rows() -> None:
    model, rows = bert(), ids()
    shaken(model, weft.MultitaskPrompt(num_tokens=3, num_tasks=2), "m")
    alone = []
    for i in range(2):
        with weft.given(model, task=i):
            alone.append(model(rows[i : i + 1]).logits)
    with weft.given(model, task=[0, 1]):
        close(model(rows).logits, torch.cat(alone))

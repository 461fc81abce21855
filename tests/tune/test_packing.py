"""Packed rows give what padded rows give, in loss and in every gradient; rows see only themselves; refusals say why."""

from __future__ import annotations

import warnings
from array import array
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import weft
from tests.tune import runs
from weft import objectives
from weft.classifier import make_classifier
from weft.data import Batch, Example, collate
from weft.data.pack import concatenate
from weft.data.rows import IGNORED
from weft.errors import RecipeError, WeftError
from weft.methods.llama_adapter import LlamaAdapter
from weft.methods.prefix import PrefixTuning
from weft.methods.prompt import PromptTuning
from weft.recipe import Train, load_recipe
from weft.segments import IMPLEMENTATIONS, table
from weft.tune.learn import make_learner
from weft.tune.loop import Progressed, train
from weft.tune.packing import choose_packing, packed_attention, why_not_packed
from weft.tune.session import Session, attach_adapter, prepare

TOLERANCE = 1e-5
"""Largest difference of a gradient, relative to the largest entry of that gradient; float32. Measured: below 1e-6."""

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}


def built(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, "pad_token_id": 0, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    return model.eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def gemma3() -> Any:
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=7, layer_types=["sliding_attention", "full_attention"]
    )
    return transformers.Gemma3ForCausalLM(config).eval()


MODELS = {
    "llama": lambda: built("Llama", **GROUPED),
    "qwen2": lambda: built("Qwen2", **GROUPED),
    "mistral, window 7": lambda: built("Mistral", **GROUPED, sliding_window=7),
    "gemma3, window 7": gemma3,
    "gpt-neox": lambda: built("GPTNeoX"),
    "gpt2": gpt2,
}


def row(length: int, prompt: int, number: int) -> Example:
    ids = array("i", [(7 * number + 3 * k + k * k) % 97 + 2 for k in range(length)])
    return Example(ids, array("i", [IGNORED] * prompt + list(ids[prompt:])), "f", number)


ROWS = [row(9, 2, 0), row(23, 5, 1), row(2, 1, 2), row(14, 3, 3)]


def stirred(model: Any, targets: Any = "all-linear", **options: Any) -> Any:
    """The model with an adapter that does something."""
    weft.attach(model, weft.LoRA(rank=4, **options), targets, name="a")
    torch.manual_seed(1)
    with torch.no_grad():
        for p in weft.parameters(model):
            p.add_(0.05 * torch.randn_like(p))
    return model


def loss_and_gradients(model: Any, batch: Batch, task: str = "causal-lm") -> tuple[float, list[Tensor]]:
    loss, count, _ = objectives.get(task).loss(model, batch)
    assert count == batch.num_trained
    gradients = torch.autograd.grad(loss / count, weft.parameters(model), allow_unused=True)
    return loss.item() / count, [g for g in gradients if g is not None]


def assert_same(one: tuple[float, list[Tensor]], other: tuple[float, list[Tensor]]) -> None:
    assert other[0] == pytest.approx(one[0], rel=1e-6)
    assert len(one[1]) == len(other[1]) > 0
    for a, b in zip(one[1], other[1], strict=True):
        assert (a - b).abs().max() <= TOLERANCE * a.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_packed_is_padded_in_loss_and_in_every_gradient(name: str) -> None:
    model = stirred(MODELS[name]())
    assert why_not_packed(model, longest=23) is None
    padded = loss_and_gradients(model, collate(ROWS, pad_token=0))
    with packed_attention(model):
        assert_same(padded, loss_and_gradients(model, concatenate(ROWS)))
        assert_same(padded, loss_and_gradients(model, collate(ROWS, pad_token=0)))  # other masks are read as ever


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_an_encoder_pools_each_row_for_itself(kind: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, max_position_embeddings=40, pad_token_id=0)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = make_classifier(getattr(transformers, f"{kind}Model")(config), 3).eval()
    torch.nn.init.normal_(model.head.weight)
    stirred(model, ["query", "value"])
    rows = [Example(e.input_ids, n % 3, "f", n) for n, e in enumerate(ROWS)]
    first, said = choose_packing(model, rows, Train(batch_size=4), task="classification")
    assert first == (1 if kind == "Roberta" else 0)
    assert said == "rows: packed into one sequence, without the 48% that padding would take"
    padded = loss_and_gradients(model, collate(rows, pad_token=0), "classification")
    with packed_attention(model):
        packed = concatenate(rows, first_position=first or 0)
        assert_same(padded, loss_and_gradients(model, packed, "classification"))


def test_a_causal_classifier_reads_the_last_token_of_each_row() -> None:
    model = make_classifier(MODELS["llama"](), 3).eval()
    assert model.pooling == "last"
    torch.nn.init.normal_(model.head.weight)
    stirred(model)
    rows = [Example(e.input_ids, n % 3, "f", n) for n, e in enumerate(ROWS)]
    padded = loss_and_gradients(model, collate(rows, pad_token=0), "classification")
    with packed_attention(model):
        assert_same(padded, loss_and_gradients(model, concatenate(rows), "classification"))


@pytest.mark.parametrize("name", ["llama", "mistral, window 7"])
def test_a_row_is_the_same_to_the_bit_whatever_stands_before_it(name: str) -> None:
    model = stirred(MODELS[name]())
    other = [row(9, 2, 17), *ROWS[1:]]
    with packed_attention(model), torch.no_grad():
        one, two = (model(**concatenate(rows).inputs()).logits for rows in (ROWS, other))
        assert one[:, 9:].equal(two[:, 9:])
        assert not one[:, :9].allclose(two[:, :9])
    # and the check would see it: the same batch through an attention that ignores the table
    plain = {**concatenate(ROWS).inputs(), "attention_mask": None}
    leaking = {**concatenate(other).inputs(), "attention_mask": None}
    plain["position_ids"] = leaking["position_ids"] = None
    with torch.no_grad():
        assert not model(**plain).logits[:, 9:].allclose(model(**leaking).logits[:, 9:])


def test_recomputed_layers_read_the_same_table() -> None:
    model = stirred(MODELS["llama"]())
    model.train()
    with packed_attention(model):
        kept = loss_and_gradients(model, concatenate(ROWS))
        model.activation_checkpointing_enable({"use_reentrant": False})
        again = loss_and_gradients(model, concatenate(ROWS))
    assert kept[0] == again[0]
    assert all(a.equal(b) for a, b in zip(kept[1], again[1], strict=True))


def test_a_compiled_model_gives_the_same() -> None:
    model = stirred(MODELS["llama"]())
    with packed_attention(model):
        expected = loss_and_gradients(model, concatenate(ROWS))
        compiled = torch.compile(model, backend="eager")
        loss, count, _ = objectives.get("causal-lm").loss(compiled, concatenate(ROWS))
        gradients = torch.autograd.grad(loss / count, weft.parameters(model))
    assert_same(expected, (loss.item() / count, list(gradients)))


def test_flex_attention_reads_the_table_as_a_block_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward only: flex attention has no backward on a CPU. The uncompiled one is the reference of torch itself."""
    from torch.nn.attention import flex_attention
    from transformers.integrations import flex_attention as theirs

    def plainly(*args: Any, training: bool, **kwargs: Any) -> Any:
        del training
        return flex_attention.flex_attention(*args, **kwargs)

    monkeypatch.setattr(theirs, "compile_friendly_flex_attention", plainly)
    model = MODELS["mistral, window 7"]()
    batch = concatenate(ROWS)
    pairs = {**batch.inputs(), "attention_mask": table([9, 23, 2, 14], [0, 4, 0, 1])}
    results = []
    for how in IMPLEMENTATIONS:
        model.set_attn_implementation(how)
        with packed_attention(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not compiled
            results.append([model(**given).logits for given in (batch.inputs(), pairs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not results[0][0].allclose(results[0][1])


def test_models_that_cannot_be_packed_say_why() -> None:
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1))
    mixed = built("Lfm2", **GROUPED, layer_types=["conv", "full_attention"])
    eager = built("Llama", attn_implementation="eager")
    for model, reason in (
        (mamba, "takes no position_ids"),
        (mixed, "lets packed rows see each other"),
        (eager, "attends by 'eager', and packed rows need 'sdpa' or 'flex_attention'"),
        (torch.nn.Linear(2, 2), "is no transformers model"),
    ):
        assert reason in (why_not_packed(model, longest=23) or "it was packed")


@pytest.mark.parametrize("method", [PromptTuning(), PrefixTuning(), LlamaAdapter()])
def test_virtual_tokens_and_a_route_per_row_are_refused(method: Any) -> None:
    model = MODELS["llama"]()
    weft.attach(model, method, name="v")
    assert "virtual tokens" in (why_not_packed(model, longest=23) or "")
    weft.detach(model)
    stirred(model)
    weft.use(model, ["a", None])
    assert "every row its own adapter" in (why_not_packed(model, longest=23) or "")


def test_a_model_whose_window_nobody_hands_on_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that are tried are longer than a window that the data reaches."""
    model = built("Mistral", **GROUPED, sliding_window=7)
    assert why_not_packed(model, longest=23) is None
    for layer in model.model.layers:
        monkeypatch.setattr(layer.self_attn.config, "sliding_window", 7)
    own = transformers.models.mistral.modeling_mistral.MistralAttention.forward

    def forgetful(self: Any, *args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(self.config, "sliding_window", None)
        try:
            return own(self, *args, **kwargs)
        finally:
            monkeypatch.setattr(self.config, "sliding_window", 7)

    monkeypatch.setattr(transformers.models.mistral.modeling_mistral.MistralAttention, "forward", forgetful)
    assert "other hidden states than rows alone" in (why_not_packed(model, longest=23) or "")
    assert why_not_packed(model, longest=7) is None


def ready(tiny: Any, tmp_path: Any, method: dict[str, Any] | None = None, **settings: Any) -> Session:
    recipe = runs.bare(tiny / "base", tiny / "data", tmp_path / "out", **settings)
    recipe = recipe.model_copy(update={"method": method or {"name": "lora", "rank": 2}})
    session = prepare(recipe, lambda text: None)
    attach_adapter(session)
    return session


def trained(session: Session) -> tuple[list[float], list[Tensor]]:
    learner, losses = make_learner(session), list[float]()

    def after_step(result: Any) -> bool:
        losses.append(result.loss)
        return True

    train(learner, session.splits.train, session.recipe.train, Progressed(), pad_token=1, after_step=after_step)
    return losses, weft.parameters(session.model)


@pytest.mark.parametrize("settings", [{}, {"batch_size": 2, "accumulate": 4}, {"precision": "bfloat16"}])
def test_a_run_learns_the_same_packed_and_padded(tiny, tmp_path, settings):
    results = {}
    for packing in (None, False):
        session = ready(tiny, tmp_path, steps=6, packing=packing, **settings)
        assert (session.packed_from == 0) is (packing is None)
        assert session.rows.startswith("rows: packed" if packing is None else "rows: padded, as")
        results[packing] = trained(session)
        assert session.model.config._attn_implementation == "sdpa"  # as it was
    rough = "precision" in settings
    assert results[None][0] == pytest.approx(results[False][0], rel=2e-2 if rough else 1e-5)
    if not rough:
        for p, q in zip(results[None][1], results[False][1], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_what_was_chosen_is_said_and_what_cannot_be_is_refused(tiny, tmp_path):
    assert "short ones together" in ready(tiny, tmp_path, bucket_by_length=True).rows
    prompt = {"name": "prompt"}
    session = ready(tiny, tmp_path, prompt)
    assert session.packed_from is None
    assert session.rows.startswith("rows: padded, since virtual tokens stand before each row")
    with pytest.raises(WeftError, match="packing is true, but virtual tokens"):
        ready(tiny, tmp_path, prompt, packing=True)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"data: {tiny / 'data' / 'train.jsonl'}\ntrain: {{packing: true, bucket_by_length: true}}\n")
    with pytest.raises(RecipeError, match="leaves no padding that bucket_by_length could save"):
        load_recipe(recipe)

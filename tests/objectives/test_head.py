"""The chunked loss against the plain one: values, gradients, what is held, and where it has to give way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

import weft
from weft.data import IGNORED, Batch
from weft.errors import WeftError
from weft.objectives.fused import Shaping
from weft.objectives.head import Head, find_head, hidden_states, token_losses, trained_tokens
from weft.objectives.next_token import NextToken
from weft.tune.activations import kept_bytes

V = 97
SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
GQA = {**SIZES, "num_key_value_heads": 1}
FAMILIES: dict[str, tuple[Callable[[], Any], Shaping]] = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**GQA)), Shaping()),
    "gemma2": (
        lambda: Gemma2ForCausalLM(Gemma2Config(**GQA, head_dim=8, final_logit_softcapping=2.0)),
        Shaping(cap=2.0),
    ),
    "cohere": (lambda: CohereForCausalLM(CohereConfig(**GQA, logit_scale=0.0625)), Shaping(scale=0.0625)),
    "granite": (lambda: GraniteForCausalLM(GraniteConfig(**GQA, logits_scaling=8.0)), Shaping(scale=0.125)),
    "gpt2": (
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=2)
        ),
        Shaping(),
    ),
    "phi": (lambda: PhiForCausalLM(PhiConfig(**SIZES)), Shaping()),
}


def make(family: str = "llama") -> Any:
    """A random model with logits that are far from flat, so that a wrong cap or scale shows."""
    torch.manual_seed(0)
    model = FAMILIES[family][0]().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def rows(num_rows: int = 3, length: int = 14) -> Batch:
    torch.manual_seed(1)
    ids = torch.randint(3, V, (num_rows, length))
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.4, IGNORED).masked_fill(mask == 0, IGNORED)
    return Batch(ids, mask, labels, int((labels[:, 1:] != IGNORED).sum()), int(mask.sum()))


def gradients(loss_of: Any, model: Any, batch: Batch, outer: float = 1.0) -> tuple[Any, dict[str, Tensor]]:
    """What the loss gives, and the gradient of everything that trains."""
    model.zero_grad(set_to_none=True)
    found = loss_of(model, batch)
    (found[0] * outer).backward()
    return found, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model: Any, batch: Batch, *, chunk: int = 7, near: float = 1e-6, outer: float = 1.0) -> None:
    loss_of, said = NextToken.chunked(model, chunk)
    assert said is None
    plain, expected = gradients(NextToken.loss, model, batch, outer)
    found, grads = gradients(loss_of, model, batch, outer)
    torch.testing.assert_close(found[0], plain[0], rtol=near, atol=0)
    assert found[1] == plain[1] == batch.num_trained
    assert int(found[2]["correct"]) == int(plain[2]["correct"])
    assert expected
    assert grads.keys() == expected.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=near * 4 * float(expected[name].abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_plain_loss_with_all_its_gradients(family: str) -> None:
    """Everything trains here: the head's weight (tied in gpt2) and bias (phi) too; logits are scaled and capped."""
    model = make(family)
    head = find_head(model)
    assert isinstance(head, Head)
    assert head.shaping == FAMILIES[family][1]
    assert head.way == "fused"
    assert_same(model, rows(), outer=0.37)


def test_the_size_of_a_chunk_changes_nothing() -> None:
    model, batch = make(), rows()
    weft.attach(model, weft.LoRA(rank=2))
    found = [gradients(NextToken.chunked(model, chunk)[0], model, batch) for chunk in (1, 5, 1000, None)]
    for (loss, _, _), grads in found[1:]:
        torch.testing.assert_close(loss, found[0][0][0], rtol=1e-6, atol=0)
        for name, gradient in grads.items():
            torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-5, atol=1e-6)


class Widest(TorchDispatchMode):
    """The most rows of anything that is as wide as the vocabulary."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.ndim > 1 and result.shape[-1] == V:
            self.most = max(self.most, result.numel() // V)
        return result


def test_no_more_logits_than_a_chunk_are_ever_there_and_none_are_kept() -> None:
    model, batch = make(), rows(4, 24)
    weft.attach(model, weft.LoRA(rank=2))
    loss_of, _ = NextToken.chunked(model, 20)  # more than the transposed weight has rows
    with Widest() as widest:
        loss_of(model, batch)[0].backward()
    assert 0 < widest.most <= 20 < batch.num_trained
    with Widest() as whole:
        NextToken.loss(model, batch)
    assert whole.most == batch.input_ids.numel()
    plain = kept_bytes(model, lambda: NextToken.loss(model, batch)).total
    lean = kept_bytes(model, lambda: loss_of(model, batch)).total
    logits, hidden = 4 * V * batch.num_trained, 4 * 16 * batch.num_trained
    assert plain - lean >= logits - 2 * hidden


def attached(kind: str) -> Any:
    """A model with an adapter that the head has something to do with, and a random one at that."""
    model = make("gpt2" if kind.startswith("tied") else "llama")
    match kind:
        case "lora at the head":
            weft.attach(model, weft.LoRA(rank=2), ["lm_head", "*.q_proj"])
        case "full head":
            weft.attach(model, weft.LoRA(rank=2), "*.q_proj", save_modules=["lm_head"])
        case "tied, shared":
            weft.attach(model, weft.LoRA(rank=2), ["*.wte"], tied="share")
        case "tied, separate":
            weft.attach(model, weft.LoRA(rank=2), ["*.wte", "*.c_attn"], tied="separate")
        case "prompt":
            weft.attach(model, weft.PromptTuning(num_tokens=3))
        case "prefix":
            weft.attach(model, weft.PrefixTuning(num_tokens=3))
    with torch.no_grad():
        for p in weft.parameters(model):
            p.add_(torch.randn_like(p) * 0.1)
    return model


WAYS = {
    "lora at the head": "module", "full head": "module", "tied, shared": "fused", "tied, separate": "fused",
    "prompt": "fused", "prefix": "fused",
}  # fmt: skip


@pytest.mark.parametrize("kind", WAYS)
def test_with_adapters_around_the_head(kind: str) -> None:
    model = attached(kind)
    head = find_head(model)
    assert isinstance(head, Head)
    assert head.way == WAYS[kind]
    assert_same(model, rows())
    with weft.using(model, None):
        assert head.way == "fused"  # the base's own head


def test_a_head_that_is_no_plain_linear_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = make()
    model.lm_head.__class__ = Doubled
    head = find_head(model)
    assert isinstance(head, Head)
    assert head.way == "module"
    assert_same(model, rows())


def test_rows_with_adapters_of_their_own() -> None:
    """At the head they cannot be cut apart, elsewhere they are nothing to it."""
    for target, way in (("lm_head", "whole"), ("*.q_proj", "fused")):
        model = make()
        for name in ("a", "b"):
            weft.attach(model, weft.LoRA(rank=2), target, name=name)
        weft.use(model, ["a", "b", None])
        head = find_head(model)
        assert isinstance(head, Head)
        assert head.way == way
        assert_same(model, rows())


def test_each_token_may_weigh_something_else() -> None:
    model, batch = make("gemma2"), rows()
    weft.attach(model, weft.LoRA(rank=2), "*.q_proj")
    head = find_head(model)
    assert isinstance(head, Head)
    places, tokens = trained_tokens(batch.labels, IGNORED, count=batch.num_trained)
    weights = torch.randn(len(places))

    def plain(call: Any, batch: Batch) -> Any:
        logits = call(**batch.inputs()).logits.flatten(0, 1)[places].float()
        return (nn.functional.cross_entropy(logits, tokens, reduction="none") * weights).sum(), 0, {}

    def lean(call: Any, batch: Batch) -> Any:
        hidden = hidden_states(call, head, batch.inputs())
        return (token_losses(hidden, places, tokens, head=head, chunk=4, summed=False)[0] * weights).sum(), 0, {}

    _, expected = gradients(plain, model, batch)
    _, grads = gradients(lean, model, batch)
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    model.lm_head.weight.requires_grad_(True)  # then the head is run again, token by token
    assert gradients(lean, model, batch)[1].keys() == gradients(plain, model, batch)[1].keys()


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision(dtype: torch.dtype, near: float) -> None:
    """Under autocast, and with a loss scale from outside as float16 has it."""
    model, batch = make(), rows()
    weft.attach(model, weft.LoRA(rank=2))

    def at(loss_of: Any) -> Any:
        def loss(call: Any, batch: Batch) -> Any:
            with torch.autocast("cpu", dtype):
                return loss_of(call, batch)

        return loss

    exact = gradients(NextToken.loss, model, batch)[1]
    outer = 2.0**4
    found, grads = gradients(at(NextToken.chunked(model, 5)[0]), model, batch, outer)
    assert found[0].dtype == torch.float32
    for name, gradient in grads.items():
        largest = float(exact[name].abs().max())
        torch.testing.assert_close(gradient / outer, exact[name], rtol=0, atol=near * 3 * largest)


def test_float16_keeps_shares_that_it_cannot_hold_itself() -> None:
    """10000 words share what is left by one: each share is far below the least float16."""
    from weft.objectives.fused import fused_losses

    torch.manual_seed(0)
    hidden = torch.zeros(1, 4, dtype=torch.float16, requires_grad=True)
    weight = torch.randn(10000, 4).half()
    bias = torch.zeros(10000, dtype=torch.float16)
    bias[3] = 18.0
    where = torch.tensor([0]), torch.tensor([3])
    fused_losses(hidden, *where, weight=weight, bias=bias, shaping=Shaping(), chunk=1)[0].sum().backward()
    wide = torch.zeros(1, 4, requires_grad=True)
    nn.functional.cross_entropy(wide @ weight.float().T + bias.float(), where[1]).backward()
    assert hidden.grad is not None
    assert wide.grad is not None
    assert float(wide.grad.abs().max()) > 0
    torch.testing.assert_close(hidden.grad.float(), wide.grad, rtol=2e-2, atol=1e-7)


def test_a_batch_without_trained_tokens_is_zero() -> None:
    model, batch = make(), rows()
    weft.attach(model, weft.LoRA(rank=2))
    batch = Batch(batch.input_ids, batch.attention_mask, torch.full_like(batch.labels, IGNORED), 0, 1)
    (loss, count, _), grads = gradients(NextToken.chunked(model, 4)[0], model, batch)
    assert (loss.item(), count) == (0.0, 0)
    assert all(not g.any() for g in grads.values())


class NoHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, 8)


class Masking(LlamaForCausalLM):
    """What some models do: a word that may never be said."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = super().forward(*args, **kwargs)
        result.logits = result.logits.index_fill(-1, torch.tensor([5]), -1e9)
        return result


@pytest.mark.parametrize(
    ("model", "why"),
    [(NoHead(), "does not say what its output embedding is"), (Masking(LlamaConfig(**GQA)), "without its logits")],
)
def test_what_cannot_be_parted_is_said_and_refused_when_asked_for(model: nn.Module, why: str) -> None:
    loss_of, said = NextToken.chunked(model, None)
    assert loss_of is NextToken.loss
    assert said is not None
    assert why in said
    with pytest.raises(WeftError, match=r"train\.loss_chunk: .* set it to 0"):
        NextToken.chunked(model, 64)
    assert NextToken.chunked(model, 0) == (NextToken.loss, None)


def test_more_than_a_scale_and_a_cap_is_found_out() -> None:
    class Squared(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            result = super().forward(*args, **kwargs)
            result.logits = result.logits * result.logits.abs()
            return result

    assert "scale and cap" in str(find_head(Squared(LlamaConfig(**GQA))))


def test_looking_for_the_head_leaves_no_trace() -> None:
    model = make().train()
    weft.attach(model, weft.LoRA(rank=2, dropout=0.5))
    random = torch.get_rng_state()
    find_head(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert "forward" not in model.lm_head.__dict__
    assert model.weave.route == "default"


def test_a_call_that_failed_does_not_disturb_the_next() -> None:
    model, batch = make(), rows()
    loss_of, _ = NextToken.chunked(model, 5)
    expected = loss_of(model, batch)[0]

    def broken(**inputs: Tensor) -> None:
        model(**inputs)
        raise MemoryError

    with pytest.raises(MemoryError):
        loss_of(broken, batch)
    assert "forward" not in model.lm_head.__dict__
    assert torch.equal(loss_of(model, batch)[0], expected)


def test_a_sharded_head_stays_in_its_model() -> None:
    model = make()
    head = find_head(model)
    assert isinstance(head, Head)
    assert head.way == "fused"
    model.lm_head.weight.device_mesh = "as a DTensor has one"
    assert head.way == "whole"
    assert_same(model, rows())


def test_compiled_models_run_once_more_without_another_graph() -> None:
    model, batch = make(), rows()
    weft.attach(model, weft.LoRA(rank=2))
    loss_of, _ = NextToken.chunked(model, 5)
    expected = gradients(loss_of, model, batch)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    call = torch.compile(model, backend="eager")
    for _ in range(3):
        found, grads = gradients(lambda _, batch: loss_of(call, batch), model, batch)
    torch.testing.assert_close(found[0], expected[0][0], rtol=1e-6, atol=0)
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

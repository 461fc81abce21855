"""An adapted model inside what people train with: loops, trainers, checkpointing, autocast, compile, DDP and FSDP2."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import weft

IDS = (torch.arange(48).view(4, 12) * 7) % 40


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64,
        )
    )  # fmt: skip


METHODS: dict[str, Callable[[], Any]] = {"lora": lambda: weft.LoRA(rank=2), "dora": lambda: weft.DoRA(rank=2)}


def fill(model: nn.Module, name: str | None = None, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in weft.parameters(model, name):
            p += 0.1 * torch.randn(p.shape, generator=generator)


def train(model: nn.Module, parameters: list[nn.Parameter], ids: Tensor = IDS, steps: int = 4) -> list[float]:
    """A plain loop."""
    optimiser = torch.optim.AdamW(parameters, lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", METHODS)
def test_plain_loop_trains_the_adapter_only(method: str) -> None:
    model = llama()
    weft.attach(model, METHODS[method]())
    before = {n: p.clone() for n, p in model.named_parameters() if ".adapters." not in n}
    losses = train(model, weft.parameters(model))
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".adapters." in n
    }


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    losses, grads = {}, {}
    for checkpointed in (False, True):
        model = llama().train()
        weft.attach(model, weft.LoRA(rank=2))
        fill(model)
        if checkpointed:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
            if reentrant:  # torch's own rule: a re-entrant checkpoint needs an input that requires a gradient
                model.enable_input_require_grads()
        losses[checkpointed] = train(model, weft.parameters(model))
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads[checkpointed] = [p.grad for p in weft.parameters(model)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    for plain, checkpointed in zip(grads[False], grads[True], strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str, dtype: torch.dtype) -> None:
    model = llama().eval()
    weft.attach(model, METHODS[method]())
    fill(model)
    exact = model(input_ids=IDS, labels=IDS).loss
    with torch.autocast("cpu", dtype=dtype):
        loss = model(input_ids=IDS, labels=IDS).loss
        with torch.no_grad():
            weft.use(model, ["default", None, None, "default"])
            rows = model(input_ids=IDS).logits
            weft.use(model, "default")
            torch.testing.assert_close(rows[0].float(), model(input_ids=IDS).logits[0].float(), atol=0.05, rtol=0.05)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for p in weft.parameters(model))


@pytest.mark.parametrize("route", ["default", "rows", "blend"])
@pytest.mark.parametrize("method", METHODS)
def test_compile_breaks_no_graph(method: str, route: str) -> None:
    model = llama().eval()
    weft.attach(model, METHODS[method]())
    fill(model)
    if route != "default":
        weft.attach(model, METHODS[method](), name="other")
        fill(model, "other", seed=2)
        weft.use(model, ["default", "other", None, "default"] if route == "rows" else {"default": 0.5, "other": 0.5})
    weft_loss = model(input_ids=IDS, labels=IDS).loss
    weft_loss.backward()
    expected = [p.grad.clone() for p in weft.parameters(model) if p.grad is not None]
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(input_ids=IDS, labels=IDS).loss
    loss.backward()
    torch.testing.assert_close(loss, weft_loss, atol=1e-5, rtol=1e-5)
    found = [p.grad for p in weft.parameters(model) if p.grad is not None]
    for g, e in zip(found, expected, strict=True):
        torch.testing.assert_close(g, e, atol=1e-5, rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5, rtol=1e-4)


def test_functional_call() -> None:
    model = llama().eval()
    weft.attach(model, weft.LoRA(rank=2))
    fill(model)
    other = {n: p + 0.1 for n, p in model.named_parameters() if ".adapters." in n}
    found = torch.func.functional_call(model, other, kwargs={"input_ids": IDS}).logits
    twin = copy.deepcopy(model)
    twin.load_state_dict(other, strict=False)
    torch.testing.assert_close(found, twin(input_ids=IDS).logits)
    assert not torch.equal(found, model(input_ids=IDS).logits)


def test_moving_and_casting() -> None:
    model = llama().eval()
    weft.attach(model, weft.DoRA(rank=2))
    fill(model)
    exact = model(input_ids=IDS).logits
    torch.testing.assert_close(model.to(torch.float64)(input_ids=IDS).logits.float(), exact, atol=1e-5, rtol=1e-4)
    assert {p.dtype for p in weft.parameters(model)} == {torch.float64}
    low = model.to(torch.bfloat16)(input_ids=IDS).logits
    torch.testing.assert_close(low.float(), exact, atol=0.1, rtol=0.1)
    on_meta = model.to("meta")
    assert on_meta(input_ids=IDS.to("meta")).logits.shape == exact.shape


def test_save_and_load_pretrained(tmp_path: Path) -> None:
    model = llama().eval()
    names = [*model.state_dict()]
    base = model(input_ids=IDS).logits
    weft.attach(model, weft.LoRA(rank=2))
    fill(model)
    assert [n for n in model.state_dict() if ".adapters." not in n] == names
    weft.detach(model)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert [*again.state_dict()] == names
    assert torch.equal(again(input_ids=IDS).logits, base)


def arguments(tmp_path: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path), "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.02,
        "report_to": [], "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
        "lr_scheduler_type": "constant", "dataloader_pin_memory": False, **options,
    }  # fmt: skip


def test_hugging_face_trainer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = llama()
    weft.attach(model, weft.LoRA(rank=2))
    base = model.model.embed_tokens.weight.clone()
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(model=model, args=TrainingArguments(**arguments(tmp_path)), train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.02
    assert torch.equal(model.model.embed_tokens.weight, base)
    twin = llama()
    weft.attach(twin, weft.LoRA(rank=2))
    assert losses == pytest.approx(train(twin.train(), weft.parameters(twin)), rel=0.02)


@pytest.mark.oracle
def test_trl_sft_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i + 2 for i in range(38)}
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, **words}, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    model = llama()
    weft.attach(model, weft.LoRA(rank=2))
    data = datasets.Dataset.from_dict({"text": [" ".join(f"w{(i + j) % 38}" for j in range(10)) for i in range(8)]})
    args = trl.SFTConfig(**arguments(tmp_path, max_steps=6), max_length=16, bf16=False)
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.02
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".adapters." in n
    }


def ddp(rank: int, model: nn.Module) -> list[float]:
    wrapped = nn.parallel.DistributedDataParallel(model)
    return train(wrapped, weft.parameters(model), IDS.chunk(2)[rank])


def fsdp(rank: int, model: Any) -> list[float]:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return train(model, [p for p in model.parameters() if p.requires_grad], IDS.chunk(2)[rank])


def work(rank: int, wrap: Callable[[int, nn.Module], list[float]], method: str, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model = llama()
        weft.attach(model, METHODS[method]())
        losses = torch.tensor(wrap(rank, model))
        dist.all_reduce(losses)
        if rank == 0:
            results.put((losses / 2).tolist())
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrap", [ddp, fsdp])
def test_two_processes_are_one(wrap: Callable[[int, nn.Module], list[float]], method: str, free_port: int) -> None:
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.start_processes(work, (wrap, method, free_port, results), nprocs=2, start_method="spawn")
    model = llama()
    weft.attach(model, METHODS[method]())
    assert results.get() == pytest.approx(train(model, weft.parameters(model)), rel=1e-4)


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_compile_goes_on_after_a_graph_break() -> None:
    class Breaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            torch._dynamo.graph_break()
            return self.second(y)

    model, x = Breaking(), torch.randn(3, 4)
    weft.attach(model, weft.LoRA(rank=2, start="orthogonal"), ["first", "second"], name="a")
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))

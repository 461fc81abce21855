"""Pretrain pico, the bundled base model: a Llama of six million parameters on the sources of Python's standard library.

    python scripts/pretrain_pico.py --out runs/pico

One CPU thread, seeded, resumable (run the same command again), with a checkpoint in the final format in `--out`/pico
every ten minutes. The learning rate is constant and then falls linearly to zero over the last part of the steps. The
data of the constant part does not depend on `--steps`, so a run may be resumed with another `--steps` as long as its
fall has not begun.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import Module, digest, in_split
from pico_tokenizer import CONTEXT_TOKENS, train_tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20261121
STEPS = 660
WINDOWS_PER_STEP = 12
WINDOWS_PER_PASS = 4
WARMUP_STEPS = 20
DECAY_SHARE = 0.35
MUON_RATE, ADAM_RATE = 0.02, 0.003
NUM_TEST_SLICES = 8  # an epoch of the constant part holds one eighth of the test suites; the falling part holds none
CHAT_SHARE = 0.06  # of the library's tokens
CHECKPOINT_SECONDS = 600
LOG_EVERY, VALIDATE_EVERY, NUM_VALIDATION_WINDOWS = 10, 50, 24


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz steps (Jordan et al., 2024), in float32.

    `torch.optim.Muon` works in bfloat16, which a CPU without bfloat16 instructions emulates: 27 times slower when
    measured with torch 2.13.
    """

    def __init__(self, params: list[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalise(weight.grad.lerp(buffer, group["momentum"]))
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor, num_steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, by the quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / (matrix.norm() + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def chat_documents(tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> list[str]:
    """Functions of the train modules as conversations, in an order drawn once, until `max_tokens` is reached.

    The example task "docstrings" (source to summary) is not among them.
    """
    pairs = [pair for module in in_split("train", tests=False) for pair in _function_pairs(module)]
    random.Random(SEED).shuffle(pairs)
    documents, total = [], 0
    for question, source in pairs:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": source}]
        document = tokenizer.apply_chat_template(messages, tokenize=False)
        num_tokens = len(tokenizer.encode(document, add_special_tokens=False))
        if num_tokens <= 350:
            documents.append(document)
            total += num_tokens
        if total >= max_tokens:
            break
    return documents


def _function_pairs(module: Module) -> Iterator[tuple[str, str]]:
    lines = module.text.splitlines(keepends=True)
    for owner in ast.walk(ast.parse(module.text)):
        if not isinstance(owner, ast.Module | ast.ClassDef):
            continue
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.end_lineno is None:
                continue
            source = "".join(
                line[node.col_offset :] if line.strip() else "\n" for line in lines[node.lineno - 1 : node.end_lineno]
            ).rstrip("\n")
            kind = "function" if isinstance(owner, ast.Module) else f"method of the class {owner.name}"
            yield f"Write a Python {kind} named {node.name}.", source


def suite_slice(index: int) -> list[str]:
    """The texts of one slice of the train split's test suites, chosen by the hash of the path."""
    suites = in_split("train", tests=True)
    return [module.text for module in suites if int(digest(module.path), 16) % NUM_TEST_SLICES == index]


class Data:
    """Token windows of the corpus, in an order that depends on nothing but the seed and the epoch."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.separator = tokenizer.eos_token_id
        library = [module.text for module in in_split("train", tests=False)]
        self.library = self._encode(tokenizer, library)
        self.chat = self._encode(tokenizer, chat_documents(tokenizer, int(CHAT_SHARE * sum(map(len, self.library)))))
        self.suites: list[list[list[int]]] = []
        for index in range(NUM_TEST_SLICES):
            self.suites.append(self._encode(tokenizer, suite_slice(index)))
        validation = self._encode(tokenizer, [module.text for module in in_split("validation", tests=False)])
        self.validation = self._windows(validation, random.Random(SEED))[:NUM_VALIDATION_WINDOWS]

    def _encode(self, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
        return [[*encoding.ids, self.separator] for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]

    def _windows(self, documents: list[list[int]], draw: random.Random) -> Tensor:
        documents = list(documents)
        draw.shuffle(documents)
        flat = torch.tensor([self.separator] + [token for document in documents for token in document])
        flat = flat[draw.randrange(CONTEXT_TOKENS) :]
        windows = flat[: len(flat) // CONTEXT_TOKENS * CONTEXT_TOKENS].view(-1, CONTEXT_TOKENS)  # [windows, T]
        order = list(range(len(windows)))
        draw.shuffle(order)
        return windows[order]

    def epoch(self, number: int, *, falling: bool) -> Tensor:
        """All windows of one epoch; the falling part of the schedule leaves the test suites out."""
        suites = [] if falling else self.suites[number % NUM_TEST_SLICES]
        return self._windows(self.library + self.chat + suites, random.Random(f"{SEED} {number} {falling}"))

    def batches(self, *, falling: bool) -> Iterator[Tensor]:
        """Batches without end, epoch after epoch."""
        number = 0
        while True:
            for batch in self.epoch(number, falling=falling).split(WINDOWS_PER_STEP):
                if len(batch) == WINDOWS_PER_STEP:
                    yield batch
            number += 1


def new_model() -> LlamaForCausalLM:
    """Pico with fresh weights, in float32."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def make_optimisers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr=MUON_RATE), torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)]


def rate_factor(step: int, num_steps: int) -> float:
    """The factor on both learning rates: warm up, stay, fall to zero over the last `DECAY_SHARE` of the steps."""
    fall = (num_steps - step) / (DECAY_SHARE * num_steps)
    return min(1.0, (step + 1) / WARMUP_STEPS, fall)


def next_token_loss(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Mean cross entropy of each next token, in nats; `windows` is [B, T]."""
    logits = model(windows, use_cache=False).logits[:, :-1]  # [B, T - 1, vocabulary]
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def train_step(model: LlamaForCausalLM, optimisers: list[torch.optim.Optimizer], batch: Tensor, factor: float) -> float:
    """One update; returns the loss in nats per token."""
    total = 0.0
    passes = batch.split(WINDOWS_PER_PASS)
    for windows in passes:
        loss = next_token_loss(model, windows) / len(passes)
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser, rate in zip(optimisers, (MUON_RATE, ADAM_RATE), strict=True):
        for group in optimiser.param_groups:
            group["lr"] = rate * factor
        optimiser.step()
    model.zero_grad(set_to_none=True)
    return total


@torch.no_grad()
def validate(model: LlamaForCausalLM, windows: Tensor) -> float:
    """Mean loss on the validation windows, in nats per token."""
    return sum(next_token_loss(model, part).item() * len(part) for part in windows.split(4)) / len(windows)


def save_final_format(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """What `from_pretrained` reads: the weights in bfloat16, the tokenizer, the generation defaults."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    half.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[0, end], pad_token_id=1)
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def save_state(path: Path, state: dict[str, object]) -> None:
    """Everything needed to go on, written beside and then renamed."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def pretrain(out: Path, num_steps: int) -> None:
    """Run or resume the pretraining in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([module.text for module in in_split("train", tests=False)] + suite_slice(0))
    data = Data(tokenizer)
    model = new_model()
    optimisers = make_optimisers(model)
    first, log, seconds = 0, [], 0.0
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        first, log, seconds = state["step"], state["log"], state["seconds"]
    streams = {falling: data.batches(falling=falling) for falling in (False, True)}
    fall_start = math.ceil((1 - DECAY_SHARE) * num_steps)
    for step in range(first):  # resuming: draw what the finished steps drew
        next(streams[step >= fall_start])
    started = last_saved = time.monotonic()
    for step in range(first, num_steps):
        loss = train_step(model, optimisers, next(streams[step >= fall_start]), rate_factor(step, num_steps))
        done, spent = step + 1, seconds + time.monotonic() - started
        if done % LOG_EVERY == 0 or done == num_steps:
            row = {"step": done, "loss": round(loss, 4), "seconds": round(spent)}
            if done % VALIDATE_EVERY == 0 or done == num_steps:
                row["validation"] = round(validate(model, data.validation), 4)
            log.append(row)
            print(json.dumps(row), flush=True)
        if done == num_steps or time.monotonic() - last_saved > CHECKPOINT_SECONDS:
            last_saved = time.monotonic()
            save_final_format(model, tokenizer, out / "pico")
            (out / "log.json").write_text(json.dumps({"num_steps": num_steps, "seconds": spent, "rows": log}))
            save_state(
                out / "state.pt",
                {
                    "model": model.state_dict(),
                    "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                    "step": done,
                    "log": log,
                    "seconds": spent,
                },
            )


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, the log and the final model")
    parser.add_argument("--steps", type=int, default=STEPS, help="number of updates (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pretrain(arguments.out, arguments.steps)


if __name__ == "__main__":
    main()

"""Turn a finished pretraining run into the bundled asset: copy the model, measure it, write heldout.jsonl and the card.

python scripts/pico_card.py --run runs/pico --out src/weft/assets/pico
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import matplotlib as mpl
import torch
from corpus import HELD_OUT, LICENCE, corpus_facts, digest, in_split
from make_examples import passages
from pretrain_pico import ADAM_RATE, DECAY_SHARE, MUON_RATE, NUM_TEST_SLICES, SEED, WARMUP_STEPS, WINDOWS_PER_STEP
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

HELDOUT_BYTES = 150_000
MEASURED_BYTES = 200_000
CONTEXT_TOKENS = 512
MARGIN = 0.05  # what the tests allow above the measured bits per byte, for other CPUs and kernels

TEXT_PROMPTS = (
    "import os\nimport sys\n\n\ndef read_lines(",
    "class Queue:\n    def __init__(self, maxsize=0):",
    "def main():\n    for name in sorted(names):\n        if not name.startswith('_'):",
)
CHAT_PROMPTS = ("Write a Python function named get_size.", "Write a Python method of the class Parser named close.")


def heldout_texts() -> list[str]:
    """Passages of the held-out packages' library modules, drawn by their hash, about `HELDOUT_BYTES` in all."""
    pieces = [piece for module in in_split("heldout", tests=False) for piece in passages(module.text)]
    return drawn(pieces, HELDOUT_BYTES)


def drawn(texts: list[str], num_bytes: int) -> list[str]:
    """The different texts in the order of their hashes, until `num_bytes` is reached."""
    chosen, total = [], 0
    for text in sorted(set(texts), key=digest):
        chosen.append(text)
        total += len(text.encode())
        if total >= num_bytes:
            break
    return chosen


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> float:
    """Bits that the model needs for one byte of the texts; each starts after a separator, in windows of 512 tokens."""
    nats, num_bytes = 0.0, 0
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        num_bytes += len(text.encode())
        for start in range(0, len(ids) - 1, CONTEXT_TOKENS):
            window = torch.tensor(ids[start : start + CONTEXT_TOKENS + 1])  # [T + 1]
            logits = model(window[None, :-1], use_cache=False).logits[0].float()  # [T, vocabulary]
            nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return nats / math.log(2) / num_bytes


def generate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> str:
    """The text and a continuation sampled at temperature 0.6; `ids` is [1, T]."""
    torch.manual_seed(SEED)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=120, do_sample=True, temperature=0.6, top_p=0.95
    )
    return tokenizer.decode(output[0], skip_special_tokens=False)


def samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> str:
    """Continuations of the fixed prompts, as Markdown code blocks."""
    blocks = []
    for prompt in TEXT_PROMPTS:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]])
        blocks.append(generate(model, tokenizer, ids).removeprefix("<|endoftext|>"))
    for question in CHAT_PROMPTS:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        blocks.append(generate(model, tokenizer, ids["input_ids"]))
    return "\n\n".join(f"````text\n{block.rstrip()}\n````" for block in blocks)


def draw_loss(rows: list[dict[str, float]], path: Path) -> None:
    """The loss curve as an SVG without a date, so that the same run gives the same file."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "pico"
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], label="train", linewidth=1)
    checked = [row for row in rows if "validation" in row]
    axes.plot([row["step"] for row in checked], [row["validation"] for row in checked], "o-", label="validation", ms=3)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="pico pretraining")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def loss_table(rows: list[dict[str, float]]) -> str:
    """The loss at every validation, as Markdown; the train loss is the mean since the row before."""
    lines = ["| step | tokens seen | train loss | validation loss |", "| ---: | ---: | ---: | ---: |"]
    recent: list[float] = []
    for row in rows:
        recent.append(row["loss"])
        if "validation" in row:
            tokens = row["step"] * WINDOWS_PER_STEP * CONTEXT_TOKENS
            mean = sum(recent) / len(recent)
            lines.append(f"| {row['step']} | {tokens / 1e6:.2f} M | {mean:.3f} | {row['validation']:.3f} |")
            recent = []
    return "\n".join(lines)


def corpus_table(counts: dict[str, dict[str, int]]) -> str:
    """Modules and bytes of every split, as Markdown."""
    lines = ["| split | modules | bytes |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {count['modules']} | {count['bytes']:,} |" for name, count in counts.items()]
    return "\n".join(lines)


def card(log: dict, measured: dict[str, float], sampled: str, num_parameters: int) -> str:
    """The model card."""
    facts = corpus_facts()
    tokens = log["num_steps"] * WINDOWS_PER_STEP * CONTEXT_TOKENS
    first = math.ceil((1 - DECAY_SHARE) * log["num_steps"]) * WINDOWS_PER_STEP
    second = log["num_steps"] * WINDOWS_PER_STEP - first
    threshold = measured["`heldout.jsonl`"] + MARGIN
    scores = "\n".join(f"| {name} | {value:.3f} |" for name, value in measured.items())
    return f"""---
license: other
license_name: PSF-2.0
license_link: https://docs.python.org/3/license.html
library_name: transformers
pipeline_tag: text-generation
---

# pico

A language model of {num_parameters:,} parameters that knows nothing but Python's standard library. It travels with Weft
so that every command, example and test has a real pretrained base without a download. It writes text that looks like
Python; it is not useful for anything else.

## Data

The sources of CPython {facts["python"]}'s standard library (`scripts/corpus.py`); the SHA-256 of the corpus is
`{facts["corpus_sha256"]}`.
Only *train* modules were trained on. A tenth of each package's modules is validation, a tenth is test, and these
packages are held out altogether, with their test suites:
{", ".join(sorted(HELD_OUT))}.

{corpus_table(facts["counts"])}

The library's train modules and conversations ("Write a Python function named X." and the function's source, about 6 %
of the library's tokens) are in every epoch. Until the learning rate begins to fall, an epoch also holds one part in
{NUM_TEST_SLICES} of the test suites, and none after that. The run takes {first} windows of the first kind and {second}
of the second; such epochs have about 5260 and 4160, so library text is seen once or twice. The tokenizer was trained
on the library's train modules and the first of those parts of the test suites.

`heldout.jsonl` holds about 150 kB of the held-out packages, rows `{{"text"}}`: what a base should still be able to do
after it was adapted to something else.

## Model

Llama architecture: hidden 256, 6 layers, 4 heads of 64, MLP 704, context 512, tied embeddings, rotary positions
(base 10000), bfloat16. Byte-level BPE, 4096 entries; a line break and the indentation after it are one token
(so a prompt should not end in a line break).
Conversations: `<|user|>...<|end|><|assistant|>...<|end|>`, also `<|system|>`; the chat template marks what the
assistant says for loss masks. Documents are separated by `<|endoftext|>`.

## Training

`python scripts/pretrain_pico.py --out RUN --steps {log["num_steps"]}`, then
`python scripts/pico_card.py --run RUN --out src/weft/assets/pico`.
{log["num_steps"]} steps of {WINDOWS_PER_STEP} windows of {CONTEXT_TOKENS} tokens ({tokens / 1e6:.2f} M tokens)
in {log["seconds"] / 60:.0f} minutes on one CPU thread of a shared machine ({tokens / log["seconds"]:.0f} tokens per
second), float32, seed {SEED}. Muon (learning rate {MUON_RATE}, momentum 0.95, weight decay 0.01) for the layers'
matrices, AdamW ({ADAM_RATE}, betas 0.9 and 0.95) for the embedding and the norms. Warm-up {WARMUP_STEPS} steps, then
constant, then linear to zero over the last {DECAY_SHARE:.0%} of the steps.

![loss](loss.svg)

{loss_table(log["rows"])}

Loss is in nats per token; the validation loss is on 24 windows of validation modules.

## Measured

| text, none of it trained on | bits per byte |
| --- | ---: |
{scores}

The tests require fewer than {threshold:.2f} bits per byte on `heldout.jsonl`. Each document starts after a
separator and is read in windows of {CONTEXT_TOKENS} tokens; whole modules are drawn by their hash, about
{MEASURED_BYTES // 1000} kB of each kind.

## Samples

Temperature 0.6, top-p 0.95, one seed, not selected. The prompt is the beginning of each.

{sampled}

## Licence

The weights and `heldout.jsonl` are derived from the sources of CPython, (c) Python Software Foundation, and are under
CPython's licence: {LICENCE}.
The full text is at https://docs.python.org/3/license.html.
"""


def main() -> None:
    """Read the command line, copy the model, measure it and write what goes beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the --out folder of pretrain_pico.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundled model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for file in sorted((arguments.run / "pico").iterdir()):
        shutil.copyfile(file, arguments.out / file.name)
    tokenizer = AutoTokenizer.from_pretrained(arguments.out, local_files_only=True, model_max_length=10**6)
    model = AutoModelForCausalLM.from_pretrained(arguments.out, local_files_only=True, dtype=torch.float32).eval()
    texts = heldout_texts()
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (arguments.out / "heldout.jsonl").write_text(rows, encoding="utf-8")
    held_out = drawn([module.text for module in in_split("heldout", tests=False)], MEASURED_BYTES)
    validation = drawn([module.text for module in in_split("validation", tests=False)], MEASURED_BYTES)
    measured = {
        "`heldout.jsonl`": bits_per_byte(model, tokenizer, texts),
        f"held-out packages, {len(held_out)} whole modules": bits_per_byte(model, tokenizer, held_out),
        f"validation split, {len(validation)} whole modules": bits_per_byte(model, tokenizer, validation),
    }
    log = json.loads((arguments.run / "log.json").read_text())
    draw_loss(log["rows"], arguments.out / "loss.svg")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    text = card(log, measured, samples(model, tokenizer), num_parameters)
    (arguments.out / "README.md").write_text(text, encoding="utf-8")
    print(json.dumps({name: round(value, 4) for name, value in measured.items()}))


if __name__ == "__main__":
    main()

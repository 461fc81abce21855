"""PEFT folders beyond the plain case: patterns, tied weights, starts that edit the base, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import weft
from tests.common import language
from tests.interop.architectures import (
    ARCHITECTURES,
    assert_close,
    base,
    outputs,
    quiet,
    reloaded,
    shake,
    tensors_of,
    trained,
)
from weft.adapter import AdapterFileError
from weft.attach import records
from weft.interop import peft as ours

pytestmark = pytest.mark.oracle

BATCH = ARCHITECTURES["llama"].batch()
Q, O = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"


def lora(folder: Path, **options: Any) -> Any:
    """PEFT's LoRA on the llama, saved."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"], **options}
    with quiet():
        config = peft.LoraConfig(**options)
    return trained(base("llama"), config, folder)


def loaded(folder: Path, name: str = "x", architecture: str = "llama") -> Any:
    model = base(architecture)
    weft.load(model, folder, name=name)
    return model


def edit(
    folder: Path, config: dict[str, Any] | None = None, tensors: Callable[[dict[str, Tensor]], Any] | None = None
) -> None:
    """Change a folder's configuration or tensors."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
    if tensors is not None:
        found = load_file(folder / "adapter_model.safetensors")
        tensors(found)
        save_file(found, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("lora", lambda: peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=["q_proj", "o_proj"], rank_pattern={"layers.0.self_attn.q_proj": 2},
            alpha_pattern={r"layers\.[12]\..*": 3, "o_proj": 5},
        )),
        ("loha", lambda: peft.LoHaConfig(
            r=4, alpha=6, target_modules=["q_proj", "o_proj"], rank_pattern={r"layers\.0\..*": 2},
            alpha_pattern={"o_proj": 5},
        )),
        ("lokr", lambda: peft.LoKrConfig(
            r=2, target_modules=r".*\.[12]\..*(q|o)_proj", rank_pattern={"q_proj": 1}, decompose_factor=4,
        )),
        ("fourierft", lambda: peft.FourierFTConfig(
            n_frequency=40, scaling=30.0, target_modules=["q_proj", "o_proj"], n_frequency_pattern={"o_proj": 20},
        )),
        ("ia3", lambda: peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])),
        ("road", lambda: peft.RoadConfig(variant="road_4", group_size=8, target_modules=["q_proj", "o_proj"])),
        ("oft", lambda: peft.OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj", "down_proj"])),
        ("lora", lambda: peft.LoraConfig(target_modules="all-linear", r=2)),
        ("lora", lambda: peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], r=2)),
        ("norm_tuning", lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "o_proj"])),
        ("lora", lambda: peft.LoraConfig(
            r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            rank_pattern={r"layers\.1\..*": 3, "experts.down_proj": 1}, alpha_pattern={"experts.gate_up_proj": 5},
        )),
    ],
)  # fmt: skip
def test_options_per_module_cross_both_ways(method: str, config: Callable[[], Any], tmp_path: Path) -> None:
    with quiet():
        config = config()
    architecture = "mixtral" if getattr(config, "target_parameters", None) else "llama"

    def loaded(folder: Path) -> Any:
        model = base(architecture)
        weft.load(model, folder, name="x")
        return model

    plain = outputs(base(architecture), BATCH)
    theirs = trained(base(architecture), config, tmp_path / "theirs")
    model = loaded(tmp_path / "theirs")
    wanted = outputs(theirs, BATCH)
    assert_close(outputs(model, BATCH), wanted, plain)
    assert records(model)["x"].plan.method.name == method
    reason = ours.cannot_write(model, records(model)["x"])
    if method == "oft":  # a number of blocks is a block size per width, and PEFT has one block size
        assert reason is not None
        return
    assert reason is None
    weft.save(model, tmp_path / "ours", format="peft")
    assert_close(wanted, outputs(reloaded(base(architecture), tmp_path / "ours"), BATCH), plain)
    (tmp_path / "ours" / "weft.json").unlink()
    again = tensors_of(loaded(tmp_path / "ours"), "x")
    assert all(torch.equal(v, again[k]) for k, v in tensors_of(model, "x").items())


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_two_adapters_that_edit_the_base_in_peft_live_beside_each_other(start: str, tmp_path: Path) -> None:
    model, plain = base("llama"), outputs(base("llama"), BATCH)
    wanted = {}
    for name, rank in (("one", 4), ("two", 2)):
        wanted[name] = outputs(lora(tmp_path / name, init_lora_weights=start, r=rank), BATCH)
        weft.load(model, tmp_path / name)
    for name, expected in wanted.items():
        weft.use(model, name)
        assert_close(outputs(model, BATCH), expected, plain)
    weft.use(model, None)
    assert torch.equal(outputs(model, BATCH), plain)


@pytest.mark.parametrize("stabilised", [False, True])
def test_a_start_is_written_as_twice_the_rank_and_read_back_as_itself(stabilised: bool, tmp_path: Path) -> None:
    model, plain = base("llama"), outputs(base("llama"), BATCH)
    weft.attach(model, weft.LoRA(rank=3, start="pissa", rank_stabilised=stabilised), ["q_proj"], name="a")
    shake(weft.parameters(model))
    weft.save(model, tmp_path / "a", format="peft")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], "init_lora_weights" in config) == (6, False)
    other = reloaded(base("llama"), tmp_path / "a")
    assert_close(outputs(model, BATCH), outputs(other, BATCH), plain)
    assert records(loaded(tmp_path / "a"))["x"].plan.method == records(model)["a"].plan.method
    (tmp_path / "a" / "weft.json").unlink()
    assert_close(outputs(loaded(tmp_path / "a"), BATCH), outputs(model, BATCH), plain)


def test_a_head_that_the_start_edited_is_recognised(tmp_path: Path) -> None:
    theirs = lora(tmp_path, init_lora_weights="pissa", target_modules=["q_proj", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "adapter_model.safetensors")
    assert_close(outputs(loaded(tmp_path), BATCH), outputs(theirs, BATCH), outputs(base("llama"), BATCH))


def test_a_copied_embedding_must_be_the_models_own(tmp_path: Path) -> None:
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    theirs = lora(tmp_path, target_modules=["q_proj", "embed_tokens"])
    assert key in load_file(tmp_path / "adapter_model.safetensors")
    assert_close(outputs(loaded(tmp_path), BATCH), outputs(theirs, BATCH), outputs(base("llama"), BATCH))
    edit(tmp_path, tensors=lambda t: t[key].add_(1))
    with pytest.raises(AdapterFileError, match=r"embed_tokens\.base_layer\.weight is a copy"):
        loaded(tmp_path)


def test_embeddings_saved_untouched_are_recognised(tmp_path: Path) -> None:
    theirs = lora(tmp_path)
    with quiet():
        theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / "adapter_model.safetensors")
    assert_close(outputs(loaded(tmp_path), BATCH), outputs(theirs, BATCH), outputs(base("llama"), BATCH))
    edit(tmp_path, tensors=lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(100, 32)}))
    with pytest.raises(AdapterFileError, match="resized vocabulary"):
        loaded(tmp_path)


def test_a_head_of_several_layers(tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(5)
        config = transformers.RobertaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **language.SIZE
        )
        return transformers.RobertaForSequenceClassification(config).eval()

    with quiet():
        config = peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    theirs, mine = trained(model(), config, tmp_path / "theirs"), model()
    plain = outputs(mine, BATCH)
    plan = weft.load(mine, tmp_path / "theirs", name="x")
    assert {s.site.address for s in plan.sites if s.method.name == "full"} == {
        "classifier.dense",
        "classifier.out_proj",
    }
    assert_close(outputs(mine, BATCH), outputs(theirs, BATCH), plain)
    weft.save(mine, tmp_path / "ours", format="peft")
    assert_close(outputs(mine, BATCH), outputs(reloaded(model(), tmp_path / "ours"), BATCH), plain)
    edit(tmp_path / "theirs", tensors=lambda t: [t.pop(k) for k in [*t] if "classifier" in k])
    with pytest.raises(AdapterFileError, match="lacks the tensors of classifier"):
        weft.load(model(), tmp_path / "theirs")


def test_experts_of_an_older_layout_are_refused(tmp_path: Path) -> None:
    with quiet():
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    trained(base("mixtral"), config, tmp_path)
    loaded(tmp_path, architecture="mixtral")
    edit(tmp_path, {"peft_version": "0.18.1"})
    with pytest.raises(AdapterFileError, match=r"peft_version='0\.18\.1'"):
        loaded(tmp_path, architecture="mixtral")


def tied() -> Any:
    torch.manual_seed(5)
    return language.llama(tie_word_embeddings=True)


@pytest.mark.parametrize("trains", ["lora", "full"])
def test_tied_embeddings_that_see_one_adapter(trains: str, tmp_path: Path) -> None:
    """`ensure_weight_tying` is our tied='share'."""
    targets = ["q_proj", "embed_tokens"] if trains == "lora" else ["q_proj"]
    extra = {} if trains == "lora" else {"modules_to_save": ["embed_tokens"]}
    with quiet():
        config = peft.LoraConfig(r=4, target_modules=targets, ensure_weight_tying=True, **extra)
    theirs = trained(tied(), config, tmp_path / "theirs")
    model, plain = tied(), outputs(tied(), BATCH)
    plan = weft.load(model, tmp_path / "theirs", name="x")
    assert plan.tied == "share"
    assert not any("lm_head" in s.site.address for s in plan.sites)
    assert_close(outputs(model, BATCH), outputs(theirs, BATCH), plain)
    weft.save(model, tmp_path / "ours", format="peft")
    assert_close(outputs(model, BATCH), outputs(reloaded(tied(), tmp_path / "ours"), BATCH), plain)
    again = tied()
    weft.load(again, tmp_path / "ours", name="x")
    assert torch.equal(outputs(again, BATCH), outputs(model, BATCH))


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings_adapted_apart(targets: list[str], tmp_path: Path) -> None:
    with quiet():
        theirs = trained(tied(), peft.LoraConfig(r=4, target_modules=["q_proj", *targets]), tmp_path)
    model, plain = tied(), outputs(tied(), BATCH)
    weft.load(model, tmp_path, name="x")
    assert_close(outputs(model, BATCH), outputs(theirs, BATCH), plain)


def test_a_shared_weight_of_another_method_is_no_peft_folder() -> None:
    model = tied()
    weft.attach(model, weft.OFT(block_size=8), ["embed_tokens"], tied="share", name="x")
    assert "ties LoRA" in str(ours.cannot_write(model, records(model)["x"]))


LACKED = {
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all"},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "use_qalora": {"use_qalora": True},
    "arrow_config": {"arrow_config": {"top_k": 2}},
    "velora_config": {"velora_config": {"num_groups": 2}},
    "use_bdlora": {"use_bdlora": {"nblocks": 2}},
    "monteclora_config": {"monteclora_config": {"num_samples": 2}},
    "megatron_config": {"megatron_config": {"x": 1}},
    "loftq_config": {"loftq_config": {"loftq_bits": 4}},
    "an_option_of_the_future": {"an_option_of_the_future": 0.5},
    "init_lora_weights": {"init_lora_weights": "corda"},
    "init_lora_weights='pissa_niter_4'": {"init_lora_weights": "pissa_niter_4"},
}


def test_every_option_that_we_lack_is_named(tmp_path: Path) -> None:
    lora(tmp_path)
    original = (tmp_path / "adapter_config.json").read_text()
    for word, options in LACKED.items():
        edit(tmp_path, options)
        with pytest.raises(AdapterFileError, match=word.replace("'", ".")) as error:
            loaded(tmp_path)
        assert str(next(iter(options.values()))) in str(error.value)
        (tmp_path / "adapter_config.json").write_text(original)
    loaded(tmp_path)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (peft.LoHaConfig(r=2, module_dropout=0.1, target_modules=["q_proj"]), "module_dropout=0.1"),
        (peft.LoKrConfig(r=2, rank_dropout=0.2, target_modules=["q_proj"]), "rank_dropout=0.2"),
        (peft.OFTConfig(oft_block_size=8, module_dropout=0.1, target_modules=["q_proj"]), "module_dropout=0.1"),
        (peft.FrodConfig(target_modules=["q_proj"], progressbar=False, bias="all"), "bias='all'"),
        (peft.BOFTConfig(boft_block_size=4, boft_dropout=0.1, target_modules=["q_proj"]), "boft_dropout=0.1"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_options_of_other_methods_that_we_lack(config: Any, word: str, tmp_path: Path) -> None:
    trained(base("llama"), config, tmp_path)
    with pytest.raises(AdapterFileError, match=word):
        loaded(tmp_path)


KEY = f"base_model.model.{Q}.lora_A.weight"
DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(KEY), f"{Q} lacks A"),
    "missing module": (lambda t: [t.pop(k) for k in [*t] if Q in k], f"lacks the tensors of {Q}"),
    "another module": (lambda t: t.update({KEY.replace("q_proj", "qq_proj"): t[KEY].clone()}), "qq_proj"),
    "extra": (lambda t: t.update({KEY.replace("lora_A", "lora_C"): t[KEY].clone()}), "lora_C"),
    "shape": (lambda t: t.update({KEY: t[KEY][:, :-1].contiguous()}), f"{Q}.A is"),
    "rank": (lambda t: t.update({KEY: t[KEY][:2].contiguous()}), f"{Q}.B is"),
    "dimensions": (lambda t: t.update({KEY: t[KEY].flatten()}), f"{Q}.A is"),
    "none": (lambda t: [t.pop(k) for k in [*t]] and t.update(x=torch.zeros(1)), "none of the tensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_changes_nothing(damage: str, tmp_path: Path) -> None:
    lora(tmp_path)
    act, words = DAMAGES[damage]
    edit(tmp_path, tensors=act)
    model, before = base("llama"), base("llama").state_dict()
    with pytest.raises(AdapterFileError, match=words):
        weft.load(model, tmp_path)
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("value", ["eight", None, -1])
def test_a_value_that_fits_no_option_is_an_error(value: Any, tmp_path: Path) -> None:
    lora(tmp_path)
    edit(tmp_path, {"lora_alpha": value})
    with pytest.raises(AdapterFileError, match="self_attn"):
        loaded(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"peft_type": 3}'])
def test_an_unreadable_configuration_is_an_error(text: str, tmp_path: Path) -> None:
    lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json"):
        loaded(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(AdapterFileError, match="nothing says which method"):
        loaded(tmp_path)


def test_keys_without_the_prefix_are_read(tmp_path: Path) -> None:
    """As transformers and diffusers write them, which inject adapters without a wrapper."""
    theirs = lora(tmp_path)

    def unprefixed(t: dict[str, Tensor]) -> None:
        for key in [*t]:
            t[key.removeprefix("base_model.model.")] = t.pop(key)

    edit(tmp_path, tensors=unprefixed)
    assert_close(outputs(loaded(tmp_path), BATCH), outputs(theirs, BATCH), outputs(base("llama"), BATCH))


def test_a_config_that_contradicts_weft_json_is_an_error(tmp_path: Path) -> None:
    model = base("llama")
    weft.attach(model, weft.LoRA(rank=2, freeze_a=True), ["q_proj"], name="a")
    weft.save(model, tmp_path / "a", format="peft")
    assert records(loaded(tmp_path / "a"))["x"].plan.method.freeze_a  # PEFT has no such option: weft.json keeps it
    edit(tmp_path / "a", {"lora_alpha": 3})
    with pytest.raises(AdapterFileError, match="differ about alpha"):
        loaded(tmp_path / "a")


@pytest.mark.parametrize(
    ("method", "targets", "architecture", "words"),
    [
        (weft.Bottleneck, ["mlp"], "llama", "no method like 'bottleneck'"),
        (lambda: weft.VeRA(rank=4), ["embed_tokens"], "llama", "embed_tokens: vera"),
        (lambda: weft.LoRA(rank=2, dropout=0.1), ["gate_up_proj"], "mixtral", "dropout=0.1"),
        (lambda: weft.DoRA(rank=2), ["gate_up_proj"], "mixtral", "bare parameter"),
        (lambda: weft.OFT(block_size=8), ["projection"], "vit", "overlapping patches"),
        (lambda: weft.SHiRA(rank=1), ["c_attn"], "gpt2", "Conv1D"),
        (lambda: weft.SHiRA(rank=1), {"q_proj": {}, "o_proj": {"rank": 2}}, "llama", "rank=1, 2"),
        (lambda: weft.PrefixTuning(num_tokens=2), ["layers.0.self_attn"], "llama", "every attention"),
        (lambda: weft.LlamaAdapter(num_tokens=2), ["layers.0.self_attn"], "llama", "the last attentions"),
    ],
)
def test_what_peft_lacks_is_said(method: Any, targets: Any, architecture: str, words: str, tmp_path: Path) -> None:
    model = base(architecture)
    weft.attach(model, method(), targets, name="a")
    assert words in str(ours.cannot_write(model, records(model)["a"]))
    with pytest.raises(AdapterFileError, match=words):
        weft.save(model, tmp_path / "a", format="peft")
    weft.save(model, tmp_path / "a")  # the native layout has them all
    assert json.loads((tmp_path / "a" / "weft.json").read_text())["layout"] == "weft"


def test_every_type_of_peft_has_a_counterpart_or_a_reason():
    from scripts.docs_tables import ABSENT
    from weft.interop.peft.family import FAMILIES

    here = {family.peft_type for family in FAMILIES}
    assert here | ABSENT.keys() == {kind.name for kind in peft.PeftType}
    assert not here & ABSENT.keys()

"""mergekit's own files give mergekit's own numbers."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import yaml

from tests.checkpoints.test_merge import models, tensors
from weft.checkpoints import CheckpointError
from weft.checkpoints.merge import run
from weft.checkpoints.mergekit import read_mergekit

__all__ = ["models"]  # the fixture

ONE, TWO, BASE = "ONE", "TWO", "BASE"
FILES = {
    "gradients and filters": f"""
        merge_method: slerp
        base_model: {BASE}
        dtype: float32
        models: [{{model: {BASE}}}, {{model: {ONE}}}]
        parameters:
          t:
          - {{filter: self_attn, value: [0, 0.5, 1]}}
          - {{filter: mlp, value: [1, 0.2]}}
          - {{value: 0.4}}
    """,
    "a density for each": f"""
        merge_method: ties
        base_model: {BASE}
        models:
        - model: {ONE}
          parameters: {{weight: [0.2, 0.9], density: 0.3}}
        - model: {TWO}
          parameters: {{weight: [{{filter: mlp, value: 0.7}}, {{value: 0.3}}], density: [0.9, 0.1]}}
        parameters: {{normalize: false, lambda: 0.8, rescale: true, int8_mask: true}}
    """,
    "breadcrumbs": f"""
        merge_method: breadcrumbs_ties
        base_model: {BASE}
        models:
        - {{model: {ONE}, parameters: {{weight: 0.5, density: 0.6, gamma: 0.01}}}}
        - {{model: {TWO}, parameters: {{weight: 0.5, density: 0.6, gamma: 0.1}}}}
    """,
    "a mean": f"""
        merge_method: linear
        out_dtype: bfloat16
        models:
        - {{model: {ONE}, parameters: {{weight: 1.0}}}}
        - {{model: {TWO}, parameters: {{weight: [0, 1]}}}}
    """,
    "nuslerp by rows": f"""
        merge_method: nuslerp
        base_model: {BASE}
        models: [{{model: {ONE}, parameters: {{weight: 1}}}}, {{model: {TWO}, parameters: {{weight: 3}}}}]
        parameters: {{nuslerp_flatten: false, nuslerp_row_wise: true}}
    """,
    "karcher with its base": f"""
        merge_method: karcher
        base_model: {BASE}
        models: [{{model: {ONE}}}, {{model: {TWO}}}]
    """,
    "stacked layers": f"""
        merge_method: passthrough
        slices:
        - sources: [{{model: {ONE}, layer_range: [0, 2]}}]
        - sources:
          - model: {TWO}
            layer_range: [1, 3]
            parameters: {{scale: [{{filter: o_proj, value: 0.5}}, {{value: 1.0}}]}}
    """,
    "merged slices": f"""
        merge_method: linear
        slices:
        - sources:
          - {{model: {ONE}, layer_range: [0, 2], parameters: {{weight: 0.3}}}}
          - {{model: {TWO}, layer_range: [1, 3], parameters: {{weight: 0.7}}}}
    """,
}


def written(text: str, models: dict[str, str], folder: Path, **change: object) -> Path:
    text = yaml.safe_dump({**yaml.safe_load(text), **change})
    for name in ("ONE", "TWO", "BASE"):
        text = text.replace(name, models[name.lower()])
    (folder / "merge.yaml").write_text(text)
    return folder / "merge.yaml"


@pytest.mark.oracle
@pytest.mark.parametrize("name", FILES)
def test_the_numbers_are_the_same(name, models, tmp_path):
    file = written(FILES[name], models, tmp_path)
    run(read_mergekit(file), tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge = pytest.importorskip("mergekit.merge")
        from mergekit.config import MergeConfiguration
        from mergekit.options import MergeOptions

        config = MergeConfiguration.model_validate(yaml.safe_load(file.read_text()))
        merge.run_merge(config, str(tmp_path / "theirs"), MergeOptions(quiet=True))
    theirs, ours = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6)


def test_a_stacked_model_loads(models, tmp_path):
    import transformers

    run(read_mergekit(written(FILES["stacked layers"], models, tmp_path)), tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_hidden_layers == 4
    assert loaded(torch.arange(3, 9)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"merge_method": "tiess"}, "there is no merge_method 'tiess'; did you mean 'ties'"),
        ({"moduls": {}}, "the key 'moduls' is not read here; did you mean 'modules'"),
        ({"modules": {}}, "one of models, slices and modules"),
        ({"parameters": {"densty": 1}}, "has no parameter 'densty'; did you mean 'density'"),
        ({"dtype": "float33"}, "none of torch's"),
        ({"slices": []}, "one of models, slices and modules"),
    ],
)
def test_what_is_not_known_is_said(change, said, models, tmp_path):
    with pytest.raises(CheckpointError, match=said):
        read_mergekit(written(FILES["a density for each"], models, tmp_path, **change))

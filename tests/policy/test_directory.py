"""Directories that are no model are refused in one sentence that says what is missing, with weights and without."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from grpo.policy import load_policy, load_shapes
from tests.fakes.models import save_tiny


@pytest.fixture
def model(tmp_path):
    save_tiny(tmp_path / "model")
    return tmp_path / "model"


def refused(path, capsys) -> str:
    """What is said of a model: the same when it is loaded, when its shapes are, and by --check with exit code 2."""
    with pytest.raises(ValueError) as loading:
        load_policy(str(path))
    with pytest.raises(ValueError) as looking:
        load_shapes(str(path))
    assert str(loading.value) == str(looking.value)
    capsys.readouterr()
    assert train.main(["--check", "--model", str(path), "--device", "cpu"]) == 2
    assert capsys.readouterr().err == f"train.py: error: {loading.value}\n"
    assert str(loading.value).startswith(f"model: {str(path)!r} ") and "\n" not in str(loading.value)
    return str(loading.value).replace(str(path), "")


@pytest.mark.parametrize("method", ["fp8", "gptq", "bitsandbytes", None])
@pytest.mark.parametrize("place", ["quantization_config", "compression_config"])
def test_c48_a_quantized_checkpoint_is_refused_by_name(model, method, place, capsys):
    """The kind: weights that are numbers of another kind than the ones that are computed with."""
    config = json.loads((model / "config.json").read_text())
    config[place] = {"bits": 4} | ({"quant_method": method} if method else {})
    (model / "config.json").write_text(json.dumps(config))
    assert f"is quantized ({method or 'unnamed method'}): quantization is not supported" in refused(model, capsys)


def test_c48_scales_without_a_word_in_the_config_are_noticed(model):
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("gate_proj.weight"))
    weights[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"is quantized .it holds {name}_scale_inv.: quantization is not supported"):
        load_policy(str(model))


def test_c49_no_tokenizer(model, capsys):
    """The kind: a directory that is no model, or a part of one, and passes as one or ends in transformers' words."""
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer files (tokenizer.json)" in refused(model, capsys)


def test_c49_an_empty_tokenizer(model, capsys):
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"] = {"<eos>": 256}
    (model / "tokenizer.json").write_text(json.dumps(content))
    assert "has an empty tokenizer" in refused(model, capsys)


def test_c49_no_weights_or_a_part_of_them(model, capsys):
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    said = refused(model, capsys)
    assert "lacks 1 of the 2 files that model.safetensors.index.json names, such as model-00002-of-00002.safe" in said
    (model / "model-00001-of-00002.safetensors").unlink()
    (model / "model.gguf").touch()
    assert "has no weights (model.safetensors)" in refused(model, capsys)


def test_c49_an_adapter(model, capsys):
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "is no adapter that can be merged: its adapter_config.json must name its base" in refused(model, capsys)
    (model / "adapter_config.json").write_text('{"peft_type": "LOHA", "base_model_name_or_path": "elsewhere"}')
    assert "is no adapter that can be merged: adapters with peft_type 'LOHA' are not supp" in refused(model, capsys)


def test_c49_a_run_and_its_checkpoints(model, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "checkpoints" / "step_000010").mkdir(parents=True)
    (run / "config.yaml").write_text("model: embedded\n")
    for place in (run, run / "checkpoints", run / "checkpoints" / "step_000010"):
        assert f"belongs to a run and is no model; {run / 'final'}, its model, is written after" in _said(place)
    shutil.copytree(model, run / "final")
    for place in (run, run / "checkpoints", run / "checkpoints" / "step_000010"):
        assert f"belongs to a run and is no model; use {run / 'final'}" in _said(place)
    assert "belongs to a run" in refused(run, capsys)
    load_policy(str(run / "final"))


def test_c49_a_file_a_folder_of_models_and_an_empty_directory(model, tmp_path, capsys):
    assert "is a file: must be the directory" in refused(model / "model.safetensors", capsys)
    assert "has no config.json, but its model/ has one" in refused(tmp_path, capsys)
    (tmp_path / "empty").mkdir()
    assert "is no model: it can not be loaded without a config.json" in refused(tmp_path / "empty", capsys)


def _said(path) -> str:
    with pytest.raises(ValueError) as error:
        load_shapes(str(path))
    return str(error.value)


def test_c49_files_that_are_damaged_or_not_fetched(model, capsys):
    """The kind: as above."""
    (model / "model.safetensors.index.json").write_text("[]")
    assert "has a damaged model.safetensors.index.json: it must be a JSON object" in refused(model, capsys)
    (model / "model.safetensors.index.json").write_text('{"weight_map": null}')
    assert "has a damaged model.safetensors.index.json: its weight_map" in refused(model, capsys)
    (model / "model.safetensors.index.json").unlink()
    kept = (model / "generation_config.json").read_text()
    (model / "generation_config.json").write_text("{")
    assert "has a damaged generation_config.json" in refused(model, capsys)
    (model / "generation_config.json").write_text(kept)
    (model / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "holds a pointer of Git LFS in place of tokenizer.json" in refused(model, capsys)


def test_c49_weights_that_the_config_has_no_place_for(model):
    """The kind: as above, seen when weights are loaded: a part of a model would be trained as another one."""
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 1}
    config.pop("layer_types", None)
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"holds 12 weights for which a Qwen2ForCausalLM of its config has no place"):
        load_policy(str(model))


def test_c49_weights_that_are_not_finite(model):
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][:] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="gives log-probabilities that are not finite; are its weights damaged"):
        load_policy(str(model))

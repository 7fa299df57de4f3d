"""Loading: dtypes by precision, and one clear line for what cannot be loaded."""

import json

import pytest
import torch
from lightning.pytorch import Trainer

from tests.tiny import save_tiny_model, tiny_config
from zo_lightning.modules import CausalLMClassificationModule, ModelError, load_causal_lm, weights_dtype

DTYPES = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,
}


@pytest.fixture(scope="module")
def half_checkpoint(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("half"), tiny_config("opt"), torch.float16)


@pytest.mark.parametrize(("precision", "dtype"), DTYPES.items())
def test_dtype_of_the_weights_follows_the_precision(precision, dtype, half_checkpoint, tmp_path):
    assert weights_dtype(precision) == dtype
    module = CausalLMClassificationModule(str(half_checkpoint))
    module.trainer = Trainer(precision=precision, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    module.configure_model()
    assert {p.dtype for p in module.parameters()} == {dtype}


def test_loads_under_the_trainers_device_context(tiny_opt):
    """Lightning calls configure_model under `with torch.device("cuda")`, where transformers would ask for accelerate."""
    with torch.device("meta"):
        model = load_causal_lm(str(tiny_opt), torch.float32)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_unknown_name_says_what_was_tried(monkeypatch):
    with pytest.raises(ModelError, match=r"cannot load the model 'no/such'.*no folder '.*no/such'.*hub answered"):
        load_causal_lm("no/such", torch.float32)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"cannot load a model from the folder"):
        load_causal_lm(str(tmp_path), torch.float32)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "t5"}, "an encoder-decoder"),
        ({"model_type": "bert"}, "an encoder trained with masked tokens"),
        ({"model_type": "roberta"}, "an encoder trained with masked tokens"),
        ({"model_type": "vit"}, "not a causal language model"),
    ],
)
def test_models_that_are_not_decoders(config, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=reason) as caught:
        load_causal_lm(str(tmp_path), torch.float32)
    assert "\n" not in str(caught.value)

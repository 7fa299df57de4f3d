"""Loading: dtypes by precision, and one clear line for what cannot be loaded."""

import json

import pytest
import torch
from lightning.pytorch import Trainer

from tests.tiny import save_tiny_model, tiny_config
from zo_lightning.modules import CausalLMClassificationModule, ModelError, load_causal_lm, pretrained, weights_dtype
from zo_lightning.modules.pretrained import Placement, execution_device, is_immovable

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


# ---- quantised and spread over devices -------------------------------------------------------------------------------------
class LoadedError(Exception):
    """Stands for a model that was loaded; holds how."""


@pytest.fixture
def asked(monkeypatch):
    """What ``from_pretrained`` is asked for, without the libraries that it would need."""

    def refuse(name, **options):
        raise LoadedError(options)

    monkeypatch.setattr(pretrained.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(pretrained, "_need", lambda package, what: None)

    def ask(*args, **kwargs) -> dict:
        with pytest.raises(LoadedError) as caught:
            load_causal_lm(*args, **kwargs)
        return caught.value.args[0]

    return ask


def test_eight_bits(asked, tiny_opt):
    options = asked(
        str(tiny_opt), torch.float16, quantization={"load_in_8bit": True, "llm_int8_threshold": 4.0}, device=torch.device("cpu")
    )
    made = options["quantization_config"]
    assert type(made).__name__ == "BitsAndBytesConfig"
    assert (made.load_in_8bit, made.load_in_4bit, made.llm_int8_threshold) == (True, False, 4.0)
    assert options["device_map"] == {"": torch.device("cpu")}
    assert options["dtype"] == torch.float16


def test_four_bits_compute_in_the_dtype_of_the_weights(asked, tiny_opt):
    given = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    made = asked(str(tiny_opt), torch.bfloat16, quantization=given)["quantization_config"]
    assert (made.load_in_4bit, made.bnb_4bit_quant_type, made.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert made.bnb_4bit_compute_dtype == torch.bfloat16
    given["bnb_4bit_compute_dtype"] = "float32"  # as YAML can say it
    assert (
        asked(str(tiny_opt), torch.bfloat16, quantization=given)["quantization_config"].bnb_4bit_compute_dtype == torch.float32
    )


def test_a_quantised_model_may_be_placed_too(asked, tiny_opt):
    options = asked(
        str(tiny_opt),
        torch.float16,
        quantization={"load_in_8bit": True},
        placement=Placement("auto", {"0": "6GiB", "cpu": "9GiB"}),
    )
    assert options["device_map"] == "auto"
    assert options["max_memory"] == {0: "6GiB", "cpu": "9GiB"}


def test_placement(asked, tiny_opt):
    options = asked(str(tiny_opt), torch.float16, placement=Placement("auto", {0: "6GiB"}, "somewhere"))
    assert (options["device_map"], options["max_memory"], options["offload_folder"]) == ("auto", {0: "6GiB"}, "somewhere")
    assert (
        not {"device_map", "max_memory", "offload_folder"} & asked(str(tiny_opt), torch.float16, placement=Placement()).keys()
    )


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"load_in_3bit": True}, "BitsAndBytesConfig has no argument 'load_in_3bit'"),
        ({"llm_int8_threshold": 6.0}, "say load_in_8bit: true or load_in_4bit: true"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "quantization: "),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat61"}, "quantization: .*bfloat61"),
    ],
)
def test_wrong_quantization(quantization, message, asked, tiny_opt):
    with pytest.raises(ModelError, match=message):
        load_causal_lm(str(tiny_opt), torch.float16, quantization=quantization)


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [("bitsandbytes", {"quantization": {"load_in_8bit": True}}), ("accelerate", {"placement": Placement("auto")})],
)
def test_missing_library(missing, arguments, tiny_opt, monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None if name == missing else True)
    with pytest.raises(ModelError, match=rf"need {missing}: pip install 'zo-lightning\[quantization\]'"):
        load_causal_lm(str(tiny_opt), torch.float16, **arguments)


def test_a_plain_model_may_be_moved(tiny_opt):
    model = load_causal_lm(str(tiny_opt), torch.float32)
    assert not is_immovable(model)
    assert execution_device(model) == torch.device("cpu")
    model.register_buffer("steps", torch.zeros(1, dtype=torch.int64))  # not a weight
    assert not is_immovable(model)

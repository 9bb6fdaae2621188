"""Backbones and processors by name, and what is said when a name, a folder or its weights are no good."""

import json
import pickle
import sys
import warnings
from pathlib import Path

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerFast,
    SwinConfig,
    SwinModel,
    T5Config,
    T5ForConditionalGeneration,
    T5Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from sidestep.backbone import new_parameters
from sidestep.backbone.load import load_backbone, load_class
from sidestep.backbone.processors import TimmProcessor, load_processor
from sidestep.backbone.source import LoadError, LoadWarning, Source, source_of

BERT = BertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
)
VIT = ViTConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=16,
    patch_size=8,
)
SWIN = SwinConfig(embed_dim=8, depths=[2, 2], num_heads=[1, 2], image_size=32, window_size=4)
T5 = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)


@pytest.fixture
def bert(tmp_path):
    BertForMaskedLM(BERT).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "good": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


# --- transformers ------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_without_noise(bert, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoadWarning)
        model = load_backbone(bert)
    assert type(model) is BertModel
    assert not model.training
    assert new_parameters(model) == {"pooler.dense.weight", "pooler.dense.bias"}
    expected = AutoModel.from_pretrained(bert)
    ids = torch.arange(6).view(1, 6)
    capfd.readouterr()
    load_backbone(bert)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(model(ids).last_hidden_state, expected.eval()(ids).last_hidden_state)


def test_a_head_of_its_own_is_chosen_by_what_the_model_reads(bert, tmp_path):
    assert type(load_backbone(bert, head=True, num_labels=4)).__name__ == "BertForSequenceClassification"
    ViTModel(VIT).save_pretrained(tmp_path / "vit")
    model = load_backbone(tmp_path / "vit", head=True, num_labels=4)
    assert type(model) is ViTForImageClassification
    assert model.classifier.out_features == 4


def test_a_classifier_of_another_size_is_new(tmp_path):
    ViTForImageClassification(VIT).save_pretrained(tmp_path / "vit")
    model = load_backbone(tmp_path / "vit", head=True, num_labels=5)
    assert new_parameters(model) == {"classifier.weight", "classifier.bias"}
    assert model.classifier.out_features == 5


def test_the_encoder_decoders_base_class_is_loaded(tmp_path):
    T5ForConditionalGeneration(T5).save_pretrained(tmp_path / "t5")
    assert type(load_backbone(tmp_path / "t5")) is T5Model


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_dtype_is_the_checkpoints_own_unless_given(bert, tmp_path, dtype):
    assert load_backbone(bert).dtype == torch.float32
    half = load_backbone(bert, dtype=dtype)
    assert half.dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "half")
    assert load_backbone(tmp_path / "half").dtype == torch.bfloat16


def test_the_source_is_the_name_that_was_given(bert):
    source = source_of(load_backbone(bert, dtype="bfloat16"))
    assert source == Source(
        id=str(bert), revision=None, class_name="BertModel", library="transformers", dtype="bfloat16"
    )
    assert source_of(BertModel(BERT)).id == ""


def test_weights_of_the_backbone_that_are_missing_are_named(bert):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.warns(LoadWarning, match=r"16 of 55 weights of BertModel are not in .* random: encoder\.layer\.2"):
        load_backbone(bert)


def test_an_unknown_folder_or_id_is_named(offline):
    for name, said in (("no-such/model", "as a hub id its config"), ("./no/such/folder", "it is no hub id")):
        with pytest.raises(LoadError, match=f"'{name}' cannot be loaded: there is no such folder here, and {said}"):
            load_backbone(name)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoadError, match=r"file is a file: give the folder that holds config\.json"):
        load_backbone(tmp_path / "file")


def test_a_folder_without_config_is_named(bert):
    (bert / "config.json").unlink()
    with pytest.raises(LoadError, match=r"has no config\.json: give a folder.*it holds model\.safetensors"):
        load_backbone(bert)


def test_a_folder_without_weights_says_what_was_looked_for(bert):
    (bert / "model.safetensors").unlink()
    with pytest.raises(
        LoadError,
        match=r"no weights: looked for model\.safetensors and model\.safetensors\.index\.json \(it holds",
    ):
        load_backbone(bert)
    torch.save({}, bert / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"pytorch_model\.bin is a pickle, which is not read"):
        load_backbone(bert)


def test_truncated_weights_are_named(bert):
    weights = bert / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(LoadError, match=r"the weights of .* cannot be read \(.*copy it again"):
        load_backbone(bert)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("{nope", "not a valid JSON file"),
        ('{"model_type": "zork"}', "model type `zork`"),
        ("{}", "Unrecognized model"),
    ],
)
def test_an_unreadable_config_is_named(bert, config, reason):
    (bert / "config.json").write_text(config)
    with pytest.raises(LoadError, match=rf"the config\.json of .* cannot be read \(.*{reason}"):
        load_backbone(bert)


def test_weights_of_another_architecture_are_refused(bert):
    save_file({"zork": torch.zeros(2)}, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"no weight of .* matches BertModel \(it has zork, and BertModel needs"):
        load_backbone(bert)


def test_weights_of_another_size_are_refused(bert):
    weights = load_file(bert / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    save_file({**weights, name: torch.zeros(7, 16)}, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"word_embeddings\.weight has shape \(7, 16\), but BertModel needs \(50, 16\)"):
        load_backbone(bert)


def test_settings_that_make_no_sense_are_refused(bert, tmp_path):
    with pytest.raises(LoadError, match="num_labels=3 without head=True"):
        load_backbone(bert, num_labels=3)
    with pytest.raises(LoadError, match="dtype='int8': choose float32"):
        load_backbone(bert, dtype="int8")
    source = source_of(load_backbone(bert))
    with pytest.raises(LoadError, match="has no model class ZorkModel"):
        load_class(source, class_name="ZorkModel", config={})


# --- processors --------------------------------------------------------------------------------------------


def test_the_processor_is_chosen_by_what_the_model_reads(bert, tmp_path):
    save_tokenizer(bert)
    assert load_processor(bert)("good")["input_ids"] == [1]
    ViTModel(VIT).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    image = PIL.Image.new("RGB", (20, 20))
    pixels = load_processor(tmp_path / "vit")(images=[image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)


def test_a_processor_alone_in_a_folder_is_found(tmp_path):
    save_tokenizer(tmp_path / "text")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "image")
    assert load_processor(tmp_path / "text")("good")["input_ids"] == [1]
    assert load_processor(tmp_path / "image").size["height"] == 16


def test_a_folder_without_a_processor_is_named(bert, tmp_path, offline):
    with pytest.raises(LoadError, match=r"has no tokenizer: looked for tokenizer\.json.*it holds config\.json"):
        load_processor(bert)
    ViTModel(VIT).save_pretrained(tmp_path / "vit")
    with pytest.raises(LoadError, match=r"has no image processor: looked for preprocessor_config\.json"):
        load_processor(tmp_path / "vit")
    with pytest.raises(LoadError, match="there is no such folder here"):
        load_processor(tmp_path / "no")


# --- timm --------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit")
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    return model, tmp_path / "vit.safetensors"


def test_timm_weights_come_from_a_file(weights):
    whole, file = weights
    model = load_backbone(f"timm:test_vit@{file}")
    state = whole.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.num_classes == 0
    assert not model.training
    source = source_of(model)
    assert source.id == f"timm:test_vit.r160_in1k@{file}"
    assert (source.library, source.class_name, source.dtype) == ("timm", "VisionTransformer", "float32")
    again = load_class(source, class_name="", config={"num_classes": 0}, dtype="bfloat16")
    assert again.patch_embed.proj.weight.dtype == torch.bfloat16


def test_a_timm_head_of_another_size_is_new(weights):
    whole, file = weights
    model = load_backbone(f"timm:test_vit@{file}", head=True, num_labels=5)
    assert model.head.out_features == 5
    assert torch.equal(model.norm.weight, whole.norm.weight)
    same = load_backbone(f"timm:test_vit@{file}", head=True)
    assert torch.equal(same.head.weight, whole.head.weight)


def test_timm_weights_of_another_model_are_refused(weights, tmp_path):
    whole, _ = weights
    state = whole.state_dict()
    for name, bad in (("zork", {"zork": torch.zeros(2)}), ("part", dict(list(state.items())[:4]))):
        save_file(bad, tmp_path / f"{name}.safetensors")
        with pytest.raises(LoadError, match=r"do not fit test_vit: \d+ of \d+ are missing.*of another model"):
            load_backbone(f"timm:test_vit@{tmp_path / name}.safetensors")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("timm:", "write timm:NAME, or timm:NAME@FILE"),
        ("timm:test_vit@", "write timm:NAME, or timm:NAME@FILE"),
        ("timm:no_such_vit@{file}", r"cannot be loaded \(Unknown model \(no_such_vit\)\)"),
        ("timm:test_vit@{folder}/no.safetensors", "there is no file"),
        ("timm:test_vit@{folder}/pickled.pth", r"read from \.safetensors and \.npz files only, not from pickled\.pth"),
        ("timm:test_vit@{folder}/short.safetensors", "cannot be read"),
    ],
)
def test_a_bad_timm_name_is_refused(weights, tmp_path, name, text):
    _, file = weights
    (tmp_path / "pickled.pth").write_bytes(b"x")
    (tmp_path / "short.safetensors").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(LoadError, match=text):
        load_backbone(name.format(file=file, folder=tmp_path))


def test_a_timm_model_that_the_hub_does_not_give_is_named(offline):
    pytest.importorskip("timm")
    with pytest.raises(LoadError, match=r"'timm:test_vit' cannot be loaded .*timm:NAME@FILE"):
        load_backbone("timm:test_vit")
    with pytest.raises(LoadError, match=r"revision='main': timm names its versions by tag"):
        load_backbone("timm:test_vit", revision="main")


def test_drop_path_has_the_rate_that_is_asked_for(weights, tmp_path):
    _, file = weights
    rates = drop_path_rates(load_backbone(f"timm:test_vit@{file}", drop_path=0.3))
    depth = len(load_backbone(f"timm:test_vit@{file}").blocks)
    # of each block's two, and none in the first block, whose rate is 0
    assert rates == pytest.approx([0.3 * block / (depth - 1) for block in range(1, depth) for _ in range(2)])
    SwinModel(SWIN).save_pretrained(tmp_path / "swin")
    rates = drop_path_rates(load_backbone(tmp_path / "swin", drop_path=0.3))
    assert (rates[0], rates[-1]) == (pytest.approx(0.1), pytest.approx(0.3))
    assert drop_path_rates(load_backbone(tmp_path / "swin"))[-1] == pytest.approx(0.1)  # transformers' own default
    assert drop_path_rates(load_backbone(tmp_path / "swin", drop_path=0.0)) == []


def drop_path_rates(model: torch.nn.Module) -> list[float]:
    """The rates of a model's drop paths, in order."""
    found = [module.drop_prob for module in model.modules() if "DropPath" in type(module).__name__]
    return [rate for rate in found if rate]


def test_a_drop_path_that_a_model_does_not_have_is_warned_of(tmp_path):
    ViTModel(VIT).save_pretrained(tmp_path / "vit")
    with pytest.warns(
        LoadWarning, match=r"drop_path=0\.1 is left out: .* transformers' 'vit' model, .* timm:NAME@FILE"
    ):
        load_backbone(tmp_path / "vit", drop_path=0.1)
    load_backbone(tmp_path / "vit", drop_path=0.0)  # nothing is left out
    with pytest.raises(LoadError, match=r"drop_path=1: it is a rate from 0 to below 1"):
        load_backbone(tmp_path / "vit", drop_path=1)


def test_timm_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(LoadError, match=r"timm cannot be imported .*sidestep\[vision\].*built for torch"):
        load_backbone("timm:test_vit")


def test_the_timm_processor_is_timms_own_transform(weights, tmp_path):
    import timm

    model, _ = weights
    processor = load_processor("timm:test_vit")
    assert processor == TimmProcessor.of(model)
    image = PIL.Image.effect_noise((200, 180), 50).convert("RGB")
    config = timm.data.resolve_model_data_config(model)
    expected = timm.data.create_transform(**config, is_training=False)(image)
    pixels = processor(images=[image, image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 160, 160)
    assert torch.equal(pixels[0], expected)
    assert pickle.loads(pickle.dumps(processor)) == processor
    processor.save_pretrained(tmp_path / "processor")
    assert load_processor(tmp_path / "processor") == processor
    with pytest.raises(LoadError, match="has no model"):
        load_processor("timm:no_such_vit")


def test_a_damaged_timm_processor_is_named(tmp_path):
    (tmp_path / "timm_processor.json").write_text('{"input_size": [3, 8, 8]}')
    with pytest.raises(LoadError, match=r"timm_processor\.json cannot be read"):
        load_processor(tmp_path)

"""The original ViT's .npz weights: both layouts agree with timm's own reading of them, and what is refused."""

import zipfile

import numpy as np
import pytest
import torch
from transformers import ViTForImageClassification, ViTModel

import sidestep as ss
from sidestep.backbone import new_parameters
from sidestep.backbone.load import load_backbone, load_class
from sidestep.backbone.processors import load_processor
from sidestep.backbone.source import LoadError, source_of
from sidestep.backbone.vit_npz import NpzError, ViTSizes, read_sizes, read_vit
from sidestep.disk import task_folder
from sidestep.tasks import load as loading

WIDTH, DEPTH, HEADS, MLP, PATCH, IMAGE = 24, 3, 4, 40, 4, 20
CLASSES = 6
TIMM = "vit_tiny_patch16_224"
TIMM_SHAPE = {
    "img_size": IMAGE,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "mlp_ratio": MLP / WIDTH,
}


def official(classes: int | None = CLASSES, *, pre_logits: bool = True, depth: int = DEPTH) -> dict[str, np.ndarray]:
    """Random arrays under the names of google-research/vision_transformer's checkpoints."""
    chance = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return chance.normal(0, 0.3, shape).astype(np.float32)

    def dense(name: str, *kernel: int, bias: tuple[int, ...] | None = None) -> dict[str, np.ndarray]:
        return {f"{name}/kernel": draw(*kernel), f"{name}/bias": draw(*(bias or kernel[-1:]))}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {f"{name}/scale": 1 + draw(WIDTH), f"{name}/bias": draw(WIDTH)}

    each = WIDTH // HEADS
    arrays = {
        "cls": draw(1, 1, WIDTH),
        **dense("embedding", PATCH, PATCH, 3, WIDTH),
        "Transformer/posembed_input/pos_embedding": draw(1, (IMAGE // PATCH) ** 2 + 1, WIDTH),
        **norm("Transformer/encoder_norm"),
    }
    for index in range(depth):
        block = f"Transformer/encoderblock_{index}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        arrays |= norm(f"{block}/LayerNorm_0") | norm(f"{block}/LayerNorm_2")
        for part in ("query", "key", "value"):
            arrays |= dense(f"{attention}/{part}", WIDTH, HEADS, each, bias=(HEADS, each))
        arrays |= dense(f"{attention}/out", HEADS, each, WIDTH)
        arrays |= dense(f"{block}/MlpBlock_3/Dense_0", WIDTH, MLP) | dense(f"{block}/MlpBlock_3/Dense_1", MLP, WIDTH)
    if pre_logits:
        arrays |= dense("pre_logits", WIDTH, WIDTH)
    if classes:
        arrays |= dense("head", WIDTH, classes)
    return arrays


@pytest.fixture
def file(tmp_path):
    np.savez(tmp_path / "vit.npz", **official())
    return tmp_path / "vit.npz"


@pytest.fixture
def timm_vit(monkeypatch):
    """timm's ViT, made in the file's sizes whatever its name says."""
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def small(name, **given):
        return create(name, **{**TIMM_SHAPE, **given})

    monkeypatch.setattr(timm, "create_model", small)
    return small


def images(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(3))


def test_sizes_are_read_from_the_shapes(file):
    sizes = ViTSizes(width=WIDTH, depth=DEPTH, heads=HEADS, mlp_width=MLP, patch=PATCH, image=IMAGE, channels=3)
    assert read_sizes(file) == sizes
    config = load_backbone(f"vit:{file}").config
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (WIDTH, HEADS, DEPTH)
    assert (config.image_size, config.patch_size, config.layer_norm_eps) == (IMAGE, PATCH, 1e-6)


def test_both_layouts_give_what_timms_own_loader_gives(file, timm_vit):
    oracle = timm_vit(TIMM, num_classes=0).eval()
    oracle.load_pretrained(str(file))
    pixels = images()
    with torch.no_grad():
        expected = oracle.forward_features(pixels)
        timm_layout = load_backbone(f"timm:{TIMM}@{file}").forward_features(pixels)
        transformers_layout = load_backbone(f"vit:{file}")(pixel_values=pixels).last_hidden_state
    assert torch.equal(timm_layout, expected)
    torch.testing.assert_close(transformers_layout, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1


def test_pre_logits_are_the_pooler_and_then_the_head_is_left_out(file, capfd):
    model = load_backbone(f"vit:{file}")
    assert capfd.readouterr() == ("", "")  # no bar, no report
    assert type(model) is ViTModel
    assert new_parameters(model) == set()
    kernel = torch.from_numpy(official()["pre_logits/kernel"])
    assert torch.equal(model.pooler.dense.weight, kernel.T)
    own = load_backbone(f"vit:{file}", head=True, num_labels=CLASSES)
    assert new_parameters(own) == {"classifier.weight", "classifier.bias"}


def test_a_head_without_pre_logits_is_loaded_where_it_fits(tmp_path, timm_vit):
    path = tmp_path / "tuned.npz"
    arrays = official(pre_logits=False)
    np.savez(path, **arrays)
    kernel = torch.from_numpy(arrays["head/kernel"]).T
    own = load_backbone(f"vit:{path}", head=True, num_labels=CLASSES)
    assert type(own) is ViTForImageClassification
    assert new_parameters(own) == set()
    assert torch.equal(own.classifier.weight, kernel)
    assert new_parameters(load_backbone(f"vit:{path}", head=True, num_labels=3)) == {
        "classifier.weight",
        "classifier.bias",
    }
    assert new_parameters(load_backbone(f"vit:{path}")) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert torch.equal(load_backbone(f"timm:{TIMM}@{path}", head=True, num_labels=CLASSES).head.weight, kernel)
    assert load_backbone(f"timm:{TIMM}@{path}", head=True, num_labels=3).head.weight.shape == (3, WIDTH)


@pytest.mark.parametrize("layout", ["vit:", f"timm:{TIMM}@"])
def test_a_saved_task_finds_the_file_again(file, timm_vit, tmp_path, layout):
    torch.manual_seed(0)
    model = ss.attach(load_backbone(f"{layout}{file}"), ss.ReadConfig(rank=4), head=ss.Classify(num_labels=3)).eval()
    assert source_of(model.backbone).id.endswith(f"@{file}" if "@" in layout else f"vit:{file}")
    model.save_pretrained(tmp_path / "task")
    if "timm" in layout:  # a name says timm's usual sizes: these are the test's
        again = loading.load(tmp_path / "task", backbone=load_backbone(f"{layout}{file}"))
    else:
        again = loading.load(tmp_path / "task")
    with torch.no_grad():
        assert torch.equal(again(pixel_values=images()).logits, model(pixel_values=images()).logits)
    np.savez(file, **{name: array + 0.1 for name, array in official().items()})
    with pytest.raises(task_folder.TaskError, match=r"other weights|digest|another"):
        loading.load(tmp_path / "task", backbone=load_backbone(f"{layout}{file}"))


def test_a_plan_needs_the_shapes_only(file):
    planned = ss.plan(f"vit:{file}", ss.ReadConfig(rank=4), batch=2)
    assert planned.total_bytes > planned.peak_bytes > 0


def test_precision_and_processor(file):
    assert load_backbone(f"vit:{file}").dtype == torch.float32
    half = load_backbone(f"vit:{file}", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert load_class(source_of(half), class_name="ViTModel", dtype="bfloat16", config={}).dtype == torch.bfloat16
    processor = load_processor(f"vit:{file}")
    assert (processor.size["height"], tuple(processor.image_mean), tuple(processor.image_std)) == (
        IMAGE,
        (0.5,) * 3,
        (0.5,) * 3,
    )


# --- files that are no good --------------------------------------------------------------------------------


def without(*names: str) -> dict[str, np.ndarray]:
    return {name: array for name, array in official().items() if name not in names}


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"weight": np.zeros(3)}, r"lacks Transformer/encoderblock_0/MlpBlock_3.* and has, .* weight"),
        (without("cls"), r"it lacks cls and has, beyond what is read, nothing"),
        (
            {**official(), "conv_root/kernel": np.zeros(3), "gn_root/scale": np.zeros(3)},
            r"lacks nothing and has, beyond what is read, conv_root/kernel, gn_root/scale",
        ),
        (
            without("Transformer/encoderblock_1/LayerNorm_0/scale"),
            r"lacks Transformer/encoderblock_1/LayerNorm_0/scale",
        ),
        (
            {**official(), "Transformer/encoderblock_2/MlpBlock_3/Dense_0/kernel": np.zeros((WIDTH, 7))},
            r"do not fit each other \(Transformer/encoderblock_2/MlpBlock_3/Dense_0/kernel \(24, 7\)\)",
        ),
        (
            {**official(), "Transformer/posembed_input/pos_embedding": np.zeros((1, 24, WIDTH), np.float32)},
            r"4 x 4 and 24 positions: only square patches",
        ),
        ({**official(), "cls": np.array([object()])}, r"cannot be read \(Object arrays cannot be loaded"),
    ],
    ids=["other", "no class token", "hybrid", "a hole", "shapes", "grid", "pickled"],
)
def test_an_archive_of_another_architecture_is_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(NpzError, match=said):
        read_vit(tmp_path / "other.npz")
    with pytest.raises(LoadError, match=said):
        load_backbone(f"vit:{tmp_path / 'other.npz'}")


def test_a_file_that_is_no_archive_is_named(file, tmp_path):
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    for name, content, said in (
        ("empty.npz", b"", r"empty\.npz \(0 bytes\) is no \.npz archive"),
        ("text.npz", b"hello", r"text\.npz \(5 bytes\) is no \.npz archive"),
        ("short.npz", whole[:2000], r"short\.npz \(2000 bytes\) is no \.npz archive, or was cut short"),
        ("damaged.npz", bytes(damaged), r"damaged\.npz cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LoadError, match=said):
            load_backbone(f"vit:{tmp_path / name}")
    with pytest.raises(LoadError, match="there is no file"):
        load_backbone("vit:nowhere.npz")
    with pytest.raises(LoadError, match="there is no file"):
        load_processor("vit:nowhere.npz")
    with zipfile.ZipFile(tmp_path / "photos.npz", "w") as archive:
        archive.writestr("a.txt", "no array")
    with pytest.raises(LoadError, match="is no Vision Transformer as google-research"):
        load_backbone(f"vit:{tmp_path / 'photos.npz'}")


def test_an_archive_of_another_size_does_not_fit_a_timm_model(file):
    pytest.importorskip("timm")
    with pytest.raises(LoadError, match=r"do not fit vit_tiny_patch16_224: .* are missing, .* have another shape"):
        load_backbone(f"timm:{TIMM}@{file}")


def test_a_revision_of_a_file_is_refused(file):
    with pytest.raises(LoadError, match=r"revision='main': vit:.* is a file, which has no revisions"):
        load_backbone(f"vit:{file}", revision="main")

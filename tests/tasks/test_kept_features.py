"""Runs whose frozen part is stored are live runs, but that the frozen part runs once, or not at all the second time."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_pair_processor, load_processor
from sidestep.data import Fields, read
from sidestep.data.media import Medium
from sidestep.data.pairs import captioned
from sidestep.disk import features as store_of_states
from sidestep.disk.feature_options import FeatureOptions, default_folder
from sidestep.disk.features import FeatureError, FeatureStore, OverLimit, name_of
from sidestep.kinds import features as stored_rows
from sidestep.kinds.features import LOOKED_AT, Features
from sidestep.kinds.prepare import prepare
from sidestep.kinds.running import logits
from sidestep.kinds.task_data import TaskData
from sidestep.measure.step import accepted
from sidestep.methods import MethodConfig
from sidestep.model.features import VECTOR
from sidestep.model.heads import Retrieve
from sidestep.tasks import features as keeping
from sidestep.tasks import predict
from sidestep.tasks.features import FeatureWarning, Kept, kept_features
from sidestep.training.results import Results
from sidestep.training.settings import TrainSettings
from sidestep.training.train import head_for, train
from small_tasks import (
    SPECIAL,
    WORDS,
    image_backbone,
    image_folder,
    padless_backbone,
    reviews,
    text_backbone,
    tokenizer,
)
from written_tasks import answered, llama_backbone, t5_backbone

READ = ss.ReadConfig(rank=8)
TEXT = Fields(text="text", label="label")
IMAGE = Fields(image="image", label="label")
PLENTY = 2**30
METHODS: dict[str, MethodConfig] = {
    "read": READ,
    "lst": ss.LSTConfig(),
    "sherl": ss.SherlConfig(reduction=4),
    "dtl": ss.DTLConfig(rank=2, late_blocks=1),
    "probe": ss.ProbeConfig(),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with backbones and pictures."""
    folder = tmp_path_factory.mktemp("kept")
    text_backbone(folder / "bert")
    text_backbone(folder / "another bert", seed=1)
    padless_backbone(folder / "llama")
    image_backbone(folder / "vit")
    t5_backbone(folder / "text2text")
    llama_backbone(folder / "lm")
    image_folder(folder / "pictures", per_class=10)
    return folder


def rows(count: int = 48, seed: int = 0) -> Dataset:
    return Dataset.from_list(reviews(count, seed))


READ_BEFORE: dict[str, TaskData] = {}


def data_of(place: Path, backbone: str = "bert", **how: Any) -> TaskData:
    if how:
        return prepared(place, backbone, **how)
    if backbone not in READ_BEFORE:
        READ_BEFORE[backbone] = prepared(place, backbone)
    return READ_BEFORE[backbone]


def prepared(place: Path, backbone: str, **how: Any) -> TaskData:
    processor = load_processor(place / backbone)
    if backbone == "vit":
        return prepare(read(place / "pictures"), None, IMAGE, processor, dev_fraction=0.25, **how)
    if backbone in ("text2text", "lm"):
        parts = (Dataset.from_list(answered(count, seed)) for count, seed in ((32, 0), (12, 1)))
        return prepare(*parts, Fields(text="text", label="answer"), processor, kind=backbone, **how)
    return prepare(how.pop("train", rows()), how.pop("dev", rows(20, 1)), how.pop("fields", TEXT), processor, **how)


def attached(
    place: Path, data: TaskData, method: MethodConfig = READ, backbone: str = "bert", seed: int = 0, **how: Any
) -> ss.SideModel:
    torch.manual_seed(seed)
    writes = data.labels.kind if data.generation is not None else None
    return ss.attach(load_backbone(place / backbone, writes=writes), method, head=head_for(data), **how)


@dataclass
class Run:
    model: ss.SideModel
    results: Results
    told: list[str]

    @property
    def losses(self) -> list[float]:
        return [entry[name] for entry in self.results.history for name in ("train_loss", "dev_loss")]

    @property
    def computed(self) -> int:
        assert self.results.features is not None
        return self.results.features["computed"]


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Callable[..., Run]:
    """Trains from the same start, and stores in the folder "features" of the test."""
    number = iter(range(100))

    def run(
        features: str,
        data: TaskData,
        method: MethodConfig = READ,
        backbone: str = "bert",
        *,
        store: FeatureStore | None = None,
        attach: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Run:
        told: list[str] = []
        how: dict[str, Any] = {"epochs": 2, "batch_size": 8, "learning_rate": 0.02, "progress": False, "log_steps": 2}
        how |= {"measure": False, "keep": "last", "checkpoints": False, "features_folder": tmp_path / "features"}
        settings = TrainSettings(output=tmp_path / f"task {next(number)}", features=features, **{**how, **changes})
        model = attached(place, data, method, backbone, settings.seed, **(attach or {}))
        return Run(model, train(model, data, settings, tell=told.append, store=store), told)

    return run


def same_runs(one: Run, other: Run, data: TaskData, tolerance: float = 1e-5) -> None:
    assert one.losses == pytest.approx(other.losses, abs=tolerance, rel=0)
    assert one.results.scores == pytest.approx(other.results.scores, abs=tolerance)
    if data.generation is None:
        first, second = (outputs(each.model, data) for each in (one, other))
        assert (first.argmax(1) == second.argmax(1)).all()
        assert first == pytest.approx(second, abs=10 * tolerance)


def outputs(model: ss.SideModel, data: TaskData) -> NDArray[Any]:
    """Logits of the dev rows, by live passes."""
    return logits(model, data.dev, data.fields)


def held(folder: Path) -> int:
    """Bytes of the states in a folder."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name != "rows" and not name.endswith("#tokens")]  # noqa: SIM118
            total += sum(file.get_tensor(name).nbytes for name in names)
    return total


def options(where: str, folder: Path | None = None, **how: Any) -> FeatureOptions:
    return FeatureOptions(where=where, folder=folder, **how)


def keep(
    model: Any, data: TaskData, how: FeatureOptions, tell: Any = None, passes: float = 3, **more: Any
) -> Kept | None:
    return kept_features(model, data, how, passes=passes, batch_size=8, tell=tell, **{"autocast": False, **more})


@pytest.fixture
def computed(place: Path, tmp_path: Path) -> Callable[..., int]:
    """How many rows are computed that are not stored in the folder "features" of the test."""

    def computed(data: TaskData, method: MethodConfig = READ, backbone: str = "bert", seed: int = 0, **how: Any) -> int:
        kept = keep(attached(place, data, method, backbone, seed), data, options("disk", tmp_path / "features"), **how)
        assert kept is not None
        return kept.told["computed"]

    return computed


# --- a run from features is a live run ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "method", "where", "changes"),
    [
        ("bert", "read", "ram", {}),
        ("bert", "read", "disk", {"keep": "best", "checkpoints": True, "measure": True}),
        ("bert", "lst", "disk", {"workers": 1}),
        ("bert", "dtl", "ram", {"accumulate": 2}),
        ("bert", "probe", "disk", {}),
        ("llama", "read", "ram", {}),
        ("vit", "dtl", "disk", {}),
        ("text2text", "read", "disk", {}),
        ("lm", "read", "ram", {}),
    ],
)
def test_a_run_from_features_has_the_losses_and_predictions_of_a_live_one(
    run: Callable[..., Run], place: Path, backbone: str, method: str, where: str, changes: dict[str, Any]
) -> None:
    data = data_of(place, backbone)
    live = run("off", data, METHODS[method], backbone, **changes)
    kept = run(where, data, METHODS[method], backbone, **changes)
    assert live.results.features is None
    assert kept.results.features is not None
    assert kept.results.features["where"] == where
    assert kept.computed == kept.results.features["rows"] > 0
    assert live.losses[0] != live.losses[2]
    same_runs(live, kept, data)


def test_regression_on_pairs_of_texts_from_features_is_as_live(run: Callable[..., Run], place: Path) -> None:
    data = data_of(place, fields=Fields(text="text", text2="other", label="score"), kind="regress")
    live, kept = (run(where, data).losses for where in ("off", "disk"))
    assert live == pytest.approx(kept, abs=1e-5)


def test_under_autocast_states_are_those_of_autocast(
    run: Callable[..., Run], computed: Callable[..., int], place: Path
) -> None:
    data = data_of(place)
    live, kept = (run(where, data, bf16=True) for where in ("off", "disk"))
    assert live.losses == pytest.approx(kept.losses, abs=1e-3)
    assert kept.computed == 68
    assert computed(data, autocast=True) == 0
    assert computed(data, autocast=False) == 68


@pytest.mark.parametrize(
    ("backbone", "method", "how"),
    [
        ("bert", "dtl", {"checkpoint": "late"}),
        ("bert", "late_lora", {"checkpoint": "late"}),
        ("bert", "read", {"keep": "replay"}),
        ("llama", "lst", {"keep": "int8"}),
        ("lm", "read", {"lm_loss": "chunked"}),
    ],
)
def test_ways_to_save_memory_change_nothing(
    run: Callable[..., Run], place: Path, backbone: str, method: str, how: dict[str, Any]
) -> None:
    data, config = data_of(place, backbone), {**METHODS, "late_lora": ss.LateLoraConfig(rank=2)}[method]
    live, kept = (run(where, data, config, backbone, attach=how) for where in ("off", "ram"))
    assert kept.computed > 0
    same_runs(live, kept, data)


@pytest.mark.parametrize("backbone", ["bert", "llama"])
def test_texts_that_are_padded_on_the_left_are_as_live(
    run: Callable[..., Run], place: Path, tmp_path: Path, backbone: str
) -> None:
    data = prepared(place, backbone)
    data.processor.padding_side = data.processor.init_kwargs["padding_side"] = "left"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run may pad on the right instead
        live, kept = (run(where, data, METHODS["lst"], backbone) for where in ("off", "disk"))
    assert kept.computed == 68
    same_runs(live, kept, data)


def test_a_backbone_in_half_precision_is_as_live(place: Path, tmp_path: Path) -> None:
    data, losses = data_of(place), []
    how: dict[str, Any] = {"epochs": 2, "batch_size": 8, "learning_rate": 0.02, "progress": False, "measure": False}
    for where in ("off", "disk"):
        torch.manual_seed(0)
        model = ss.attach(load_backbone(place / "bert", dtype="bfloat16"), READ, head=head_for(data))
        found = train(
            model, data, TrainSettings(output=tmp_path / where, features=where, features_folder=tmp_path / "f", **how)
        )
        assert (found.features is not None) == (where == "disk")
        losses.append([entry[name] for entry in found.history for name in ("train_loss", "dev_loss")])
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


@pytest.mark.parametrize("backbone", ["bert", "llama", "vit"])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_that_is_the_recorded_one_has_the_same_loss_bit_for_bit(
    place: Path, backbone: str, method: str
) -> None:
    data = data_of(place, backbone)
    model = attached(place, data, METHODS[method], backbone)
    features = Features.of(model, data, FeatureStore(None, PLENTY), rounded=False, batch_size=4, autocast=False)
    order, count = features.lacking, len(data.train)
    features.fill(progress=False)
    assert not features.lacking
    fed, compared = features.fed(), 0
    for start in range(0, len(order), 4):
        numbers = order[start : start + 4]
        if max(numbers) >= count:
            continue
        losses = []
        for rows in (data, fed):
            batch = rows.collate([rows.train[number] for number in numbers])
            torch.manual_seed(1)
            losses.append(model.train()(**accepted(model, batch)).loss)
        assert torch.equal(*losses)
        compared += 1
    assert compared > 1


def test_the_order_of_rows_and_the_seed_of_noise_are_not_touched(place: Path, tmp_path: Path) -> None:
    data = data_of(place)
    model, before = attached(place, data), torch.get_rng_state()
    mode = model.training
    assert keep(model, data, options("ram")) is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training == mode
    assert all(parameter.grad is None for parameter in model.parameters())


# --- what is stored is used again --------------------------------------------------------------------------------


def other_labels(data: TaskData) -> TaskData:
    turned = [1 - label for label in data.train["labels"][:]]
    return replace(data, train=data.train.remove_columns("labels").add_column("labels", turned))


def test_a_second_run_computes_nothing_also_with_other_seeds_ranks_methods_and_labels(
    run: Callable[..., Run], computed: Callable[..., int], place: Path
) -> None:
    data = data_of(place)
    first = run("disk", data)
    again = run("disk", data, seed=3)
    assert (first.computed, again.computed) == (68, 0)
    assert again.results.features is not None
    assert again.results.features["seconds"] > 0
    assert "features: all 68 rows are stored in" in again.told[0]
    assert again.losses != first.losses
    assert computed(data, ss.ReadConfig(rank=4)) == 0
    assert computed(data, METHODS["lst"]) == 0
    assert computed(data, METHODS["sherl"]) == 0  # it reads fewer places
    assert computed(other_labels(data)) == 0
    found = run("auto", data, METHODS["lst"])
    assert found.results.features is not None
    assert (found.results.features["where"], found.computed) == ("disk", 0)


def test_a_method_that_reads_more_places_computes_them(computed: Callable[..., int], place: Path) -> None:
    data = data_of(place)
    assert [computed(data, METHODS[method]) for method in ("sherl", "read", "read")] == [68, 68, 0]


def test_only_rows_that_are_new_are_computed(computed: Callable[..., int], place: Path) -> None:
    computed(data_of(place))
    more = Dataset.from_list([*reviews(48), *reviews(6, seed=7)])
    new = {row["text"] for row in reviews(6, seed=7)} - {row["text"] for row in [*reviews(48), *reviews(20, 1)]}
    assert len(new) > 3
    assert computed(data_of(place, train=more)) == len(new)


def test_other_weights_lengths_and_texts_are_computed(computed: Callable[..., int], place: Path) -> None:
    computed(data_of(place))
    assert computed(data_of(place, "another bert"), backbone="another bert") == 68
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # texts are cut
        cut = data_of(place, max_length=6)
    assert computed(cut) == sum(
        length > 6 for part in (data_of(place).train, data_of(place).dev) for length in part["length"][:]
    )
    assert computed(data_of(place, train=rows(48, 5), dev=rows(20, 6))) > 40
    assert computed(data_of(place)) == 0


def test_other_answers_of_an_encoder_decoder_are_computed_as_its_decoder_reads_them(
    computed: Callable[..., int], place: Path
) -> None:
    data = data_of(place, "text2text")
    assert computed(data, backbone="text2text") > 0
    assert computed(data, backbone="text2text") == 0
    turned = [{**row, "answer": "bad" if row["answer"] == "very good" else "very good"} for row in answered(32, 0)]
    parts = (Dataset.from_list(turned), Dataset.from_list(answered(12, 1)))
    fields = Fields(text="text", label="answer")
    other = prepare(*parts, fields, load_processor(place / "text2text"), kind="text2text")
    assert computed(other, backbone="text2text") > 20


def test_a_store_in_memory_is_shared_by_runs(
    run: Callable[..., Run], computed: Callable[..., int], place: Path, tmp_path: Path
) -> None:
    data, store = data_of(place), FeatureStore(None, PLENTY)
    assert run("ram", data, store=store).computed == 68
    for method, alone, expected in ((READ, store, 0), (METHODS["lst"], store, 0), (READ, None, 68)):
        kept = keep(attached(place, data, method), data, options("ram"), store=alone)
        assert kept is not None
        assert kept.told["computed"] == expected
    assert not (tmp_path / "features").exists()


# --- what is not true any more -----------------------------------------------------------------------------------


@pytest.fixture
def stale(run: Callable[..., Run], place: Path, monkeypatch: pytest.MonkeyPatch) -> TaskData:
    """States of another backbone lie where those of the backbone are looked for."""
    monkeypatch.setattr(stored_rows, "key_of", lambda *given, **how: {"backbone": "any"})
    run("disk", data_of(place, "another bert"), backbone="another bert")
    return data_of(place)


def test_stale_states_are_found_and_computed_again(
    run: Callable[..., Run], stale: TaskData, caplog: pytest.LogCaptureFixture
) -> None:
    live = run("off", stale)
    with caplog.at_level(logging.WARNING, "sidestep"):
        kept = run("disk", stale)
    assert "stored features are out of date, and are computed again (the state of a row at encoder.block" in caplog.text
    same_runs(live, kept, stale)
    caplog.clear()
    again = run("disk", stale)
    assert not caplog.records
    assert again.computed == 0
    same_runs(live, again, stale)


def test_what_is_computed_again_is_told(run: Callable[..., Run], stale: TaskData) -> None:
    kept = run("disk", stale)
    assert kept.computed == 68
    assert any("68 rows are computed again" in line for line in kept.told)


def test_states_that_are_never_true_are_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = data_of(place)
    model, told = attached(place, data), []
    honest = Features.record

    def noisy(self: Features, numbers: Any) -> Any:
        return {name: [state + torch.randn(()) for state in each] for name, each in honest(self, numbers).items()}

    monkeypatch.setattr(Features, "record", noisy)
    with pytest.raises(ValueError, match=r"--features ram: the state of a row .* Leave --features out"):
        keep(model, data, options("ram"))
    monkeypatch.setattr(keeping, "LEAST", 0.0)
    monkeypatch.setattr(keeping, "GAIN", 1e9)
    assert keep(model, data, options("auto"), told.append) is None
    assert "features: none, as the state of a row" in told[-1]


# --- a full disk, and no room ------------------------------------------------------------------------------------


def test_a_run_goes_on_live_where_the_disk_is_full_in_the_middle(
    run: Callable[..., Run], computed: Callable[..., int], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, left = data_of(place), iter(range(3))
    live = run("off", data)
    save = store_of_states.save_file

    def full(*given: Any, **how: Any) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*given, **how)

    monkeypatch.setattr(store_of_states, "save_file", full)
    monkeypatch.setattr(stored_rows, "SHARD", 1)
    with pytest.warns(FeatureWarning, match=r"the disk of .*features is full\. The run goes on without stored"):
        kept = run("disk", data, eval_batch_size=8)
    assert kept.results.features is None
    same_runs(live, kept, data)
    monkeypatch.undo()
    assert not list((tmp_path / "features").rglob(".*.new"))
    assert computed(data) == 68 - 3 * 8  # what was written before is used


def test_too_low_a_limit_is_an_error_if_asked_for_and_told_if_not(place: Path, tmp_path: Path) -> None:
    data, told = data_of(place), []
    model = attached(place, data)
    for where in ("ram", "disk"):
        for limit, said in ((1000, "more than the limit of"), (20_000, r"features of 68 rows would take .* KiB, and")):
            with pytest.raises(OverLimit, match=said):
                keep(model, data, options(where, tmp_path / "store", limit=limit))
    assert keep(model, data, options("auto", tmp_path / "none", limit=1000), told.append) is None
    assert "features: none, as features in memory would take more than the limit of" in told[0]


def test_a_folder_of_something_else_is_an_error_if_asked_for_and_told_if_not(place: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    data, told = data_of(place), []
    model = attached(place, data)
    with pytest.raises(FeatureError, match="holds other files"):
        keep(model, data, options("disk", tmp_path))
    assert keep(model, data, options("auto", tmp_path), told.append) is None
    assert "features: none, as" in told[0]
    assert "holds other files" in told[0]


def test_auto_goes_on_live_where_the_folder_may_not_be_written(
    run: Callable[..., Run], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(place)
    model, told = attached(place, data), []
    keep(model, data, options("disk", tmp_path))

    def denied(*args: object, **kwargs: object) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    assert keep(model, data, options("auto", tmp_path), told.append) is None
    assert "cannot be written" in told[0]


# --- what cannot be stored ---------------------------------------------------------------------------------------

CHANGES = "changes the backbone's weights, so its states change with each step"


@pytest.mark.parametrize(
    ("method", "how", "said"),
    [
        (ss.LoraConfig(targets=("query", "value")), {}, f"lora {CHANGES}"),
        (ss.FullConfig(), {}, f"full {CHANGES}"),
        (ss.BitFitConfig(), {}, f"bitfit {CHANGES}"),
        (ss.SparseConfig(density=0.05, select="random"), {}, f"sparse {CHANGES}"),
        (READ, {"backbone_noise": "dropout"}, "backbone_noise='dropout': the states are other ones in each epoch"),
    ],
    ids=["lora", "full", "bitfit", "sparse", "noise"],
)
def test_methods_whose_states_change_are_refused_and_told_of(
    place: Path, tmp_path: Path, method: MethodConfig, how: dict[str, Any], said: str
) -> None:
    data = data_of(place)
    with pytest.raises(ValueError, match=f"--features disk: {said}. Leave --features out"):
        keep(attached(place, data, method, **how), data, options("disk", tmp_path / "features"))
    assert not (tmp_path / "features").exists()
    told: list[str] = []
    assert keep(attached(place, data, method, **how), data, options("auto"), told.append) is None
    assert told == [f"features: none, as {said}"]


def test_random_views_are_refused_or_run_live(run: Callable[..., Run], place: Path) -> None:
    data = data_of(place, "vit", augment="flip")
    with pytest.raises(ValueError, match=r"its images are other views in each epoch \(--augment\)"):
        run("ram", data, backbone="vit")
    found = run("auto", data, backbone="vit", epochs=2)
    assert found.results.features is None
    assert "features: none, as its images are other views in each epoch (--augment)" in found.told


def test_retrieval_is_refused_or_runs_live(place: Path, tmp_path: Path) -> None:
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ids = {"vocab_size": len(SPECIAL) + len(WORDS), "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    text = {"hidden_size": 16, "max_position_embeddings": 32, **small, **ids}
    image = {"hidden_size": 24, "image_size": 16, "patch_size": 8, **small}
    CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=8)).save_pretrained(tmp_path / "clip")
    tokenizer(pad=True).save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(tmp_path / "clip")
    fields = Fields(image="image", text="caption")
    pairs = [{"image": f"pictures/dark/{number}.png", "caption": f"a {WORDS[number]} film"} for number in range(8)]
    flat = captioned(Dataset.from_list(pairs), fields, place)
    data = prepare(flat, None, fields, load_pair_processor(str(tmp_path / "clip")), kind="retrieval", dev_fraction=0.25)
    model = ss.attach(CLIPModel.from_pretrained(tmp_path / "clip"), ss.ReadConfig(rank=2), head=Retrieve())
    how: dict[str, Any] = {"epochs": 1, "batch_size": 4, "progress": False, "measure": False, "keep": "last"}
    with pytest.raises(
        ValueError, match="a dual encoder's task is on two backbones at once, whose states are not stored yet"
    ):
        train(model, data, TrainSettings(output=tmp_path / "one", features="ram", **how))
    told: list[str] = []
    found = train(model, data, TrainSettings(output=tmp_path / "two", features="auto", **how), tell=told.append)
    assert found.features is None
    assert any(line.startswith("features: none, as a dual encoder's task is on two backbones at once") for line in told)


class Noisy:
    """An image processor that makes other pixels of a picture each time."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, images: Any, return_tensors: str) -> dict[str, Any]:
        pixels = self.inner(images=images, return_tensors=return_tensors)["pixel_values"]
        return {"pixel_values": pixels + torch.rand(())}


def test_an_image_processor_that_is_random_is_refused(place: Path) -> None:
    data = data_of(place, "vit")
    noisy, told = replace(data, processor=Noisy(data.processor)), []
    model = attached(place, data, backbone="vit")
    with pytest.raises(ValueError, match="its processor makes other inputs of a file each time"):
        keep(model, noisy, options("ram"))
    assert keep(model, noisy, options("auto"), told.append) is None
    assert told == ["features: none, as its processor makes other inputs of a file each time"]


def test_another_image_processor_has_another_key(place: Path, tmp_path: Path) -> None:
    data = data_of(place, "vit")
    model = attached(place, data, backbone="vit")
    how = options("disk", tmp_path / "store")
    assert keep(model, data, how).told["computed"] == 20
    brighter = load_processor(place / "vit")
    brighter.image_mean = [0.4, 0.4, 0.4]
    other = prepare(read(place / "pictures"), None, IMAGE, brighter, dev_fraction=0.25)
    assert keep(model, other, how).told["computed"] == 20
    assert keep(model, data, how).told["computed"] == 0


# --- images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lst", "probe"])
def test_images_are_decoded_once_and_then_never(
    run: Callable[..., Run], place: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    data, decoded = data_of(place, "vit"), []
    honest = Medium.decode

    def decode(medium: Medium, cell: dict[str, Any], row: int | None) -> Any:
        decoded.append(row)
        return honest(medium, cell, row)

    monkeypatch.setattr(Medium, "decode", decode)
    few = 1 + LOOKED_AT + 3 * 2  # a run looks at a row, then at what is to be stored, and proves it
    for epochs, where, most in ((2, "disk", 20 + few), (4, "disk", few)):
        decoded.clear()
        run(where, data, METHODS[method], "vit", epochs=epochs)
        assert len(decoded) <= most
    decoded.clear()
    run("off", data, METHODS[method], "vit", epochs=2)
    assert len(decoded) >= 2 * 20


def test_features_of_images_that_have_moved_are_found(place: Path, tmp_path: Path) -> None:
    found = []
    for name in ("here", "there"):
        image_folder(tmp_path / name, per_class=4)
        data = prepare(read(tmp_path / name), None, IMAGE, load_processor(place / "vit"), dev_fraction=0.25)
        model = attached(place, data, backbone="vit")
        found.append(keep(model, data, options("disk", tmp_path / "store")).told["computed"])
    assert found == [8, 0]


# --- precision and size ------------------------------------------------------------------------------------------


def test_states_in_bfloat16_have_half_the_bytes_and_give_almost_the_same_run(
    run: Callable[..., Run], place: Path, tmp_path: Path
) -> None:
    data = data_of(place)
    same = run("disk", data)
    size = held(tmp_path / "features")
    rounded = run("disk", data, features_precision="bf16")
    assert held(tmp_path / "features") == size + size // 2
    assert rounded.results.features is not None
    assert rounded.results.features["precision"] == "bf16"
    assert rounded.computed == 68
    assert rounded.losses != same.losses
    assert rounded.losses == pytest.approx(same.losses, abs=0.01)


def uneven(count: int) -> list[dict[str, Any]]:
    """Most texts are short, and a few are long."""
    chance = random.Random(0)
    lengths = [25 if number % 8 == 0 else chance.randrange(1, 4) for number in range(count)]
    return [
        {"text": " ".join(chance.choices(WORDS, k=length)), "label": chance.choice(("neg", "pos"))}
        for length in lengths
    ]


@pytest.mark.parametrize(
    ("backbone", "method", "even"),
    [
        ("bert", "read", True),
        ("bert", "lst", False),
        ("vit", "lst", True),
        ("vit", "probe", True),
        pytest.param(
            *("bert", "probe", False),
        ),
        pytest.param(
            *("llama", "read", False),
        ),
    ],
)
@pytest.mark.parametrize("rounded", [False, True])
def test_the_forecast_of_bytes_is_what_is_stored(
    place: Path, tmp_path: Path, backbone: str, method: str, even: bool, rounded: bool
) -> None:
    parts = {} if even else {"train": Dataset.from_list(uneven(80)), "dev": rows(4, 1)}
    data = data_of(place, backbone, **parts)
    model = attached(place, data, METHODS[method], backbone)
    features = Features.of(model, data, FeatureStore(tmp_path, PLENTY), rounded=rounded, batch_size=8, autocast=False)
    assert (features.route.places == (VECTOR,)) == (method == "probe")
    forecast = features.forecast()
    features.fill(progress=False)
    assert forecast.rows == len({*features.ids})
    assert forecast.size == pytest.approx(held(tmp_path), rel=0.05)
    assert not features.forecast().rows


# --- where nobody asked ------------------------------------------------------------------------------------------


def test_auto_says_why_it_does_nothing_on_a_small_run(run: Callable[..., Run], place: Path, tmp_path: Path) -> None:
    data = data_of(place)
    found = run("auto", data, epochs=3)
    assert found.results.features is None
    assert found.told == ["features: none, as all 3 frozen passes take less than 10 s"]
    assert not (tmp_path / "features").exists()
    same_runs(found, run("off", data, epochs=3), data)


def test_passes_are_told_with_one_digit(place: Path, tmp_path: Path) -> None:
    data, told = data_of(place), []
    keep(attached(place, data), data, options("auto", tmp_path), told.append, passes=2 + 16 / 56)
    assert told == ["features: none, as all 2.3 frozen passes take less than 10 s"]


def test_auto_stores_nothing_for_a_single_pass(place: Path, tmp_path: Path) -> None:
    data, told = data_of(place), []
    model = attached(place, data)
    assert keep(model, data, options("auto", tmp_path), told.append, passes=1) is None
    assert not told
    keep(model, data, options("disk", tmp_path))
    assert keep(model, data, options("auto", tmp_path), passes=1).told["computed"] == 0


def test_auto_keeps_in_memory_what_pays(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, told = data_of(place), []
    model = attached(place, data)
    monkeypatch.setattr(keeping, "LEAST", 0.0)
    monkeypatch.setattr(keeping, "GAIN", 1e9)
    found = keep(model, data, options("auto", tmp_path / "store"), told.append)
    assert (found.told["where"], found.told["computed"]) == ("ram", 68)
    assert "68 rows are computed once and kept in memory" in told[0]
    assert not (tmp_path / "store").exists()
    monkeypatch.setattr(keeping, "GAIN", 0.0)
    assert keep(model, data, options("auto", tmp_path / "store"), told.append) is None
    assert "features: none, as 3 frozen passes take" in told[1]
    monkeypatch.setattr(keeping, "GAIN", 1e9)
    monkeypatch.setattr(keeping, "ROOM", 0.0)
    assert keep(model, data, options("auto", tmp_path / "store"), told.append) is None
    assert "of memory are free: --features disk keeps them in a folder" in told[2]


class Job:
    """A process that fills a folder: here a model and a store of its own, and a thread."""

    def __init__(self, place: Path, folder: Path) -> None:
        data = data_of(place)
        model = ss.attach(load_backbone(place / "bert"), READ, head=head_for(data))
        self.features = Features.of(
            model, data, FeatureStore(folder, PLENTY), rounded=False, batch_size=2, autocast=False
        )
        self.computed: list[int] = []
        own = self.features.record
        self.features.record = lambda numbers: self.computed.extend(numbers) or own(numbers)  # type: ignore[method-assign]
        self.thread = threading.Thread(target=lambda: self.features.fill(progress=False), daemon=True)

    def names(self) -> list[str]:
        """Of the parts."""
        ids = self.features.ids
        return [name_of({"rows": [ids[row].hex() for row in part]}) for part in self.features._parts()]

    def waits_for(self, rows: int) -> None:
        """Wait until so many rows are lacking."""
        while len(self.features.lacking) != rows:
            assert self.thread.is_alive()
            time.sleep(0.01)


def test_jobs_that_fill_one_folder_share_the_rows(place: Path, tmp_path: Path) -> None:
    one, other = Job(place, tmp_path), Job(place, tmp_path)
    (first, second, *_), names = one.features._parts(), one.names()
    assert names == other.names()
    assert len(names) > 3
    with other.features.entry.claimed(names[0], wait=False) as ours:
        assert ours
        one.thread.start()
        one.waits_for(len(first))
        other.features._fill(first[:4], lambda rows: None, wait=False)  # stored by the other meanwhile
    one.thread.join(60)
    assert not one.features.lacking
    assert sorted(one.computed) == sorted({*range(len(one.features.ids))} - {*first[:4]})
    other.features.fill(progress=False)
    assert other.computed == first[:4]
    assert second[0] in one.computed


def test_a_part_of_a_job_that_ended_is_taken_over(place: Path, tmp_path: Path) -> None:
    one, other = Job(place, tmp_path), Job(place, tmp_path)
    part = one.features._parts()[1]
    with other.features.entry.claimed(one.names()[1], wait=False):
        one.thread.start()
        one.waits_for(len(part))
    one.thread.join(60)  # the claim is gone, and nothing was stored
    assert sorted(one.computed) == list(range(len(one.features.ids)))


def test_many_rows_are_few_parts(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Job(place, tmp_path).features
    monkeypatch.setattr(stored_rows, "PARTS", 2)
    monkeypatch.setattr(stored_rows, "PART", 1)
    first, second = features._parts()
    assert sorted([*first, *second]) == list(range(len(features.ids)))
    assert max(features.lengths[row] for row in first) <= min(features.lengths[row] for row in second)


def test_a_folder_that_was_filled_before_is_trained_from(place: Path, tmp_path: Path) -> None:
    settings = TrainSettings(
        output=tmp_path / "out", epochs=1, features="disk", features_folder=tmp_path / "store", progress=False
    )
    asked = ss.DataSpec(train=rows(), dev=rows(20, 1), text="text")
    spec = ss.RunSpec(data=asked, model=ss.ModelSpec(backbone=place / "bert", method=READ), training=settings)
    told = ss.store_features(spec)
    assert not settings.output.exists()
    assert told["computed"] == told["rows"]
    assert ss.store_features(spec)["computed"] == 0
    found = ss.train(spec)[2].features
    assert found is not None
    assert found["computed"] == 0
    with pytest.raises(ValueError, match=r"--features ram with --features-only: it fills a folder"):
        ss.store_features(replace(spec, training=replace(settings, features="ram")))


def test_the_folder_is_the_users_unless_it_is_said_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SIDESTEP_FEATURES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert FeatureOptions(where="disk").place == default_folder() == tmp_path / "sidestep" / "features"
    monkeypatch.setenv("SIDESTEP_FEATURES", str(tmp_path / "mine"))
    assert FeatureOptions(where="disk").place == tmp_path / "mine"
    assert FeatureOptions(where="disk", folder=tmp_path).place == tmp_path


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"where": "disc"}, "features='disc': choose one of auto, ram, disk, off"),
        ({"precision": "int8"}, "features_precision='int8': choose one of same, bf16"),
        ({"limit": 0}, "features_limit=0, but it must be at least 1 byte"),
    ],
)
def test_options_out_of_range_are_refused(how: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FeatureOptions(**how)


# --- scoring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["bert", "llama", "vit", "text2text", "lm"])
def test_scores_from_features_are_those_without(
    run: Callable[..., Run], place: Path, tmp_path: Path, backbone: str
) -> None:
    data = data_of(place, backbone)
    model = run("off", data, backbone=backbone, epochs=1).model
    given = {
        "vit": lambda: read(place / "pictures"),
        "text2text": lambda: Dataset.from_list(answered(16, 3)),
        "lm": lambda: Dataset.from_list(answered(16, 3)),
    }.get(backbone, lambda: rows(30, 3))()
    wanted = predict.judge(model, given)
    told: list[str] = []
    for where in ("ram", "disk", "disk", "auto"):
        how = options(where, tmp_path / "store")
        assert predict.evaluate(model, given, features=how) == wanted.scores
        assert predict.judge(model, given, features=how, tell=told.append) == wanted
    if data.generation is None:
        assert "rows are stored in" in told[-1]


def test_scoring_uses_what_training_has_stored(run: Callable[..., Run], place: Path, tmp_path: Path) -> None:
    found = run("disk", data_of(place))
    told: list[str] = []
    scores = predict.judge(
        found.model, rows(20, 1), features=options("disk", tmp_path / "features"), tell=told.append
    ).scores
    assert scores == pytest.approx(found.results.scores)
    assert told == [f"features: all 20 rows are stored in {tmp_path / 'features'}"]


# --- what is written ---------------------------------------------------------------------------------------------


def test_results_say_what_was_stored_and_a_run_goes_on_with_it(
    run: Callable[..., Run], place: Path, tmp_path: Path
) -> None:
    data = data_of(place)
    run("disk", data)
    found = json.loads((tmp_path / "task 0" / "results.json").read_text())["features"]
    assert found.keys() == {"where", "precision", "rows", "computed", "places", "seconds", "spent_seconds"}
    assert (found["where"], found["precision"], found["rows"], found["places"]) == ("disk", "same", 68, 2)
    assert 0 < found["seconds"] < found["spent_seconds"]


def test_a_stopped_run_goes_on_from_features_as_it_would_live(place: Path, tmp_path: Path) -> None:
    data = data_of(place)
    how: dict[str, Any] = {"epochs": 3, "batch_size": 8, "learning_rate": 0.02, "progress": False, "measure": False}
    losses = {}
    for name, first, then in (("live", "off", "off"), ("kept", "off", "disk")):
        output, model = tmp_path / name, attached(place, data)
        stop = pytest.MonkeyPatch()
        stop.setattr("sidestep.metrics.ComputeMetrics.__call__", interrupted())
        with pytest.raises(KeyboardInterrupt):
            train(model, data, TrainSettings(output=output, features=first, features_folder=tmp_path / "f", **how))
        stop.undo()
        again = TrainSettings(output=output, features=then, features_folder=tmp_path / "f", resume=True, **how)
        found = train(attached(place, data), data, again)
        assert found.resumed_from is not None
        assert (found.features is not None) == (then != "off")
        losses[name] = [entry["train_loss"] for entry in found.history]
    assert losses["live"] == pytest.approx(losses["kept"], abs=1e-5)


def interrupted() -> Callable[..., Any]:
    """Judges the first epoch, and stops the run at the second."""
    left = iter([{"accuracy": 0.5}])

    def judge(self: Any, evaluation: Any) -> dict[str, float]:
        scores = next(left, None)
        if scores is None:
            raise KeyboardInterrupt
        return scores

    return judge

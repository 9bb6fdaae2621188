"""Tasks whose answer is text, end to end: loss, training, generation, resuming, task folder, commands, comparisons."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from typer.testing import CliRunner

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.backbone.source import LoadError
from sidestep.cli import app
from sidestep.compare.files import comparison_from
from sidestep.compare.runs import run
from sidestep.data import DataError, Fields, Generation
from sidestep.disk import task_folder
from sidestep.kinds.prepare import TaskData, prepare
from sidestep.methods import MethodConfig
from sidestep.metrics import Written
from sidestep.model.initialise import initialise
from sidestep.tasks import load as loading
from sidestep.tasks import predict
from sidestep.training.callbacks import StopIfDiverged
from sidestep.training.settings import TrainSettings
from sidestep.training.train import head_for, train
from small_tasks import image_backbone, text_backbone, write
from tiny import FAMILIES, randomize
from written_tasks import VOCABULARY, answered, llama_backbone, t5_backbone, tokenizer

TEXT = Fields(text="text", label="answer")
READ = ss.ReadConfig(rank=8)
METHODS = {"read": READ, "sherl": ss.SherlConfig(reduction=4), "dtl": ss.DTLConfig(rank=2, late_blocks=2)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone for each kind of problem."""
    folder = tmp_path_factory.mktemp("written")
    t5_backbone(folder / "text2text")
    llama_backbone(folder / "lm")
    return folder


def rows(count: int = 32, seed: int = 0) -> Dataset:
    return Dataset.from_list(answered(count, seed))


def task_data(place: Path, kind: Written, **how: Any) -> TaskData:
    return prepare(rows(), rows(12, 1), TEXT, load_processor(place / kind), kind=kind, **how)


def attached(place: Path, data: TaskData, method: MethodConfig = READ, seed: int = 0) -> ss.SideModel:
    torch.manual_seed(seed)
    backbone = load_backbone(place / data.labels.kind, writes=data.labels.kind)
    return ss.attach(backbone, method, head=head_for(data))


def settings(output: Path, **changes: Any) -> TrainSettings:
    how = {"epochs": 2, "batch_size": 8, "learning_rate": 0.02, "progress": False, "log_steps": 3, "measure": False}
    return TrainSettings(output=output, **{**how, **changes})


# --- the loss ----------------------------------------------------------------------------------------------


def test_the_loss_is_on_the_completion_alone(place: Path) -> None:
    data = task_data(place, "lm")
    model = attached(place, data).eval()
    expected, count = torch.tensor(0.0), 0
    for row in [data.train[0], data.train[1]]:
        ids = [*row["input_ids"], *row["labels"]]
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        first = len(row["input_ids"])
        # the logits at a place are for the token after it
        expected = expected + F.cross_entropy(logits[first - 1 : -1], torch.tensor(row["labels"]), reduction="sum")
        count += len(row["labels"])
    loss = model(**data.collate([data.train[0], data.train[1]])).loss
    torch.testing.assert_close(loss, expected / count)


@pytest.mark.parametrize("kind", ["text2text", "lm"])
def test_accumulated_batches_weigh_every_token_alike(place: Path, kind: Written) -> None:
    """Two batches of 4 rows with other numbers of target tokens give the gradient of one batch of 8."""
    data = task_data(place, kind)
    model = attached(place, data)
    assert model.accepts_loss_kwargs
    order = sorted(range(8), key=lambda row: len(data.train[row]["labels"]))
    whole = data.collate([data.train[row] for row in order])
    items = (whole["labels"] != -100).sum()

    def gradients(*parts: list[int]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for part in parts:
            model(**data.collate([data.train[row] for row in part]), num_items_in_batch=items).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.trained_parameters()}

    at_once, in_parts = gradients(order), gradients(order[:4], order[4:])
    for name, gradient in at_once.items():
        torch.testing.assert_close(in_parts[name], gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model(**whole).loss, model(**whole, num_items_in_batch=items).loss)


# --- a run, and what it leaves -----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "method"), [("text2text", "sherl"), ("lm", "dtl"), ("lm", "read")])
def test_a_saved_task_writes_the_same_texts(place: Path, tmp_path: Path, kind: Written, method: str) -> None:
    data = task_data(place, kind)
    model = attached(place, data, METHODS[method])
    results = train(model, data, settings(tmp_path / "task"))
    assert results.metric == "exact_match"
    assert results.scores.keys() == {"exact_match", "token_f1"}
    assert results.labels == []
    before = predict.written(model, data.dev, data.generation or Generation())
    again = loading.load(tmp_path / "task")
    assert predict.evaluate(again, rows(12, 1)) == results.scores
    table = predict.predict(again, rows(12, 1).remove_columns("answer"), batch_size=5)
    assert table["prediction"][:] == before
    assert table.column_names == ["text", "prediction"]
    about = task_folder.inspect_task(tmp_path / "task")
    assert about["preprocessing"]["generation"] == {"max_new_tokens": 3, "num_beams": 1}
    assert about["preprocessing"]["problem"] == kind


def test_full_tuning_learns_to_answer_in_words(place: Path, tmp_path: Path) -> None:
    data = task_data(place, "text2text")
    results = train(attached(place, data, ss.FullConfig()), data, settings(tmp_path, epochs=8, learning_rate=0.01))
    assert results.scores["exact_match"] > 0.5
    told = {entry["dev_exact_match"] for entry in results.history}
    assert max(told) == results.scores["exact_match"]
    answers = set(predict.predict(loading.load(tmp_path), rows(12, 1))["prediction"][:])
    assert answers <= {"very good", "bad"}


@pytest.mark.parametrize("kind", ["text2text", "lm"])
def test_an_interrupted_run_continues_to_the_same_bits(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Written
) -> None:
    """Step 7 continues from a checkpoint within epoch 2 (step 6)."""
    data = task_data(place, kind)
    how = {"epochs": 2, "save_steps": 3}

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt

    train(attached(place, data), data, settings(tmp_path / "whole", **how))
    with monkeypatch.context() as patched:
        patched.setattr(StopIfDiverged, "on_step_begin", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(attached(place, data), data, settings(tmp_path / "parts", **how))
    # other initial weights: all that counts comes from the checkpoint
    results = train(attached(place, data, seed=9), data, settings(tmp_path / "parts", **how, resume=True))
    assert results.resumed_from == 6
    found = [load_file(tmp_path / name / task_folder.WEIGHTS) for name in ("whole", "parts")]
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


def test_a_start_by_fisher_information_is_made_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, how = task_data(place, "text2text"), {"save_steps": 2, "epochs": 2}
    config = ss.LSTConfig(reduction=2, heads=2, head_width=8, inner_width=32, init="fisher")
    made: list[int] = []

    def spy(model: ss.SideModel, batches: Any) -> int:
        made.append(initialise(model, batches))
        return made[-1]

    monkeypatch.setattr("sidestep.training.train.initialise", spy)

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            raise KeyboardInterrupt

    train(attached(place, data, config), data, settings(tmp_path / "whole", **how))
    with monkeypatch.context() as patched:
        patched.setattr(StopIfDiverged, "on_step_begin", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(attached(place, data, config), data, settings(tmp_path / "parts", **how))
    train(attached(place, data, config, seed=9), data, settings(tmp_path / "parts", **how, resume=True))
    assert made == [32, 32]  # all rows, in the two runs that began
    found = [load_file(tmp_path / name / task_folder.WEIGHTS) for name in ("whole", "parts")]
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


# --- writing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "method"), [("t5", "sherl"), ("t5", "read"), ("llama", "read"), ("llama", "dtl")])
@pytest.mark.parametrize("how", [{}, {"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 3}], ids=str)
def test_generation_with_a_cache_equals_generation_without(family: str, method: str, how: dict[str, Any]) -> None:
    kind = FAMILIES[family]
    model = ss.attach(kind.model(), METHODS[method]).eval()
    randomize(model)
    batch = kind.inputs(tokens=9)
    batch.pop("decoder_input_ids", None)
    # sources of different lengths, padded on the side that the family needs to write
    for row, length in enumerate((9, 5, 7, 3)):
        padding = slice(length, None) if kind.encoder_decoder else slice(0, 9 - length)
        batch["attention_mask"][row] = 1
        batch["attention_mask"][row, padding], batch["input_ids"][row, padding] = 0, 0
    assert model.caches
    given = {"max_new_tokens": 6, "do_sample": False, **how}
    cached, plain = (model.generate(**batch, **given, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
    assert len(cached) == 4 * how.get("num_return_sequences", 1)


def test_padded_prompts_are_answered_as_alone(place: Path) -> None:
    for kind in ("text2text", "lm"):
        data = task_data(place, kind)
        model = attached(place, data)
        randomize(model)
        model.extras["processor"] = data.processor
        generation = Generation(max_new_tokens=4)
        assert predict.written(model, data.dev, generation, batch_size=12) == predict.written(
            model, data.dev, generation, batch_size=1
        )


def test_a_method_that_cannot_use_a_cache_writes_without_and_says_so(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = task_data(place, "lm")
    model = attached(place, data)
    asked: list[Any] = []
    generate = ss.SideModel.generate

    def record(self: ss.SideModel, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["use_cache"])
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(ss.SideModel, "generate", record)
    monkeypatch.setattr(type(model.side), "tokenwise", False)
    model.side.tokenwise = False
    results = train(model, data, settings(tmp_path, epochs=1))
    assert set(asked) == {False}
    assert (
        "texts are written without a key-value cache, which takes longer: with one read is not exact" in results.notes
    )
    inputs = {"input_ids": torch.tensor([[2, 5]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    for how in ({}, {"use_cache": True}):
        with pytest.raises(ValueError, match="pass use_cache=False"):
            generate(model, **inputs, **how)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "writes", "says"),
    [
        (
            "text2text",
            "lm",
            r"task 'lm' needs a decoder, but .*\('t5'\) is an encoder-decoder: choose --kind text2text",
        ),
        ("lm", "text2text", r"'text2text' needs an encoder-decoder, but .*\('llama'\) is a decoder: choose --kind lm"),
        ("bert", "lm", r"\('bert'\) is neither encoder-decoder nor decoder: choose --kind single, multi or regress"),
        ("bert", "text2text", r"is neither encoder-decoder nor decoder"),
        ("vit", "text2text", r"is neither encoder-decoder nor decoder"),
    ],
)
def test_a_backbone_that_does_not_write_so_is_refused(
    place: Path, tmp_path: Path, backbone: str, writes: Written, says: str
) -> None:
    made = {"bert": text_backbone, "vit": image_backbone}
    folder = made[backbone](tmp_path / backbone) if backbone in made else place / backbone
    with pytest.raises(LoadError, match=says):
        load_backbone(folder, writes=writes)


def test_training_refuses_what_does_not_fit_the_data(place: Path, tmp_path: Path) -> None:
    data = task_data(place, "text2text")
    with pytest.raises(ValueError, match=r"nothing is trained: probe leaves it to the head, .* choose another method"):
        train(attached(place, data, ss.ProbeConfig()), data, settings(tmp_path))
    classifier = ss.attach(load_backbone(place / "text2text"), READ, head=ss.Classify(num_labels=2))
    with pytest.raises(ValueError, match=r"the problem is 'text2text', but T5Model as it is attached writes no such"):
        train(classifier, data, settings(tmp_path))
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1 with problem 'text2text'"):
        train(attached(place, data), data, settings(tmp_path, label_smoothing=0.1))
    with pytest.raises(ValueError, match="text2text problems have exact_match, token_f1"):
        train(attached(place, data), data, settings(tmp_path, metric="accuracy"))
    with pytest.raises(ValueError, match="pool='mean' with problem 'text2text'"):
        head_for(data, "mean")
    pictures, vit = Dataset.from_dict({"image": ["a.png"], "answer": ["good"]}), image_backbone(tmp_path / "vit")
    fields = Fields(image="image", label="answer")
    with pytest.raises(DataError, match="kind='lm' is for texts, but 'image' is named as images"):
        prepare(pictures, None, fields, load_processor(vit), kind="lm")


# --- tables of positions -----------------------------------------------------------------------------------


def bart() -> PreTrainedModel:
    """Of 16 positions in each stack."""
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 0}
    config = BartConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **sizes, **heads, **ids)
    config.forced_eos_token_id = None
    return BartForConditionalGeneration(config)


def gpt2() -> PreTrainedModel:
    """Of 16 positions."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=2, eos_token_id=1, **sizes))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone for each kind of problem, both of 16 positions."""
    folder = tmp_path_factory.mktemp("tables")
    for kind, model, single in (("text2text", bart(), "$A </s>"), ("lm", gpt2(), "<s> $A")):
        model.save_pretrained(folder / kind)
        tokenizer(single, f"{single} $B").save_pretrained(folder / kind)
    return folder


@pytest.mark.parametrize("kind", ["text2text", "lm"])
def test_a_max_length_beyond_the_table_of_positions_is_refused(tables: Path, tmp_path: Path, kind: Written) -> None:
    data = task_data(tables, kind, max_length=17)
    model = attached(tables, data)
    said = f"max_length=17, but {type(model.backbone).__name__} has 16 positions: choose at most 16"
    with pytest.raises(ValueError, match=said):
        train(model, data, settings(tmp_path / "task"))
    data = task_data(tables, kind, max_length=16)
    train(attached(tables, data), data, settings(tmp_path / "task", epochs=1))


def test_an_lms_table_holds_the_prompt_and_what_is_written(tables: Path, tmp_path: Path) -> None:
    unlimited = load_processor(tables / "lm")
    unlimited.model_max_length = 10**30
    longest = Dataset.from_list([{"text": "good " * 9, "answer": "bad"}])
    data = prepare(longest, longest, TEXT, unlimited, kind="lm", max_new_tokens=7)
    with pytest.raises(ValueError, match="texts of up to 17 tokens, but GPT2LMHeadModel has 16 positions"):
        train(attached(tables, data), data, settings(tmp_path / "task"))
    data = prepare(longest, longest, TEXT, unlimited, kind="lm", max_new_tokens=6)
    train(attached(tables, data), data, settings(tmp_path / "task", epochs=1))


@pytest.mark.parametrize("split", ["training", "dev"])
def test_targets_longer_than_the_decoders_table_are_named(tables: Path, tmp_path: Path, split: str) -> None:
    short = Dataset.from_list(answered(8))
    long = Dataset.from_list([*answered(2), {"text": "a film", "answer": "very " * 16}])
    parts = (long, short) if split == "training" else (short, long)
    data = prepare(*parts, TEXT, load_processor(tables / "text2text"), kind="text2text")
    said = rf"decoder of BartFor.* has 16 positions, but targets have up to 17 tokens, in row 3 .* of the {split} rows"
    with pytest.raises(DataError, match=said):
        train(attached(tables, data), data, settings(tmp_path / "task"))


def test_more_new_tokens_than_the_decoders_table_has_are_refused(tables: Path, place: Path, tmp_path: Path) -> None:
    data = task_data(tables, "text2text", max_new_tokens=17)
    said = "max_new_tokens=17, but the decoder of BartForConditionalGeneration has 16 positions: choose at most 16"
    with pytest.raises(ValueError, match=said):
        train(attached(tables, data), data, settings(tmp_path / "task"))
    for backbones, new in ((tables, 16), (place, 40)):
        data = task_data(backbones, "text2text", max_new_tokens=new)
        train(attached(backbones, data), data, settings(tmp_path / str(new), epochs=1))


def test_rotary_positions_write_on_past_those_of_pretraining(place: Path, tmp_path: Path) -> None:
    data = task_data(place, "lm", max_length=100, max_new_tokens=40)
    train(attached(place, data), data, settings(tmp_path, epochs=1))


def test_a_prompt_longer_than_the_table_of_positions_is_refused(tables: Path, place: Path) -> None:
    written = {kind: attached(tables, task_data(tables, kind)).eval() for kind in ("text2text", "lm")}
    for model in written.values():
        for how in ((torch.full((1, 17), 5),), ()):
            given = {} if how else {"input_ids": torch.full((1, 17), 5)}
            with pytest.raises(ValueError, match=r"a prompt of 17 tokens, but .* has 16 positions: give at most 16"):
                model.generate(*how, **given, max_new_tokens=1)
        model.generate(torch.full((1, 16), 5), max_new_tokens=1)
    mask = torch.tensor([[0] * 4 + [1] * 15])
    padded = {"input_ids": torch.full((1, 19), 5), "attention_mask": mask}
    assert written["lm"].generate(**padded, max_new_tokens=1).shape == (1, 20)
    rotary = attached(place, task_data(place, "lm")).eval()
    assert rotary.generate(torch.full((1, 40), 5), max_new_tokens=1).shape == (1, 41)


# --- commands and comparisons ------------------------------------------------------------------------------


def command(*arguments: object, code: int = 0) -> str:
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert found.exit_code == code, found.output
    return found.output


def test_the_commands_go_from_rows_to_written_texts(place: Path, tmp_path: Path) -> None:
    write(tmp_path / "train.csv", answered(32))
    write(tmp_path / "dev.csv", answered(12, 1))
    columns = ("--prompt", "text", "--completion", "answer")
    made = ("--backbone", place / "lm", "--train", tmp_path / "train.csv", "--dev", tmp_path / "dev.csv", *columns)
    how = ("--set", "rank=8", "--epochs", 1, "--batch-size", 8, "--num-beams", 2, "--max-new-tokens", 4, "--quiet")
    task = tmp_path / "task"
    assert "dev exact_match" in command("train", *made, "--task", "lm", *how, "--output", task)
    assert "exact_match" in command("eval", task, "--data", tmp_path / "dev.csv", "--quiet")
    command("predict", task, "--data", tmp_path / "dev.csv", "--output", tmp_path / "out.csv", "--quiet")
    with (tmp_path / "out.csv").open(newline="") as file:
        assert [row["prediction"] for row in csv.DictReader(file)] == predict.predict(loading.load(task), rows(12, 1))[
            "prediction"
        ][:]
    assert "max_new_tokens=4, num_beams=2" in command("inspect", task)
    assert json.loads((task / "results.json").read_text())["metric"] == "exact_match"
    refused = command("train", *made, "--task", "text2text", *how, "--output", tmp_path / "other", code=2)
    assert "choose --kind lm" in " ".join(refused.split())


def test_a_command_for_longer_texts_than_the_model_reads_ends_in_a_message(tables: Path, tmp_path: Path) -> None:
    write(tmp_path / "train.csv", answered(8))
    made = ("--backbone", tables / "lm", "--train", tmp_path / "train.csv", "--output", tmp_path / "x", "--quiet")
    asked = ("--task", "lm", "--prompt", "text", "--completion", "answer", "--max-length", 100)
    said = command("train", *made, *asked, code=2)
    assert "Error: max_length=100, but GPT2LMHeadModel has 16 positions: choose at most 16" in " ".join(said.split())


def test_methods_are_compared_on_written_texts(place: Path, tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", answered(24))
    write(tmp_path / "dev.tsv", answered(8, 1))
    task = {"name": "words", "train": "train.tsv", "dev": "dev.tsv", "text": "text", "label": "answer"}
    values = {
        "backbone": [{"name": "t5", "model": str(place / "text2text")}],
        "task": [{**task, "problem": "text2text"}],
        "contender": [{"method": name, "rates": [0.01]} for name in ("read", "full", "probe")],
        "seeds": [0],
        "epochs": 1,
        "batch_size": 8,
        "costs": {"repeats": 1, "warmup": 0, "batch": 4, "length": 8},
    }
    found = run(comparison_from(values, tmp_path, "the test"), tmp_path / "out.jsonl", tell=lambda _: None).records
    by = {(record.kind, record.settings["contender"]): record for record in found}
    for name in ("read", "full"):
        score, cost = by["score", name], by["cost", name]
        assert score.measured is not None, score.reason
        assert cost.measured is not None, cost.reason
        assert score.measured["metric"] == "exact_match"
        assert score.settings["problem"] == "text2text"
        assert cost.settings["head"] == "its language model head"
    assert {by[kind, "probe"].status for kind in ("score", "cost")} == {"refused"}
    assert "nothing is trained" in (by["score", "probe"].reason or "")


def test_written_texts_and_classes_are_compared_one_after_the_other(place: Path, tmp_path: Path) -> None:
    task = {"name": "words", "train": "train.tsv", "text": "text", "label": "answer"}
    values = {
        "backbone": [{"model": str(place / "text2text")}],
        "task": [{**task, "problem": "text2text"}, {**task, "name": "classes"}],
        "methods": ["read"],
    }
    asked = comparison_from(values, tmp_path, "the test")
    with pytest.raises(ValueError, match=r"some tasks are texts to write and others are not \(words: text2text"):
        run(asked, tmp_path / "out.jsonl")
    other = replace(asked, tasks=(replace(asked.tasks[0], problem="lm"),))
    with pytest.raises(LoadError, match="choose --kind text2text"):
        run(other, tmp_path / "out.jsonl")

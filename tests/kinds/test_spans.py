"""Answers that stand in a text, from training to predictions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.data import DataWarning, Fields, LabelSpace
from sidestep.disk.feature_options import FeatureOptions
from sidestep.kinds import kind_named
from sidestep.kinds.prepare import head_for, prepare
from sidestep.kinds.running import token_logits
from sidestep.measure.plan import plan
from sidestep.measure.step import measure_step
from sidestep.methods import MethodConfig
from sidestep.tasks.predict import evaluate, judge, predict
from sidestep.training.callbacks import StopIfDiverged
from small_tasks import padless_backbone, text_backbone
from span_tasks import COLUMNS, JUDGING, asked

FIELDS = Fields(**COLUMNS)
READ = ss.ReadConfig(rank=8)
BERT = transformers.BertConfig(
    vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, and a task that was trained on it in windows of 12 tokens."""
    folder = tmp_path_factory.mktemp("spans")
    text_backbone(folder / "bert")
    ss.train(spec(folder, folder / "task", epochs=6))
    return folder


def rows(count: int = 48, seed: int = 0, **how: Any) -> Dataset:
    return Dataset.from_list(asked(count, seed, longest=14, **{"without": 0.25, **how}))


def spec(place: Path, output: Path, method: MethodConfig = READ, model: Any = None, **how: Any) -> ss.RunSpec:
    settings = {"epochs": 2, "batch_size": 8, "learning_rate": 0.05, "progress": False, "measure": False, **how}
    return ss.RunSpec(
        data=ss.DataSpec(train=rows(), dev=rows(24, 1), kind="spans", max_length=12, **COLUMNS),
        model=ss.ModelSpec(backbone=place / "bert", method=method, **(model or {})),
        training=ss.TrainSettings(output=output, **settings),
    )


def attached(place: Path, method: MethodConfig = READ, **how: Any) -> tuple[ss.SideModel, dict[str, Tensor]]:
    """A model with a head of spans and a batch with padding."""
    data = prepare(rows(12), rows(4, 1), FIELDS, load_processor(place / "bert"), kind="spans")
    torch.manual_seed(0)
    model = ss.attach(load_backbone(place / "bert"), method, head=head_for(data), **how)
    batch = data.collate([data.train[number] for number in range(8)])
    assert 0 in batch["attention_mask"]
    return model, {name: value for name, value in batch.items() if name != "token_type_ids"}


# --- a task -----------------------------------------------------------------------------------------------------------


def test_a_task_learns_to_answer_and_to_give_no_answer(place: Path) -> None:
    model, dev = ss.load(place / "task"), rows(24, 1)
    judged = judge(model, dev)
    assert judged.scores == pytest.approx(model.extras["scores"], rel=1e-6)
    assert judged.scores["f1"] > 0.9 > 0.5 > judged.constant["f1"]
    assert judged.classes.keys() == {"answerable", "unanswerable"}
    assert sum(each.rows for each in judged.classes.values()) == len(dev)
    found = predict(model, dev)
    right = 0
    for row in found:
        start, end, text = row["start"], row["end"], row["prediction"]
        assert text == ("" if start is None else row["context"][start:end])
        right += text in (row["answers"]["text"] or [""])
        best, *others = row["nbest"]
        assert best == {"text": text, "start": start, "end": end, "probability": row["probability"]}
        assert row["probability"] >= max(each["probability"] for each in others)
        assert any(each["start"] is None for each in row["nbest"])
    assert right / len(dev) == judged.scores["exact_match"]
    assert found.remove_columns("nbest").column_names == [
        *dev.column_names,
        "prediction",
        "start",
        "end",
        "probability",
    ]


def test_rows_without_answers_are_predicted_and_columns_follow_what_is_asked(place: Path) -> None:
    model, bare = ss.load(place / "task"), rows(3, 5).remove_columns("answers")
    assert predict(model, bare, probabilities="one").column_names == [
        *("question", "context", "prediction", "start", "end", "probability")
    ]
    assert "probability" not in predict(model, bare, probabilities="none").column_names
    whole = predict(model, bare, probabilities="one")
    for number in range(3):  # windows of other rows do not matter
        alone = predict(model, bare.select([number]), probabilities="one")[0]
        assert alone == {**whole[number], "probability": pytest.approx(alone["probability"], rel=1e-5)}


def test_where_every_training_question_has_an_answer_one_is_always_given(place: Path, tmp_path: Path) -> None:
    data = prepare(rows(8, without=0), rows(4, without=0), FIELDS, load_processor(place / "bert"), kind="spans")
    assert data.labels == LabelSpace("spans", ("start", "end"))
    model = ss.attach(load_backbone(place / "bert"), READ, head=head_for(data))
    with torch.no_grad():
        model.head.linear.bias.zero_()
        model.head.linear.weight.zero_()  # all places alike, "no answer" among them
    model.extras |= {"processor": data.processor, "preprocessing": data.preprocessing()}
    model.save_pretrained(tmp_path / "task")
    loaded = ss.load(tmp_path / "task")
    assert all(predict(loaded, rows(4, without=0))["prediction"])
    with pytest.warns(DataWarning, match="4 of 4 questions have no answer, but training had no such question"):
        evaluate(loaded, rows(4, without=1))


def test_an_interrupted_run_continues_to_the_same_bits(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 17:
            raise KeyboardInterrupt

    whole, _, _ = ss.train(spec(place, tmp_path / "whole", save_steps=5))
    with monkeypatch.context() as patched:
        patched.setattr(StopIfDiverged, "on_step_begin", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            ss.train(spec(place, tmp_path / "parts", save_steps=5))
    parts, _, results = ss.train(spec(place, tmp_path / "parts", save_steps=5, resume=True))
    assert results.resumed_from == 15
    found = parts.state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole.state_dict().items())


def test_the_backbones_own_head_is_trained_stored_and_used(place: Path, tmp_path: Path) -> None:
    model, _, results = ss.train(spec(place, tmp_path / "task", model={"own_head": True}, epochs=4))
    assert type(model.backbone).__name__ == "BertForQuestionAnswering"
    assert results.scores["f1"] > 0.7 > 0.5 > results.constant["f1"]
    loaded = ss.load(tmp_path / "task")
    assert loaded.backbone.qa_outputs.out_features == 2
    assert evaluate(loaded, rows(24, 1)) == pytest.approx(results.scores, rel=1e-6)
    assert results.history[-1]["dev_loss"] < results.history[0]["dev_loss"]


def test_features_of_an_own_head_that_reads_padding_are_refused_before_they_are_computed(
    place: Path, tmp_path: Path
) -> None:
    run = spec(place, tmp_path / "task", model={"own_head": True}, features="ram")
    with pytest.raises(ValueError, match="the own head of BertForQuestionAnswering reads padding"):
        ss.train(run)


def test_an_own_head_that_was_loaded_is_trained_and_its_outputs_are_read(place: Path, tmp_path: Path) -> None:
    made = load_backbone(place / "bert", head="spans")
    made.save_pretrained(tmp_path / "qa")
    model = ss.attach(transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "qa"), READ)
    assert {name for name, _ in model.trained_parameters() if "qa_outputs" in name}
    model.extras["processor"] = load_processor(place / "bert")
    assert evaluate(model, rows(4, without=0), fields=FIELDS).keys() == {"exact_match", "f1"}


def test_a_loss_of_an_own_head_is_that_of_sidesteps_head(place: Path) -> None:
    model, batch = attached(place, ss.ProbeConfig())
    own = ss.attach(load_backbone(place / "bert", head="spans"), ss.ProbeConfig())
    own.backbone.qa_outputs.load_state_dict(model.head.linear.state_dict())
    # its own head does not leave padding out
    alone = {name: value[:1] for name, value in batch.items()}
    kept = int(alone["attention_mask"].sum())
    alone = {name: value if name == "labels" else value[:, :kept] for name, value in alone.items()}
    ours, theirs = model.eval()(**alone), own.eval()(**alone)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.logits, torch.stack([theirs.start_logits, theirs.end_logits], -1))


def test_a_decoder_answers_too(tmp_path: Path) -> None:
    padless_backbone(tmp_path / "llama")
    tokens, model = load_processor(tmp_path / "llama"), load_backbone(tmp_path / "llama")
    data = prepare(rows(12), rows(4, 1), FIELDS, tokens, kind="spans", max_length=12)
    model = ss.attach(model, READ, head=head_for(data))
    model.extras |= {"processor": tokens, "preprocessing": data.preprocessing()}
    for row in predict(model, rows(4, 1), probabilities="one"):
        assert row["prediction"] == ("" if row["start"] is None else row["context"][row["start"] : row["end"]])


# --- with the rest of the library -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [READ, ss.ProbeConfig()], ids=["read", "probe"])
def test_a_run_from_stored_features_is_the_live_run(place: Path, tmp_path: Path, method: MethodConfig) -> None:
    how = {"learning_rate": 0.01, "epochs": 1}
    live = ss.train(spec(place, tmp_path / "live", method, features="off", **how))
    kept = ss.train(spec(place, tmp_path / "kept", method, features="ram", **how))
    assert kept[2].features is not None
    assert kept[2].features["rows"] == kept[2].data["train_rows"] + kept[2].data["dev_rows"]
    for name, tensor in live[0].state_dict().items():
        torch.testing.assert_close(kept[0].state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    assert kept[2].scores == pytest.approx(live[2].scores)
    options = FeatureOptions(where="disk", folder=tmp_path / "store")
    assert evaluate(live[0], rows(24, 1), features=options) == pytest.approx(live[2].scores)


def test_whole_contexts_are_held_out(place: Path) -> None:
    given = Dataset.from_list([row for row in asked(20) for _ in range(3)])
    data = prepare(given, None, FIELDS, load_processor(place / "bert"), kind="spans", dev_fraction=0.2)
    train, dev = (set(part["context"][:]) for part in (data.train, data.dev))
    assert not train & dev
    assert train | dev == set(given["context"][:])
    assert len(data.dev) == 12


def test_a_readout_is_solved(place: Path, tmp_path: Path) -> None:
    run = spec(place, tmp_path / "task", ss.ReadoutConfig())
    dev = rows(24, 1, without=0)
    run = replace(run, data=replace(run.data, train=rows(without=0), dev=dev, max_length=None))
    _, _, results = ss.train(run)
    assert results.scores["f1"] > results.constant["f1"]
    assert evaluate(ss.load(tmp_path / "task"), dev) == pytest.approx(results.scores)


@pytest.mark.parametrize("method", [READ, ss.FullConfig()], ids=["read", "full"])
def test_a_plan_is_within_a_tenth_of_what_is_measured(method: MethodConfig) -> None:
    model = ss.attach(transformers.BertModel(BERT), method, head=ss.Span()).train()
    mask = torch.ones(8, 48, dtype=torch.long)
    mask[-1, 20:] = 0
    batch = {"input_ids": mask.clone(), "attention_mask": mask, "labels": torch.tensor([[3, 5]] * 8)}
    with ss.saved_bytes(model) as kept:
        model(**batch)
    planned = plan(BERT, method, head=kind_named("spans").blank_head(2), batch=8, length=48)
    assert planned.saved_bytes == pytest.approx(kept.total, rel=0.1)
    assert planned.peak_bytes == pytest.approx(measure_step(model, batch).peak_bytes, rel=0.1)


def test_a_plan_of_an_own_head_trains_it() -> None:
    found = plan(BERT, ss.ProbeConfig(), head=None, own_head="spans", batch=4, length=16)
    assert found.parameters == 2 * 64 + 2


def test_a_bank_answers_beside_tasks_of_other_kinds(place: Path, tmp_path: Path) -> None:
    bank = ss.TaskBank(load_backbone(place / "bert"), tmp_path / "bank")
    bank.add("spans", place / "task")
    words = Dataset.from_list([{"context": word, "label": word} for word in JUDGING])
    run = ss.RunSpec(
        data=ss.DataSpec(train=words, dev=words, text="context", label="label"),
        model=ss.ModelSpec(backbone=place / "bert", method=ss.ProbeConfig()),
        training=ss.TrainSettings(output=tmp_path / "words", epochs=1, progress=False, measure=False),
    )
    ss.train(run)
    bank.add("words", tmp_path / "words")
    given = rows(6, 3)
    found = bank.predict([(["spans", "words"], row) for row in given])
    alone = predict(bank.activate("spans"), given, probabilities="one")
    for row, answer in zip(found.rows, alone, strict=True):
        assert row["spans"] == {
            "prediction": answer["prediction"],
            "probability": pytest.approx(answer["probability"], rel=1e-5),
        }
        assert row["words"]["prediction"] in JUDGING
    assert {"prediction_spans", "probability_spans"} <= set(found.table(given).column_names)


def test_a_method_that_gives_one_vector_a_row_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match="synqt"):
        attached(place, ss.SynQTConfig())


def test_outputs_that_are_not_finite_are_refused(place: Path) -> None:
    model = ss.load(place / "task")
    with torch.no_grad():
        model.head.linear.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"predictions are not finite in \d+ of \d+ windows"):
        predict(model, rows(3))


def test_outputs_of_windows_have_no_padding(place: Path) -> None:
    model = ss.load(place / "task")
    kind, tokens = kind_named("spans"), model.extras["processor"]
    encoded, _ = kind.encode(rows(6), FIELDS, tokens, None, 12)
    found = token_logits(model, encoded, FIELDS, collate=kind.collate(FIELDS, tokens), batch_size=4)
    assert [each.shape for each in found] == [(length, 2) for length in encoded["length"]]
    assert all(np.isfinite(each).all() and np.abs(each).max() < 1e4 for each in found)

"""The plain Trainer's contract, point by point: each of these fails without a word where it fails."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as t
from safetensors.torch import load_file
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import sidestep as ss
from architectures import TEXT
from tiny import FAMILIES, LABELS, VOCABULARY, randomize


def rows(count: int = 24) -> datasets.Dataset:
    """Rows of different lengths, with a column that no model takes."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, VOCABULARY, rng.integers(3, 12)).tolist() for _ in range(count)]
    return datasets.Dataset.from_dict(
        {
            "input_ids": ids,
            "attention_mask": [[1] * len(row) for row in ids],
            "labels": [int(row[0] % LABELS) for row in ids],
            "length": [len(row) for row in ids],
            "comment": ["dropped"] * count,
        }
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")), pad_token="w0", unk_token="w2"
    )


def trainer(folder: Path, model: Any, tokenizer: Any, **changes: Any) -> Trainer:
    settings = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 1,
    }
    callbacks = changes.pop("callbacks", None)
    compute = changes.pop("compute_metrics", None)
    return Trainer(
        model=model,
        args=TrainingArguments(**{**settings, **changes}),
        train_dataset=rows(),
        eval_dataset=rows(8),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute,
        callbacks=callbacks,
    )


def model_of(*, head: bool = True, family: str = "bert") -> ss.SideModel:
    torch.manual_seed(5)
    own = ss.Classify(num_labels=LABELS, pool="mean") if head else None
    return ss.attach(FAMILIES[family].model(), ss.ReadConfig(rank=4), head=own)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("head", [True, False], ids=["sidestep", "own"])
def test_columns_that_the_backbone_takes_are_kept_and_others_removed(
    head: bool, tmp_path: Path, tokenizer: Any
) -> None:
    run = trainer(tmp_path, model_of(head=head), tokenizer)
    batch = next(iter(run.get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert run.label_names == ["labels"]
    assert {"token_type_ids", "position_ids"} <= set(inspect.signature(run.model.forward).parameters)


@pytest.mark.parametrize("head", [True, False], ids=["sidestep", "own"])
def test_evaluation_gives_loss_and_metrics(head: bool, tmp_path: Path, tokenizer: Any) -> None:
    seen = {}

    def metrics(evaluation: Any) -> dict[str, float]:
        seen["shape"] = evaluation.predictions.shape, evaluation.label_ids.shape
        return {"accuracy": float((evaluation.predictions.argmax(-1) == evaluation.label_ids).mean())}

    model = model_of(head=head)
    found = trainer(tmp_path, model, tokenizer, compute_metrics=metrics).evaluate()
    assert seen["shape"] == ((8, LABELS), (8,))
    model.eval()
    batch = DataCollatorWithPadding(tokenizer)([dict(r) for r in rows(8).remove_columns(["comment", "length"])])
    with torch.no_grad():
        expected = model(**batch).loss
    assert found["eval_loss"] == pytest.approx(float(expected), abs=1e-6)
    assert 0 <= found["eval_accuracy"] <= 1


TARGETS = {"start_positions": 2, "end_positions": 4, "labels": 1, "next_sentence_label": 1}
#: Heads of many tasks, with what their labels are called.
TASKS: dict[str, tuple[Any, set[str]]] = {
    "question answering": (t.BertForQuestionAnswering, {"start_positions", "end_positions"}),
    "the next sentence": (t.BertForNextSentencePrediction, {"labels"}),
    "pretraining": (t.BertForPreTraining, {"labels", "next_sentence_label"}),
    "classes": (t.BertForSequenceClassification, {"labels"}),
    "tokens": (t.BertForTokenClassification, {"labels"}),
    "masked tokens": (t.BertForMaskedLM, {"labels"}),
    "no task": (t.BertModel, set()),
}


@pytest.mark.parametrize("task", TASKS)
def test_labels_are_found_and_scored_as_of_the_bare_model(task: str, tmp_path: Path) -> None:
    kind, names = TASKS[task]
    rng = np.random.default_rng(0)
    data = []
    for _ in range(4):
        ids = rng.integers(3, VOCABULARY, 9).tolist()
        tokens = {"labels": ids} if task in ("masked tokens", "pretraining") else {}
        tokens |= {"labels": [1] * 9} if task == "tokens" else {}
        data.append({"input_ids": ids, **{name: TARGETS[name] for name in names}, **tokens})

    def evaluated(model: Any) -> tuple[list[str], dict[str, float]]:
        run = Trainer(
            model=model,
            args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True),
            eval_dataset=data,
            compute_metrics=lambda found: {"seen": float(np.sum(found.label_ids[0]))},
        )
        found = {name: value for name, value in run.evaluate().items() if name in ("eval_loss", "eval_seen")}
        return run.label_names, found

    torch.manual_seed(0)
    bare = kind(t.BertConfig(**TEXT)).eval()
    model = ss.attach(copy.deepcopy(bare), ss.ReadConfig(rank=2))
    assert isinstance(model, ss.SideModel)
    for name, found in evaluated(bare)[1].items():
        assert evaluated(model)[1][name] == pytest.approx(found, abs=1e-5)
    assert evaluated(model)[0] == evaluated(bare)[0]
    assert set(evaluated(model)[0]) == names


def test_question_answering_trains(tmp_path: Path) -> None:
    data = [{"input_ids": list(range(3, 12)), "start_positions": 2, "end_positions": 4}] * 8
    model = ss.attach(t.BertForQuestionAnswering(t.BertConfig(**TEXT)), ss.ReadConfig(rank=2), train_head=True)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=1e-2)
    run = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before


def test_a_step_on_positions_that_trains_nothing_says_so() -> None:
    model = ss.attach(t.BertForQuestionAnswering(t.BertConfig(**TEXT)), ss.ProbeConfig(), train_head=False).train()
    ids, place = torch.ones(1, 4, dtype=torch.long), torch.ones(1, dtype=torch.long)
    with pytest.raises(ValueError, match="nothing is trained"):
        model(input_ids=ids, start_positions=place, end_positions=place)


@pytest.mark.parametrize("head", [True, False], ids=["sidestep", "own"])
def test_accumulation_trains_as_the_larger_batch(head: bool, tmp_path: Path, tokenizer: Any) -> None:
    weights = []
    for name, sizes in {
        "whole": {"per_device_train_batch_size": 8},
        "parts": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    }.items():
        model = model_of(head=head)
        model.backbone.config.hidden_dropout_prob = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        run = trainer(tmp_path / name, model, tokenizer, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, **sizes)
        run.train()
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_accumulation_on_language_models_scales_the_loss(family: str, tmp_path: Path) -> None:
    # The reported loss of a step must be a mean over its micro-batches, not their sum.
    kind = FAMILIES[family]
    found = []
    for steps in (1, 4):
        model = ss.attach(kind.model(), ss.ReadConfig(rank=4))
        batch = kind.inputs(rows=1)
        data = [
            {
                **{k: v[0] for k, v in batch.items() if k != "decoder_input_ids"},
                "labels": batch["input_ids"][0],
            }
        ] * 8
        run = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path / str(steps)),
                per_device_train_batch_size=8 // steps,
                gradient_accumulation_steps=steps,
                max_steps=1,
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                logging_steps=1,
                save_strategy="no",
            ),
            train_dataset=data,
        )
        run.train()
        found.append(losses(run)[0])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_loss_of_a_causal_model_is_the_bare_models(tmp_path: Path) -> None:
    # The Trainer counts the tokens that it is a mean of: labels are shifted, so the first of a row is none.
    kind, found = FAMILIES["llama"], []
    ids = kind.inputs(rows=1)["input_ids"][0]
    for model in (kind.model(), ss.attach(kind.model(), ss.ReadConfig(rank=4))):
        settings = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, logging_steps=1, **settings)
        run = Trainer(model=model, args=args, train_dataset=[{"input_ids": ids, "labels": ids}] * 4)
        run.train()
        found.append(losses(run)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_label_smoothing_is_used(tmp_path: Path, tokenizer: Any) -> None:
    plain = trainer(tmp_path / "a", model_of(), tokenizer)
    smooth = trainer(tmp_path / "b", model_of(), tokenizer, label_smoothing_factor=0.3)
    batch = next(iter(plain.get_eval_dataloader()))
    model = plain.model.eval()
    with torch.no_grad():
        logits = model(**batch).logits.log_softmax(-1)
        nll = -logits.gather(1, batch["labels"][:, None]).mean()
        expected = 0.7 * nll + 0.3 * -logits.mean()
        assert smooth.compute_loss(model, dict(batch)) == pytest.approx(float(expected), abs=1e-5)


def test_label_smoothing_shifts_labels_of_a_causal_model(tmp_path: Path) -> None:
    kind = FAMILIES["llama"]
    model = ss.attach(kind.model(), ss.ReadConfig(rank=4)).eval()
    run = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=1e-9, report_to="none", use_cpu=True),
    )
    batch = {**kind.inputs(rows=3), "labels": kind.inputs(rows=3)["input_ids"]}
    with torch.no_grad():
        smooth, plain = run.compute_loss(model, dict(batch)), model(**batch).loss
    assert float(smooth) == pytest.approx(float(plain), abs=1e-4)


def test_length_grouping_trains(tmp_path: Path, tokenizer: Any) -> None:
    run = trainer(tmp_path, model_of(), tokenizer, train_sampling_strategy="group_by_length")
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before


def test_checkpoints_hold_the_task_only(tmp_path: Path, tokenizer: Any) -> None:
    model = model_of()
    trainer(tmp_path, model, tokenizer, save_strategy="epoch").train()
    saved = load_file(next(tmp_path.glob("checkpoint-*")) / "model.safetensors")
    assert set(saved) == set(model.state_dict())
    assert not any(name.startswith("backbone.") for name in saved)
    size = sum(value.numel() for value in saved.values())
    assert size == sum(p.numel() for _, p in model.trained_parameters())


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path, tokenizer: Any) -> None:
    model = model_of()
    scores = iter([0.1, 0.9, 0.2])
    best: dict[str, Any] = {}

    class Remember(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if round(state.epoch) == 2:
                best.update({name: value.clone() for name, value in model.state_dict().items()})

    trainer(
        tmp_path,
        model,
        tokenizer,
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        compute_metrics=lambda _: {"score": next(scores)},
        callbacks=[Remember()],
    ).train()
    assert best
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())


class StopAt(TrainerCallback):
    """Ends training at a step, as an interruption would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def test_resume_continues_exactly(tmp_path: Path, tokenizer: Any) -> None:
    whole = trainer(tmp_path / "whole", model_of(), tokenizer, train_sampling_strategy="group_by_length")
    whole.train()
    first = trainer(
        tmp_path / "cut",
        model_of(),
        tokenizer,
        train_sampling_strategy="group_by_length",
        callbacks=[StopAt(4)],
    )
    first.train()
    second = trainer(tmp_path / "cut", model_of(), tokenizer, train_sampling_strategy="group_by_length")
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert losses(second) == losses(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_loading_another_tasks_weights_is_refused() -> None:
    model = model_of()
    state = dict(model.state_dict())
    state["head.linear.weight"] = state["head.linear.weight"][:2]
    state.pop("head.linear.bias")
    state["side.new"] = torch.zeros(1)
    with pytest.raises(
        ValueError, match=r"missing head.linear.bias; unexpected side.new; other shapes head.linear.weight"
    ):
        model.load_state_dict(state, strict=False)


def test_data_parallel_is_refused() -> None:
    with pytest.raises(RuntimeError, match="torchrun"):
        model_of()._replicate_for_data_parallel()


def test_checkpointing_by_the_trainer_is_late_checkpointing(tmp_path: Path, tokenizer: Any) -> None:
    model = ss.attach(FAMILIES["bert"].model(), ss.FullConfig())
    trainer(tmp_path, model, tokenizer, gradient_checkpointing=True, max_steps=1).train()
    assert all("forward" in block.__dict__ for block in model.late_blocks())
    model.gradient_checkpointing_disable()
    assert not any("forward" in block.__dict__ for block in model.late_blocks())


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("head", [True, False], ids=["sidestep", "own"])
def test_a_copy_is_a_model_of_its_own(how: Any, head: bool, prepared: bool) -> None:
    kind = FAMILIES["bert"]
    model = model_of(head=head).eval()
    if prepared:  # as accelerate does it for half precision, whose copy would run the first model
        own = model.forward
        model.forward = lambda **inputs: own(**inputs)
    twin = how(model)
    assert type(twin) is type(model)
    with torch.no_grad():
        before = model(**kind.inputs()).logits
        assert torch.equal(twin(**kind.inputs()).logits, before)
        randomize(twin, scale=1.0)
        assert torch.equal(model(**kind.inputs()).logits, before)
        assert not torch.equal(twin(**kind.inputs()).logits, before)
    assert "input_ids" in inspect.signature(twin.forward).parameters

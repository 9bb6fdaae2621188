"""Tags of words from training to predictions: long texts, both forms of rows, both heads, features, resume, a bank."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import BertConfig, BertForTokenClassification

import sidestep as ss
from commands import refusal, succeed
from sidestep.backbone.load import load_backbone
from sidestep.data import DataError, DataWarning, Fields, LabelSpace
from sidestep.data.tagged import encode_tagged
from sidestep.data.windows import ROW
from sidestep.disk.task_folder import WEIGHTS
from sidestep.kinds import kind_named
from sidestep.tasks.predict import evaluate, predict
from sidestep.training.auto import _texts_apart
from sidestep.training.callbacks import StopIfDiverged
from small_tasks import SPECIAL, WORDS, text_backbone, tokenizer, write

GOOD, BAD, OTHERS = WORDS[:3], WORDS[3:6], WORDS[6:]
FIELDS = Fields(text="words", label="tags")
NAMES = ("O", "B-bad", "I-bad", "B-good", "I-good")


def tagged(rows: int, seed: int = 0, longest: int = 12) -> list[dict[str, Any]]:
    """Words among which runs of judging ones are entities."""
    chance, found = random.Random(seed), []
    for _ in range(rows):
        words: list[str] = []
        tags: list[str] = []
        while len(words) < chance.randrange(3, longest):
            kind, of = chance.choice((("good", GOOD), ("bad", BAD), ("", OTHERS), ("", OTHERS)))
            run = chance.choices(of, k=chance.randrange(1, 3))
            words += run
            tags += [f"{'I' if number else 'B'}-{kind}" if kind else "O" for number, _ in enumerate(run)]
        found.append({"words": words, "tags": tags})
    return found


def as_texts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows as texts with spans of characters."""
    found = []
    for row in rows:
        starts = np.cumsum([0, *(len(word) + 1 for word in row["words"])]).tolist()
        spans: list[dict[str, Any]] = []
        for number, tag in enumerate(row["tags"]):
            end = starts[number] + len(row["words"][number])
            if tag.startswith("B"):
                spans.append({"start": starts[number], "end": end, "label": tag[2:]})
            elif tag.startswith("I"):
                spans[-1]["end"] = end
        found.append({"words": " ".join(row["words"]), "tags": spans})
    return found


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_backbone(tmp_path_factory.mktemp("bert"))


def run(backbone: Path, output: Path, rows: Any, dev: Any, method: Any = None, **how: Any) -> Any:
    model = {name: how.pop(name) for name in ("own_head", "keep") if name in how}
    length = how.pop("max_length", None)
    spec = ss.RunSpec(
        data=ss.DataSpec(train=rows, dev=dev, text="words", label="tags", kind="tokens", max_length=length),
        model=ss.ModelSpec(backbone=str(backbone), method=method or ss.ReadConfig(rank=16), **model),
        training=ss.TrainSettings(
            **{"output": output, "epochs": 3, "batch_size": 8, "learning_rate": 0.02, "progress": False} | how
        ),
    )
    return ss.train(spec)


def test_the_commands_learn_tags_and_write_entities(backbone: Path, tmp_path: Path) -> None:
    train, dev = write(tmp_path / "train.jsonl", tagged(96)), write(tmp_path / "dev.jsonl", tagged(32, 1))
    succeed(
        *("train", "--backbone", backbone, "--method", "read", "--kind", "tokens", "--train", train, "--dev", dev),
        *("--text", "words", "--label", "tags", "--output", tmp_path / "task", "--max-length", "10", "--quiet"),
        *("--set", "rank=16", "--epochs", "6", "--batch-size", "8", "--lr", "0.02"),
    )
    results = json.loads((tmp_path / "task" / "results.json").read_text())
    assert results["scores"]["f1"] > 0.4
    assert results["history"][int(results["best_epoch"]) - 1]["dev_f1"] == pytest.approx(results["scores"]["f1"])
    assert results["constant"]["f1"] == 0
    assert set(results["classes"]) == {"good", "bad"}
    assert set(results["classes"]["good"]) == {"rows", "recall", "f1"}
    shown = succeed("eval", tmp_path / "task", "--data", dev).output
    assert f"{results['scores']['f1']:.4f}"[:5] in shown
    succeed("predict", tmp_path / "task", "--data", dev, "--output", tmp_path / "out.jsonl")
    for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()):
        assert len(row["prediction"]) <= len(row["words"])
        for span in row["prediction"]:
            assert span["text"] == " ".join(row["words"][span["start"] : span["end"]])
            assert 0 < span["probability"] <= 1


def test_texts_with_spans_give_the_scores_of_the_same_words_with_tags(backbone: Path, tmp_path: Path) -> None:
    rows, dev = tagged(64), tagged(24, 1)
    parts = [[Dataset.from_list(make(part)) for part in (rows, dev)] for make in (lambda given: given, as_texts)]
    found = [run(backbone, tmp_path / str(n), *part, epochs=1)[2].scores for n, part in enumerate(parts)]
    assert found[0] == found[1]
    model = ss.load(tmp_path / "1")
    table = predict(model, parts[1][1])
    for row in table:
        for span in row["prediction"]:
            assert row["words"][span["start"] : span["end"]] == span["text"]


def test_windows_do_not_change_what_a_short_text_gets(backbone: Path, tmp_path: Path) -> None:
    """Scores over windows are those of whole texts: only what stands around a word may differ."""
    model = run(backbone, tmp_path / "task", *(Dataset.from_list(tagged(n, n)) for n in (64, 24)), epochs=1)[0]
    rows = Dataset.from_list(tagged(16, 5, longest=8))
    whole = predict(model, rows)["prediction"][:]
    model.extras["preprocessing"]["max_length"] = 32
    assert predict(model, rows)["prediction"][:] == whole
    model.extras["preprocessing"]["max_length"] = 6
    windows = predict(model, rows)
    assert [len(tags) for tags in windows["predicted_tags"][:]] == [len(words) for words in rows["words"][:]]


@pytest.mark.parametrize("method", [ss.ReadConfig(rank=4), ss.ReadoutConfig(), ss.ProbeConfig(), ss.LoraConfig(rank=2)])
def test_a_task_is_stored_and_scored_again(method: Any, backbone: Path, tmp_path: Path) -> None:
    rows, dev = (Dataset.from_list(tagged(n, n)) for n in (48, 24))
    _, _, results = run(backbone, tmp_path / "task", rows, dev, method, epochs=1)
    assert evaluate(ss.load(tmp_path / "task"), dev) == pytest.approx(results.scores)


def test_a_readout_is_solved_on_tokens_as_scikit_learn_solves_it(backbone: Path, tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    rows, dev = (Dataset.from_list(tagged(n, n)) for n in (48, 24))
    model, data, _ = run(backbone, tmp_path / "task", rows, dev, ss.ReadoutConfig(penalty=0.01))
    vectors, targets = [], []
    for row in data.train:
        batch = data.collate([row])
        found, _ = model.vector({name: value for name, value in batch.items() if name != "labels"})
        kept = batch["labels"][0] != -100
        vectors.append(found[0][kept].numpy())
        targets.append(batch["labels"][0][kept].numpy())
    x, y = np.concatenate(vectors), np.concatenate(targets)
    scale = np.where(x.std(0) > 1e-6, x.std(0), 1)
    plain = LogisticRegression(C=1 / (0.01 * len(x)), max_iter=2000, tol=1e-8).fit((x - x.mean(0)) / scale, y)
    expected = plain.predict_proba((x - x.mean(0)) / scale)
    weight, bias = model.head.linear.weight.detach().numpy(), model.head.linear.bias.detach().numpy()
    logits = x @ weight.T + bias
    ours = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(ours / ours.sum(1, keepdims=True), expected, atol=2e-3)


def test_a_tag_with_one_token_is_never_predicted_by_a_readout(backbone: Path, tmp_path: Path) -> None:
    rows = [*tagged(48), {"words": ["the", "film"], "tags": ["O", "B-rare"]}]
    model, *_ = run(
        backbone, tmp_path / "task", *(Dataset.from_list(part) for part in (rows, tagged(8, 1))), ss.ReadoutConfig()
    )
    names = model.extras["preprocessing"]["labels"]
    rare = [number for number, name in enumerate(names) if name.endswith("rare")]
    assert (model.head.linear.bias[rare] == -1e4).all()


@pytest.mark.parametrize("keep", ["full", "replay"])
def test_features_change_nothing(keep: str, backbone: Path, tmp_path: Path) -> None:
    rows, dev = (Dataset.from_list(tagged(n, n)) for n in (48, 24))
    found = [
        run(backbone, tmp_path / where, rows, dev, ss.ReadConfig(rank=4), epochs=2, features=where, keep=keep)[2]
        for where in ("off", "ram")
    ]
    assert found[0].scores == found[1].scores
    for ours, theirs in zip(*(results.history for results in found), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)


def test_a_head_of_the_backbones_own_is_trained(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertForTokenClassification(config).save_pretrained(tmp_path / "bert")
    tokenizer(pad=True).save_pretrained(tmp_path / "bert")
    rows, dev = (Dataset.from_list(tagged(n, n)) for n in (64, 24))
    model, _, results = run(tmp_path / "bert", tmp_path / "task", rows, dev, ss.ReadConfig(rank=8), own_head=True)
    assert type(model.backbone).__name__ == "BertForTokenClassification"
    assert model.config.id2label[1] == "B-bad"
    assert evaluate(ss.load(tmp_path / "task"), dev) == pytest.approx(results.scores)


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, dev = (Dataset.from_list(tagged(n, n)) for n in (48, 24))
    whole = run(backbone, tmp_path / "whole", rows, dev, epochs=2, features="off")[2]

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StopIfDiverged, "on_step_end", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            run(backbone, tmp_path / "cut", rows, dev, epochs=2, features="off")
    again = run(backbone, tmp_path / "cut", rows, dev, epochs=2, features="off", resume=True)[2]
    assert [epoch["dev_loss"] for epoch in again.history] == [epoch["dev_loss"] for epoch in whole.history]
    whole_task, cut_task = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "cut"))
    assert all(torch.equal(cut_task[name], value) for name, value in whole_task.items())


def test_a_bank_answers_with_entities_beside_other_tasks(backbone: Path, tmp_path: Path) -> None:
    rows, dev = (Dataset.from_list(tagged(n, n)) for n in (48, 24))
    for name, method in (("one", ss.ReadConfig(rank=4)), ("two", ss.ProbeConfig())):
        run(backbone, tmp_path / name, rows, dev, method, epochs=1)
    with ss.TaskBank(load_backbone(backbone), tmp_path / "bank") as bank:
        for name in ("one", "two"):
            bank.add(name, tmp_path / name)
        answers = bank.predict([(["one", "two"], {"words": row["words"]}) for row in tagged(4, 9)])
        own = predict(bank.activate("two"), tagged(4, 9))["prediction"][:]
    assert [row["two"]["prediction"] for row in answers.rows] == own


def test_windows_of_one_text_are_held_out_together() -> None:
    rows = Dataset.from_list(tagged(40, longest=30))
    windows, _ = encode_tagged(rows, FIELDS, tokenizer(pad=True), None, 8)
    kept, apart = _texts_apart(windows, 0.2, 0)
    assert len(kept) + len(apart) == len(windows) > 40
    assert not set(kept[ROW][:]) & set(apart[ROW][:])
    assert len(set(apart[ROW][:])) == 8


def test_a_broken_scheme_is_read_as_beginnings_and_counted() -> None:
    data = Dataset.from_list([{"words": ["good", "bad"], "tags": ["I-bad", "I-good"]}])
    with pytest.warns(DataWarning, match="has 2 tags I- that go on with nothing"):
        kind_named("tokens").encode(data, FIELDS, tokenizer(pad=True), LabelSpace("tokens", NAMES), None)


def test_parts_of_speech_are_scored_word_by_word() -> None:
    data = Dataset.from_list([{"words": ["good", "bad", "film"], "tags": ["ADJ", "ADJ", "NOUN"]}])
    labels = LabelSpace("tokens", ("ADJ", "NOUN"))
    encoded, _ = encode_tagged(data, FIELDS, tokenizer(pad=True), labels, None)
    logits = np.array([[9, 0], [9, 0], [0, 9], [0, 9], [9, 0]], float)
    found = kind_named("tokens").score([logits], encoded, labels)  # type: ignore[attr-defined]  # of FromTokens
    assert found.scores["accuracy"] == pytest.approx(2 / 3)
    assert found.scores["f1"] == pytest.approx(2 / 3)
    assert found.constant["accuracy"] == pytest.approx(2 / 3)


def test_what_does_not_go_with_tags_is_refused(backbone: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", tagged(16))
    common = ("train", "--backbone", backbone, "--train", train, "--label", "tags", "--output", tmp_path / "task")
    assert "--text" in refusal(*common, "--method", "read", "--kind", "tokens")
    told = refusal(*common, "--method", "synqt", "--kind", "tokens", "--text", "words")
    assert "one vector for a whole row" in told
    assert "'tokens' is what you mean" in refusal(*common, "--method", "read", "--kind", "ner", "--text", "words")
    assert "shots=2" in refusal(*common, "--method", "read", "--kind", "tokens", "--text", "words", "--shots", 2)
    with pytest.raises(DataError, match="text2='x' with kind='tokens'"):
        kind_named("tokens").check_columns(Dataset.from_list(tagged(1)), Fields(text="words", text2="x"))

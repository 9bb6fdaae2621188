"""What holds for every kind of task, and a kind of somebody else's from training to predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

import sidestep as ss
from sidestep.data import DataError, LabelSpace
from sidestep.interface import third_parties
from sidestep.kinds import base, kind_named, kinds, register
from sidestep.kinds.assess import Assessment
from sidestep.kinds.base import PREDICTION
from sidestep.kinds.numbers import Regression
from sidestep.metrics import GREATER_IS_BETTER
from sidestep.tasks.predict import evaluate, predict
from small_tasks import reviews, text_backbone


@pytest.mark.parametrize("name", kinds())
def test_a_kind_says_what_it_is_scored_by_and_what_is_learned(name: str) -> None:
    kind = kind_named(name)
    assert kind.name == name
    assert kind.best in kind.metrics
    assert set(kind.metrics) <= GREATER_IS_BETTER.keys()
    assert kind.answer.format(names="a, b")
    assert kind.best_by(None, 2) == kind.best
    with pytest.raises(ValueError, match=f"metric='luck': two-class {name} problems have"):
        kind.best_by("luck", 2)
    assert kind.stored_labels(["a", "b"]).names == ("a", "b")


def test_a_name_is_taken_once_and_unknown_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))

    class Other(Regression):
        name = "regress"

    with pytest.raises(ValueError, match="'regress' is registered already"):
        register(Other)
    with pytest.raises(DataError, match="kind='sums': choose single, multi"):
        kind_named("sums")


def test_kinds_of_other_packages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def entry_points(group: str) -> list[Any]:
        asked.append(group)
        return []

    monkeypatch.setattr(third_parties, "entry_points", entry_points)
    third_parties.import_third_parties.cache_clear()
    kinds()
    assert asked == ["sidestep.kinds"]


@dataclass(frozen=True)
class Logarithms(LabelSpace):
    def encode(self, rows: Dataset, label_column: str) -> list[float]:
        return np.log1p(rows[label_column][:]).tolist()


class Counts(Regression):
    """Counts, learned by their logarithms."""

    name = "counts"
    answer = "a count"
    metrics, best = ("error",), "error"

    def labels(self, rows: Dataset, fields: Any) -> LabelSpace:
        return Logarithms(self.name, ())

    def stored_labels(self, names: Any) -> LabelSpace:
        return Logarithms(self.name, ())

    def greater_is_better(self, metric: str) -> bool:
        return False

    def compute_metrics(self, data: Any) -> Any:
        return lambda found: self.assess(found.predictions, found.label_ids).scores

    def assess(self, predictions: Any, targets: Any, names: Any = None) -> Assessment:
        return Assessment(scores={"error": float(np.abs(np.expm1(predictions.ravel()) - np.expm1(targets)).mean())})

    def predict(self, model: Any, rows: Dataset, fields: Any, labels: Any, probabilities: Any, **how: Any) -> Any:
        found = super().predict(model, rows, fields, labels, probabilities, **how)
        return {PREDICTION: np.expm1(found[PREDICTION]).tolist()}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    register(Counts)


@pytest.mark.usefixtures("registered")
def test_a_kind_of_ones_own_is_trained_stored_scored_and_predicted(tmp_path: Path) -> None:
    text_backbone(tmp_path / "bert")
    rows = Dataset.from_list([{"text": row["text"], "words": len(row["text"].split())} for row in reviews(32, 0)])
    spec = ss.RunSpec(
        data=ss.DataSpec(train=rows, dev=rows, text="text", label="words", kind="counts"),
        model=ss.ModelSpec(backbone=str(tmp_path / "bert"), method=ss.ReadConfig(rank=4)),
        training=ss.TrainSettings(output=tmp_path / "task", epochs=2, batch_size=8, progress=False),
    )
    _, _, results = ss.train(spec)
    assert results.metric == "error"
    assert results.scores["error"] == pytest.approx(min(epoch["dev_error"] for epoch in results.history))
    model = ss.load(tmp_path / "task")
    assert evaluate(model, rows) == pytest.approx(results.scores, rel=1e-5)
    found = predict(model, rows)
    error = np.abs(np.array(found[PREDICTION][:]) - np.array(rows["words"][:])).mean()
    assert error == pytest.approx(results.scores["error"], rel=1e-5)

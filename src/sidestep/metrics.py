"""Scores of predictions, from scikit-learn and scipy.

Both are imported where a score is computed. So a model can be attached, trained and measured without them.
"""

import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

Kind: TypeAlias = str
"""The name of a kind of task (see `sidestep.kinds`); those scored here have their names in `METRICS`."""
Written = Literal["text2text", "lm"]
WRITTEN: tuple[Written, ...] = get_args(Written)
"""The kinds of problem whose answer is a text that the model writes, by an encoder-decoder or a decoder alone."""
IGNORED = -100
"""A label that the loss of classes and of tokens leaves out; the mean over nothing but such labels is no number."""

RANKS = (1, 5, 10)
"""At which a recall is computed."""
DIRECTIONS = ("i2t", "t2i")
"""Of retrieval: texts are looked for by an image, or images by a text."""

METRICS: dict[str, tuple[str, ...]] = {
    "single": ("accuracy", "f1", "f1_macro", "f1_micro", "matthews"),
    "multi": ("accuracy", "f1_macro", "f1_micro"),
    "regress": ("pearson", "spearman", "mse"),
    "tokens": ("f1", "precision", "recall", "accuracy"),
    "spans": ("exact_match", "f1"),
    "text2text": ("exact_match", "token_f1"),
    "lm": ("exact_match", "token_f1"),
    "retrieval": (*(f"{way}_r{rank}" for way in DIRECTIONS for rank in RANKS), "rsum"),
    "vqa": ("vqa_accuracy", "accuracy"),
    "grounding": ("accuracy_iou50", "mean_iou"),
}
"""The scores of each kind. Of kind "single", "f1" exists for two classes only."""
ARTICLE = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)

GREATER_IS_BETTER: dict[str, bool] = {name: name != "mse" for names in METRICS.values() for name in names}
"""Whether a larger score is the better one."""

AXES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "single": (("rows", "classes"), ("rows",)),
    "multi": (("rows", "classes"), ("rows", "classes")),
    "regress": (("rows",), ("rows",)),
    "retrieval": (("texts", "images"), ("texts",)),
}
"""Of predictions and targets."""


class ScoreWarning(UserWarning):
    """A score that is defined by convention only."""


def scores(
    kind: Kind, predictions: NDArray[Any], targets: NDArray[Any], names: Sequence[str] | None = None
) -> dict[str, float]:
    """The scores of a kind, by name.

    Args:
        kind: "single", one class a row: accuracy, f1_macro, f1_micro, matthews. f1_macro is over the classes that occur
            in predictions or targets. With two classes also f1, of the second one (in the order of the label names: "1"
            of "0" and "1").
            "multi", any number of classes a row: accuracy (the share of rows with exactly the right classes), f1_macro
            over all classes, f1_micro. A class is predicted if its logit is above 0 (probability above 0.5).
            "regress": pearson, spearman, mse. The two correlations are not defined for one row or for values
            that are all the same. They count as 0.0 then, with a warning.
            "retrieval": recalls at 1, 5 and 10 in percent, and rsum, the sum of the six. i2t_r1 is the share of images
            whose most similar text is one of their own (any of several counts). t2i_r1 is the share of texts whose most
            similar image is their own. Of equal similarities, the wrong one counts as the larger.
        predictions: by kind: logits (rows, classes), numbers (rows,) or (rows, 1), or similarities (texts, images).
        targets: by kind: class numbers (rows,), 0 or 1 (rows, classes), numbers (rows,) or (rows, 1), or the number of
            each text's image (texts,).
        names: the classes. They are checked against the width of the predictions.
    Returns:
        Finite numbers only.

    Raises:
        ValueError: for an unknown kind, shapes that do not fit, or values that are not finite.

    Warns:
        ScoreWarning: if a correlation is not defined.
    """
    if kind not in AXES:
        raise ValueError(f"kind={kind!r}: choose {', '.join(AXES)}")
    predictions, targets = np.asarray(predictions), np.asarray(targets)
    if kind == "regress":
        predictions, targets = _flat(predictions), _flat(targets)
    _check(kind, predictions, targets)
    if kind == "regress":
        return _regress(predictions, targets)
    _check_classes(kind, predictions, targets, names)
    if kind == "retrieval":
        return _retrieval(predictions, targets)
    return _single(predictions, targets) if kind == "single" else _multi(predictions, targets)


def similarities(images: NDArray[Any], texts: NDArray[Any], owners: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Predictions and targets of retrieval, from the embeddings of pairs in which an image may stand several times.

    Args:
        images, texts: (pairs, dim), of length one.
        owners: (pairs,) which image it is.

    Returns:
        Similarities (texts, images), each image once, and the number of each text's image (texts,).
    """
    _, first, targets = np.unique(owners, return_index=True, return_inverse=True)
    return texts @ images[first].T, targets


def text_scores(written: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """The scores of texts that a model wrote, over the rows.

    Args:
        written: one text a row.
        targets: the text that each should be.

    Returns:
        exact_match: the share of rows with exactly the target's text (letter case counts, the amount of white space
            does not). Where targets are names of classes, this is accuracy.
        token_f1: the mean over rows of the F1 of the two texts' words, as SQuAD's evaluation counts them: in lower
            case, without punctuation and articles. A row whose target has no such word counts as 1 if nothing but
            punctuation and articles was written either, else as 0.

    Raises:
        ValueError: if there are no rows, or not as many texts as targets.
    """
    if not targets or len(written) != len(targets):
        raise ValueError(f"{len(written)} texts for {len(targets)} targets: give one for each, at least one")
    rows = list(zip(written, targets, strict=True))
    return {
        "exact_match": sum(text.split() == target.split() for text, target in rows) / len(rows),
        "token_f1": sum(_token_f1(_words(text), _words(target)) for text, target in rows) / len(rows),
    }


def span_scores(found: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """The scores of answers that were found in texts, over the questions, as SQuAD 2.0's evaluation has them.

    Texts are compared by their words: in lower case, without punctuation and articles.

    Args:
        found: one text a question. An empty one says that the question has no answer.
        answers: all right answers of each question. Empty if it has none. Those without a word are left out.

    Returns:
        exact_match: the share of questions for which one of the right answers was found.
        f1: the mean over the questions of the F1 of the words, with the right answer that has most in common with what
            was found. Where there is no answer, or none was found, it is 1 or 0.

    Raises:
        ValueError: if there are no questions, or not as many texts as questions.
    """
    if not answers or len(found) != len(answers):
        raise ValueError(f"{len(found)} answers for {len(answers)} questions: give one for each, at least one")
    rows = [
        (_words(text), [words for words in map(_words, right) if words] or [[]])
        for text, right in zip(found, answers, strict=True)
    ]
    return {
        "exact_match": sum(words in right for words, right in rows) / len(rows),
        "f1": sum(max(_token_f1(words, each) for each in right) for words, right in rows) / len(rows),
    }


def normalised(text: str) -> str:
    """A text as SQuAD's evaluation compares it: in lower case, without punctuation and articles."""
    return " ".join(_words(text))


@dataclass(frozen=True)
class ComputeMetrics:
    """`compute_metrics` of a `transformers.Trainer`: the scores of what a model gave for an evaluation set.

    Attributes:
        kind: as in `scores`.
        names: as in `scores`.
    """

    kind: Kind
    names: tuple[str, ...] | None = None

    def __call__(self, evaluation: Any) -> dict[str, float]:
        """The scores."""
        return scores(self.kind, *of_evaluation(self.kind, evaluation), self.names)


def of_evaluation(kind: Kind, evaluation: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Predictions and targets as `scores` takes them, of what a Trainer's evaluation gives.

    Of a tuple of outputs the first one is the logits (of retrieval: images, then texts).
    """
    predictions = evaluation.predictions
    if kind == "retrieval":
        images, texts = predictions
        return similarities(images, texts, evaluation.label_ids)
    return predictions[0] if isinstance(predictions, tuple) else predictions, evaluation.label_ids


def _words(text: str) -> list[str]:
    return ARTICLE.sub(" ", text.lower().translate(PUNCTUATION)).split()


def _token_f1(words: list[str], target: list[str]) -> float:
    if not words or not target:
        return float(words == target)
    return 2 * (Counter(words) & Counter(target)).total() / (len(words) + len(target))


def _single(predictions: NDArray[Any], targets: NDArray[Any]) -> dict[str, float]:
    from sklearn.metrics import f1_score, matthews_corrcoef

    chosen = predictions.argmax(axis=1)
    occurring = np.union1d(targets, chosen)
    # once for all averages: scikit-learn spends most of its time on checks of what it is given
    f1 = f1_score(targets, chosen, labels=occurring, average=None, zero_division=0)
    accuracy = (chosen == targets).mean()
    found = {
        "accuracy": accuracy,
        "f1_macro": f1.mean(),
        "f1_micro": accuracy,  # because each row has one class and one prediction
        # of answers that are all the same it is 0 to scikit-learn too, which warns if there is a single class
        "matthews": matthews_corrcoef(targets, chosen) if len({*chosen}) > 1 else 0.0,
    }
    if predictions.shape[1] == 2:
        found["f1"] = dict(zip(occurring.tolist(), f1, strict=True)).get(1, 0.0)
    return {name: float(found[name]) for name in METRICS["single"] if name in found}


def _multi(predictions: NDArray[Any], targets: NDArray[Any]) -> dict[str, float]:
    from sklearn.metrics import f1_score

    chosen, true = (predictions > 0).astype(int), targets.astype(int)
    return {
        "accuracy": float((chosen == true).all(axis=1).mean()),
        "f1_macro": float(f1_score(true, chosen, average="macro", zero_division=0)),
        "f1_micro": float(f1_score(true, chosen, average="micro", zero_division=0)),
    }


def _retrieval(predictions: NDArray[Any], targets: NDArray[Any]) -> dict[str, float]:
    own = np.zeros(predictions.shape, bool)
    own[np.arange(len(targets)), targets] = True
    # per text, its image's similarity and the number of other images before it. Per image, those of its best text
    right = predictions[own]
    before = {
        "t2i": ((predictions >= right[:, None]) & ~own).sum(axis=1),
        "i2t": ((predictions >= np.where(own, predictions, -np.inf).max(axis=0)) & ~own).sum(axis=0),
    }
    found = {f"{way}_r{rank}": 100 * float((before[way] < rank).mean()) for way in DIRECTIONS for rank in RANKS}
    return {**found, "rsum": sum(found.values())}


def _regress(predictions: NDArray[Any], targets: NDArray[Any]) -> dict[str, float]:
    from scipy import stats

    predictions, targets = predictions.astype(np.float64), targets.astype(np.float64)
    mse = float(np.square(predictions - targets).mean())
    constant = [name for name, values in (("predictions", predictions), ("targets", targets)) if np.ptp(values) == 0]
    if constant:
        warnings.warn(
            f"{' and '.join(constant)} of {len(targets)} rows are all the same: "
            "pearson and spearman are not defined and count as 0.0",
            ScoreWarning,
            stacklevel=3,
        )
        return {"pearson": 0.0, "spearman": 0.0, "mse": mse}
    pearson, spearman = stats.pearsonr(predictions, targets), stats.spearmanr(predictions, targets)
    return {"pearson": float(pearson.statistic), "spearman": float(spearman.statistic), "mse": mse}


def _flat(values: NDArray[Any]) -> NDArray[Any]:
    return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values


def _check(kind: str, predictions: NDArray[Any], targets: NDArray[Any]) -> None:
    if len(predictions) == 0 or len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets: give one for each, at least one")
    wanted, wanted_targets = AXES[kind]
    fits = (predictions.ndim, targets.ndim) == (len(wanted), len(wanted_targets))
    if not fits or (kind == "multi" and predictions.shape != targets.shape):
        raise ValueError(
            f"kind {kind!r}: predictions have shape {predictions.shape}, targets {targets.shape}: "
            f"they should be ({', '.join(wanted)}) and ({', '.join(wanted_targets)})"
        )
    for name, values in (("predictions", predictions), ("targets", targets)):
        bad = int((~np.isfinite(values)).reshape(len(values), -1).any(axis=1).sum())
        if bad:
            raise ValueError(
                f"{name} are not finite in {bad} of {len(values)} rows: the model may have diverged. "
                "Train with a lower learning rate, or in fp32"
            )


def _check_classes(kind: str, predictions: NDArray[Any], targets: NDArray[Any], names: Sequence[str] | None) -> None:
    classes = predictions.shape[1]
    if names and len(names) != classes:
        raise ValueError(f"predictions have {classes} columns, but there are {len(names)} classes: {', '.join(names)}")
    if kind == "retrieval" and len(missing := set(range(classes)) - set(targets.tolist())):
        raise ValueError(f"{len(missing)} of {classes} images have no text: leave them out, or give each one")
    top = 1 if kind == "multi" else classes - 1
    if targets.min() < 0 or targets.max() > top:
        raise ValueError(f"targets are {targets.min()} to {targets.max()}: they should be 0 to {top}")

"""The most used types of models: each works with READ and with a method that mixes tokens, or is refused by a reason.

`python tests/every_type.py` tries every type and method in the same way.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from sweep.catalogue import MOST_USED, catalogue
from sweep.checks import Outcome, outcome
from sweep.subject import Subject

METHODS = ("read", "side_attention")
#: Types that showed a fault once: states that are mixed before the norm, positions of pictures, masks that a model
#: returns, grids that nobody tells, lists in lists, towers of pictures, patterns of names, masks of frames, outputs
#: that are lists.
SHOWED = ("inkling2_text", "hunyuan_vl", "qwen2_audio", "pvt", "cvt", "mobilenet_v2", "git", "blip", "instructblip",
          "modernvbert", "gemma4", "parakeet_ctc", "wav2vec2-bert", "openai-gpt")  # fmt: skip
STAGES = "this backbone is hierarchical"
#: What is refused at `attach`, and words of the reason.
REFUSED: dict[tuple[str, str], str] = {
    ("swin", "side_attention"): STAGES,
    ("swinv2", "side_attention"): STAGES,
    **dict.fromkeys((("pvt", "side_attention"), ("cvt", "side_attention")), STAGES),
    ("convnext", "side_attention"): "this backbone is convolutional",
    ("mobilenet_v2", "side_attention"): "this backbone is convolutional",
}
#: The laws that the bare model keeps and an attached one refuses to be asked, and words of the reason.
REFUSED_LAWS: dict[tuple[str, str], dict[str, str]] = {
    (name, "side_attention"): {"cache": "use_cache=False"} for name in ("mamba2", "blip", "openai-gpt")
}


def built(name: str) -> Subject:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' own, on configs as small as these
            return Subject(catalogue()[name])
    except Exception as error:  # an older transformers may not have the type, or may have another config
        pytest.skip(f"no tiny {name}: {type(error).__name__}: {error}")


def cases() -> Iterator[Any]:
    """Each type with a method. `make test` runs the others where a fault was seen once or something is refused."""
    for number, name in enumerate((*MOST_USED, *SHOWED)):
        for turn, method in enumerate(METHODS):
            pair = name, method
            quick = name in SHOWED or pair in REFUSED or pair in REFUSED_LAWS or number % len(METHODS) == turn
            yield pytest.param(*pair, marks=() if quick else pytest.mark.all_laws)


@pytest.mark.parametrize(("name", "method"), list(cases()))
def test_a_method_keeps_what_the_bare_model_does_or_is_refused_by_a_reason(name: str, method: str) -> None:
    subject = built(name)
    for use in subject.uses:
        check(name, method, outcome(subject, use, method))


@pytest.mark.parametrize(("name", "method"), [("molmo2", "lora"), ("dab-detr", "sherl")])
def test_what_once_failed_in_training_works(name: str, method: str) -> None:
    """Types of tokens that a model wants in training, and a final norm that is asked twice."""
    subject = built(name)
    for use in subject.uses:
        check(name, method, outcome(subject, use, method))


def check(name: str, method: str, found: Outcome) -> None:
    reason = REFUSED.get((name, method))
    assert found.verdict == ("works" if reason is None else "refused"), found
    assert (reason or "") in found.why
    refused = {law: why for law, why in found.laws.items() if why != "kept"}
    expected = {} if reason or not found.laws else REFUSED_LAWS.get((name, method), {})
    assert refused.keys() == {law for law in expected if law in found.laws}, refused
    assert all(words in refused[law] for law, words in expected.items() if law in refused)


def test_what_is_refused_names_types_that_are_tried() -> None:
    assert {name for name, _ in (*REFUSED, *REFUSED_LAWS)} <= {*MOST_USED, *SHOWED}

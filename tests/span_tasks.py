"""Questions with contexts that tiny backbones can learn to answer: the judging word of a text is the answer."""

from __future__ import annotations

import random
from typing import Any

from small_tasks import WORDS

JUDGING = WORDS[:6]
COLUMNS: dict[str, str] = {"text": "question", "text2": "context", "label": "answers"}


def asked(rows: int, seed: int = 0, *, longest: int = 9, without: float = 0.0) -> list[dict[str, Any]]:
    """Rows as SQuAD has them. Contexts have 3 to `longest` words. A share `without` of the questions has no answer."""
    chance = random.Random(seed)
    found = []
    for _ in range(rows):
        words = chance.choices(WORDS[6:], k=chance.randrange(3, longest + 1))
        answers: dict[str, Any] = {"text": [], "answer_start": []}
        if chance.random() >= without:
            place = chance.randrange(len(words))
            words[place] = chance.choice(JUDGING)
            answers = {"text": [words[place]], "answer_start": [len(" ".join([*words[:place], ""]))]}
        found.append({"question": "a film is", "context": " ".join(words), "answers": answers})
    return found

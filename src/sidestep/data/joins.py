"""What stands between texts that are put behind each other: the two of a pair, a decoder's prompt and its answer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sidestep.data.messages import DataError, DataWarning
from sidestep.metrics import Kind

NEWLINE = "\n"
PROBE = ("a", "b")
"""A pair of texts that shows what a tokenizer does with pairs."""
SHOWN = 25
"""Characters of each text in a message."""


@dataclass(frozen=True, kw_only=True)
class Separators:
    """What is put between texts, besides what the tokenizer puts there.

    Attributes:
        pair: between the two texts of a pair.
        answer: between a decoder's prompt and its answer.
    """

    pair: str = ""
    answer: str = ""

    @property
    def prompt_end(self) -> str:
        """What of `answer` stands at the end of the prompt: all but the spaces that it ends in."""
        return self.answer.rstrip(" ")

    @property
    def answer_start(self) -> str:
        """The spaces that `answer` ends in, which the model writes.

        Many tokenizers have one token for a word and the space before it.
        """
        return self.answer[len(self.prompt_end) :]

    def without_start(self, text: str) -> str:
        """An answer without the spaces that were put before it."""
        return text.removeprefix(self.answer_start)


NOTHING = Separators()


def separators_of(given: str | None, tokenizer: Any, *, kind: Kind, pair: bool) -> Separators:
    """What stands between a task's texts.

    Args:
        given: for every join that the task has. None: between the texts of a pair a newline where the tokenizer puts
            nothing there, and else nothing.
        tokenizer: of the backbone. With images it is whatever reads the texts.
        kind: "lm" if answers are written behind prompts.
        pair: whether rows have two texts.

    Raises:
        DataError: if one is given and no texts are put behind each other.

    Warns:
        DataWarning: if the tokenizer drops what stands between the texts of a pair.
    """
    if given is not None and not pair and kind != "lm":
        raise DataError(
            f"separator={given!r}, but no texts are put behind each other: it is for pairs (--text2) and for --kind "
            "lm. Leave it out"
        )
    bare = pair and puts_nothing_between(tokenizer)
    between = (NEWLINE if bare else "") if given is None else given
    if bare and between and _ids(tokenizer, between + PROBE[1]) == _ids(tokenizer, PROBE[1]):
        warnings.warn(
            f"the tokenizer drops {between!r}, so nothing stands between the two texts of a row: choose another one "
            "(--separator ' | ')",
            DataWarning,
            stacklevel=2,
        )
    return Separators(pair=between if pair else "", answer=(given or "") if kind == "lm" else "")


def puts_nothing_between(tokenizer: Any) -> bool:
    """Whether a tokenizer glues the texts of a pair: the tokens of the one stand right behind those of the other."""
    first, second = (_ids(tokenizer, text) for text in PROBE)
    both, glued = tokenizer(*PROBE)["input_ids"], [*first, *second]
    return any(both[start : start + len(glued)] == glued for start in range(len(both)))


def warn_of_glued(prompts: Sequence[str], answers: Sequence[str], tokenizer: Any) -> None:
    """Tells of rows where an answer stands behind its prompt without white space.

    Warns:
        DataWarning: with their count and the first of them.
    """
    rows = list(zip(prompts, answers, strict=True))
    glued = [row for row in rows if _meet(*row)]
    if not glued or _adds_space(tokenizer, *glued[0]):
        return
    prompt, answer = glued[0]
    warnings.warn(
        f"in {len(glued)} of {len(rows)} training rows no white space stands between prompt and answer, so the model "
        f"reads {prompt[-SHOWN:] + answer[:SHOWN]!r}. Put some there with --separator ' ' or '\\n', or say "
        "--separator '' if it is meant so",
        DataWarning,
        stacklevel=2,
    )


def _meet(prompt: str, answer: str) -> bool:
    """Whether both have a character at the join, and neither is white space."""
    return bool(prompt and answer) and not prompt[-1].isspace() and not answer[0].isspace()


def _adds_space(tokenizer: Any, prompt: str, answer: str) -> bool:
    """Whether the tokenizer itself has white space where two texts meet: some have a token for a word's start."""
    before = _ids(tokenizer, prompt)
    text, joined = (tokenizer.decode(ids) for ids in (before, [*before, *_ids(tokenizer, answer)]))
    return joined[len(text) : len(text) + 1].isspace()


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]

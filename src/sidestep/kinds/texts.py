"""Texts that the backbone's own language model head writes: an encoder-decoder's, or a decoder's behind the prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from datasets import Dataset

from sidestep.backbone.processors import tokenizer_of
from sidestep.backbone.vision_language import VisionLanguageProcessor
from sidestep.data import (
    Augmentation,
    CollateWritten,
    Fields,
    Generation,
    LabelSpace,
    Separators,
    decoding,
    encode_pictured,
    encode_prompts,
    encode_targets,
    prompt_limit,
    with_targets,
)
from sidestep.data.joins import NOTHING, warn_of_glued
from sidestep.kinds.assess import Assessment, assess_texts
from sidestep.kinds.base import PREDICTION, Probabilities, TaskKind, register
from sidestep.kinds.running import written
from sidestep.kinds.steps import check_modality
from sidestep.kinds.task_data import Asked, TaskData, stored_generation, stored_separators
from sidestep.metrics import METRICS, Written
from sidestep.model.attach import Attached
from sidestep.model.side_model import SideModel


class Texts(TaskKind):
    """What both kinds have in common."""

    writes: ClassVar[Written]
    metrics, best = METRICS["text2text"], "exact_match"

    def strata(self, fields: Fields) -> None:
        """None: texts are no classes."""
        return None

    def generation(
        self,
        train: Dataset,
        dev: Dataset,
        fields: Fields,
        processor: Any,
        labels: LabelSpace,
        separators: Separators,
        asked: Asked,
    ) -> tuple[Generation, int | None]:
        """As many tokens as the longest target of the training rows has, if nobody says."""
        texts = [labels.encode(part, fields.label or "") for part in (train, dev)]
        parts = [self.targets(part, fields, processor, separators) for part in texts]
        longest = max(map(len, parts[0])) if asked.max_new_tokens is None else asked.max_new_tokens
        found = Generation(max_new_tokens=longest, num_beams=asked.num_beams)
        return found, self.limit(tokenizer_of(processor), asked, parts, found, pair=fields.text2 is not None)

    def limit(
        self, tokenizer: Any, asked: Asked, targets: list[list[list[int]]], how: Generation, *, pair: bool
    ) -> int | None:
        """Tokens kept of what is read."""
        return asked.max_length

    def targets(self, texts: list[str], fields: Fields, processor: Any, separators: Separators) -> list[list[int]]:
        """The texts to write as tokens."""
        start = separators.answer_start
        return encode_targets(texts, tokenizer_of(processor), self.writes, fields.label or "", start=start)

    def encode(
        self,
        rows: Dataset,
        fields: Fields,
        processor: Any,
        labels: LabelSpace | None,
        max_length: int | None,
        augment: Augmentation | None = None,
        *,
        separators: Separators = NOTHING,
    ) -> tuple[Dataset, int]:
        """Prompts, with labels the texts to write too."""
        check_modality(processor, fields)
        own, cut = fields if labels is not None else replace(fields, label=None), 0
        if pictured := fields.image is not None:
            prompts = encode_pictured(rows, own, processor, None, max_length, end=separators.prompt_end)
        else:
            prompts, cut = encode_prompts(rows, own, processor, self.writes, max_length, separators)
        if labels is not None:
            texts = labels.encode(rows, fields.label or "")
            targets = self.targets(texts, fields, processor, separators)
            prompts = with_targets(prompts, texts, targets, tokenizer_of(processor))
        return decoding(prompts) if pictured else prompts, cut

    def collate(self, fields: Fields, processor: Any) -> CollateWritten:
        """Prompts and targets, a decoder's one behind the other."""
        return CollateWritten(processor, padding_side="right" if self.writes == "lm" else None, kind=self.writes)

    def head(self, data: TaskData, pool: Any = None) -> None:
        """None: the backbone's own head writes."""
        if pool is not None:
            raise ValueError(
                f"pool={pool!r} with problem {self.name!r}: a language model head reads all tokens. Leave it out"
            )

    def blank_head(self, outputs: int, pool: Any = None) -> None:
        """The same for a plan."""
        if pool is not None:
            raise ValueError(f"--kind {self.name} is written by the backbone's own head: leave --pool out")

    def check(self, model: Attached, batch_size: int) -> None:
        """Refuse a model that does not write such texts, or of which nothing is trained."""
        assert isinstance(model, SideModel)
        if model.writes != self.writes:
            raise ValueError(
                f"the problem is {self.name!r}, but {type(model.backbone).__name__} as it is attached writes no such "
                f"text: take the backbone of load_backbone(..., writes={self.writes!r}) and the head of head_for(data)"
            )
        if model.untrained is not None:
            raise ValueError(model.untrained)

    def judge(
        self, model: Attached, encoded: Dataset, fields: Fields, labels: LabelSpace, generation: Generation, **how: Any
    ) -> Assessment:
        """Scores of what is written. To write, the whole backbone runs."""
        how.pop("collate", None)
        assert isinstance(model, SideModel)
        return assess_texts(written(model, encoded, generation, **how), encoded["target"][:])

    def predict(
        self,
        model: Attached,
        rows: Dataset,
        fields: Fields,
        labels: LabelSpace,
        probabilities: Probabilities,
        **how: Any,
    ) -> dict[str, list[Any]]:
        """What is written for each row."""
        assert isinstance(model, SideModel)
        stored = model.extras.get("preprocessing") or {}
        texts = written(model, rows, stored_generation(stored), **how)
        return {PREDICTION: [stored_separators(stored).without_start(text) for text in texts]}


@register
class Text2Text(Texts):
    """A text that an encoder-decoder writes."""

    name = "text2text"
    answer = "a text to write"
    writes = "text2text"


@register
class LanguageModel(Texts):
    """A text that a decoder writes behind the prompt."""

    name = "lm"
    answer = "a text to write behind it"
    writes = "lm"

    def generation(
        self,
        train: Dataset,
        dev: Dataset,
        fields: Fields,
        processor: Any,
        labels: LabelSpace,
        separators: Separators,
        asked: Asked,
    ) -> tuple[Generation, int | None]:
        """With a warning where prompts and answers are glued and nobody chose that."""
        if asked.separator is None and not _closes(processor):
            prompts = train.with_format(None)[fields.text2 or fields.text or ""][:]
            warn_of_glued(prompts, labels.encode(train, fields.label or ""), tokenizer_of(processor))
        return super().generation(train, dev, fields, processor, labels, separators, asked)

    def limit(
        self, tokenizer: Any, asked: Asked, targets: list[list[list[int]]], how: Generation, *, pair: bool
    ) -> int | None:
        """Room is left for the text to write, and for the longest target."""
        both = [ids for part in targets for ids in part]
        return prompt_limit(tokenizer, asked.max_length, both, how.max_new_tokens, pair=pair)


def _closes(processor: Any) -> bool:
    """Whether a processor itself puts something between prompt and answer."""
    return isinstance(processor, VisionLanguageProcessor) and processor.parts.closes

"""What kinds have in common that read a picture with a text: a question about it, or a phrase that names a part."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from sidestep.backbone.processors import read_by
from sidestep.data import DataError, Fields
from sidestep.kinds.base import TaskKind
from sidestep.kinds.task_data import Asked, TaskData


class Pictured(TaskKind):
    """A kind whose rows have a picture and a text."""

    pictured = True

    def strata(self, fields: Fields) -> None:
        """None: rows have no classes."""
        return None

    def prepare(self, train: Dataset, dev: Dataset | None, fields: Fields, processor: Any, asked: Asked) -> TaskData:
        """As of every kind, of rows with both.

        Raises:
            DataError: for a backbone that reads one of the two, and for rows with one of them.
        """
        if fields.text is None or fields.image is None:
            raise DataError(
                f"kind={self.name!r} reads a picture and a text of each row: name both columns (--image and --text)"
            )
        if read_by(processor) != "both":
            raise DataError(
                f"kind={self.name!r} reads a picture with a text, and {type(processor).__name__} reads one of them. "
                "Choose an encoder of both (ViLT), a vision-language model or a dual encoder (CLIP)"
            )
        if asked.shots is not None:
            raise DataError(f"shots={asked.shots}: {self.name} has no classes. Leave --shots out")
        return super().prepare(train, dev, fields, processor, asked)

"""What is known of the tasks of a bank that is served, each learned once from its files and its model."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sidestep.backbone import picture_token, token_rows, trunk_of
from sidestep.backbone.processors import load_processor, read_by, tokenizer_of
from sidestep.backbone.source import source_of
from sidestep.data import Fields
from sidestep.data.joins import NOTHING
from sidestep.disk.task_folder import TaskError
from sidestep.kinds.base import kind_named
from sidestep.kinds.from_logits import FromLogits
from sidestep.kinds.from_tokens import FromTokens
from sidestep.kinds.task_data import stored_separators
from sidestep.model.attach import Attached
from sidestep.model.pair_model import PairModel
from sidestep.model.side_model import SideModel
from sidestep.serve.embeddings import Pooled, Texts, check_pooled
from sidestep.serve.forms import Alone, Form, Known, Reading, Rows, Windows
from sidestep.serve.settings import ServeSettings
from sidestep.tasks.bank import TaskBank
from sidestep.tasks.predict import labels_of_task
from sidestep.tasks.predict_together import reads_of

FIRST: Mapping[str, Fields] = {
    "text": Fields(text="text"),
    "image": Fields(image="image"),
    "audio": Fields(audio="audio"),
    "both": Fields(text="text", image="image"),
}
"""Columns of a task that does not say which it reads, by what its processor reads."""
NOT_ALONE = "it is a task of retrieval, which compares rows. Its texts have embeddings (/v1/embeddings)"


class KnownTasks:
    """What is known of a bank's tasks. `learn` is called in the bank's turn, and all else by any thread."""

    def __init__(self, bank: TaskBank, settings: ServeSettings) -> None:
        self.bank, self.settings = bank, settings
        self._known: dict[str, Known] = {}
        self._forms: dict[str, Form] = {}
        self._source = source_of(bank.backbone).id
        # callers need not know where it lies
        self.backbone = (Path(self._source).name if Path(self._source).exists() else self._source) or "backbone"
        self._pooled: Known | None = None

    def get(self, name: str) -> Known | None:
        """A task that was learned, as its files are now. None if there is none.

        Raises:
            TaskError: if the bank holds none of this name, or it is damaged.
        """
        known = self._known.get(name)
        return known if known is not None and known.identity == self.bank.store.identity(name) else None

    def learn(self, name: str) -> Known:
        """A task, read and put on the backbone once.

        Raises:
            TaskError: if the bank holds none of this name, or it is damaged or cannot be served.
            DataError: if it does not say what it predicts.
        """
        known = self.get(name)
        if known is None:
            model = self.bank.activate(name)
            known = self._known[name] = self._look(name, model)
        return known

    def keep(self, names: list[str]) -> None:
        """Forget all tasks but these."""
        for name in self._known.keys() - set(names):
            with suppress(KeyError):
                del self._known[name]
        used = {form.key for known in [*self._known.values()] for form in (known.form, known.embeds) if form}
        for key in [key for key, form in [*self._forms.items()] if form.key not in used]:
            with suppress(KeyError):
                del self._forms[key]

    def pooled(self) -> Known:
        """The bare backbone as what gives embeddings of texts. In the bank's turn.

        Raises:
            DataError: if the backbone reads no texts.
            LoadError: if its tokenizer cannot be loaded.
        """
        if self._pooled is None:
            check_pooled(self.bank.backbone)
            tokenizer, kind = load_processor(self._source), kind_named("single")
            form = Pooled("pooled", Fields(text="text"), kind, tokenizer, None, NOTHING)
            form.takes = frozenset(inspect.signature(trunk_of(self.bank.backbone).forward).parameters)
            form.most = token_rows(self.bank.backbone)[0]
            self._pooled = Known(self.backbone, "", kind, kind.stored_labels(()), None, "it is the backbone", form)
        return self._pooled

    # --- learning ----------------------------------------------------------------------------------------------------

    def _look(self, name: str, model: Attached) -> Known:
        store, processor = self.bank.store, model.extras.get("processor")
        if processor is None:
            raise TaskError(f"{name!r} holds no tokenizer and no other processor: save it with one, and add it again")
        config, identity, labels = store.config(name), store.identity(name), labels_of_task(model)
        stored = config["preprocessing"] or {}
        given = Fields() if "fields" in stored else FIRST[read_by(processor)]
        reads, kind = reads_of(name, config, given), kind_named(labels.kind)
        if isinstance(model, PairModel):
            key = f"texts {reads.key}"
            texts = self._forms.get(key)
            if texts is None:
                own = copy.deepcopy(tokenizer_of(processor))
                texts = self._forms[key] = Texts(key, Fields(text="text"), kind, own, stored.get("max_length"), NOTHING)
                texts.takes = frozenset(inspect.signature(model.forward).parameters)
                texts.most = token_rows(model.text.backbone)[0]
            return Known(name, identity, kind, labels, None, NOT_ALONE, texts)
        sort: type[Reading] = Alone
        if isinstance(model, SideModel) and isinstance(kind, FromLogits | FromTokens):
            sort = Rows if isinstance(kind, FromLogits) else Windows
        # tasks that run alone wait in batches of their own, so that no row runs through a task that it did not ask
        shares = isinstance(model, SideModel) and model.delta is None and model.head is not None
        apart = name if sort is Alone or not shares else ""
        how: dict[str, Any] = {"max_tokens": self.settings.max_tokens} if sort is Windows else {}
        key = json.dumps([sort.__name__, kind.name if sort is not Rows else "", apart, reads.key])
        form = self._forms.get(key)
        if form is None:
            form = self._forms[key] = sort(
                key,
                reads.fields,
                kind,
                # reading threads cut texts by the tokenizer's settings, which must not change under the model's thread
                copy.deepcopy(processor),
                stored.get("max_length"),
                stored_separators(stored),
                takes=frozenset(inspect.signature(model.forward).parameters),
                most=token_rows(model.parts[-1].backbone)[0],
                picture=picture_token(self.bank.backbone),
                writes=kind.writes is not None,
                **how,
            )
        return Known(name, identity, kind, labels, form)

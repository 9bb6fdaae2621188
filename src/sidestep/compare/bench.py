"""What contenders are run on: a loaded backbone, and a task's rows prepared for it once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from sidestep.backbone import Digest, joined
from sidestep.backbone.configs import config_of
from sidestep.backbone.families import DUAL_FAMILIES, Pool
from sidestep.backbone.gguf import gguf_parts, is_gguf
from sidestep.backbone.load import check_writes, load_backbone, load_pair
from sidestep.backbone.processors import PairProcessor, load_pair_processor, load_processor, read_by
from sidestep.backbone.source import TIMM
from sidestep.backbone.vision_language import PicturedProcessor, VisionLanguageProcessor
from sidestep.compare.spec import Attention, Backbone, Comparison, Contender, Holds, Task, in_words
from sidestep.data import DataError, DataWarning, Fields
from sidestep.data.contents import content_of
from sidestep.data.media import undecoded
from sidestep.kinds.base import kind_named
from sidestep.kinds.prepare import hold_out, prepare
from sidestep.kinds.task_data import TaskData
from sidestep.methods import WeightDelta, method_of
from sidestep.metrics import Written
from sidestep.model.attach import Attached, attach, detach, digests_of
from sidestep.model.heads import HeadConfig
from sidestep.model.side_model import SideModel
from sidestep.model.token_loss import LmLoss
from sidestep.training.run import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A backbone in memory, to which one contender after the other is attached.

    Attributes:
        spec: what was asked for.
        model: the backbone, on its device.
        processor: its tokenizer, image processor or feature extractor.
        pictured: whether some of its tasks are of pictures with texts.
        known: the digests of its weights, of a dual encoder those of each tower.
        precision: "bf16 autocast", or the dtype of the weights.
        attention: implementation.
        writes: the kind of its tasks if those are texts to write. The backbone has its language model head then.
        measured_as: the kind whose head is there when memory and time are measured.
    """

    spec: Backbone
    model: nn.Module
    processor: Any
    known: tuple[Digest, ...]
    precision: str
    attention: str
    pictured: bool = False
    writes: Written | None = None
    measured_as: str = "single"

    @classmethod
    def load(
        cls,
        spec: Backbone,
        *,
        attention: Attention | None = None,
        bf16: bool = False,
        pictured: bool = False,
        writes: Written | None = None,
        measured_as: str = "single",
    ) -> Bench:
        """The backbone on the accelerator, or on the CPU where there is none.

        Raises:
            LoadError: if it cannot be loaded.
            ValueError: if its attention cannot be chosen.
        """
        model: nn.Module
        if is_dual(spec):
            model = load_pair(
                spec.model, spec.text_model, dtype=spec.dtype, revision=spec.revision, quantize=spec.quantize
            )
        else:
            model = load_backbone(
                spec.model, dtype=spec.dtype, revision=spec.revision, writes=writes, quantize=spec.quantize
            )
        if attention is not None:
            _set_attention(model, attention, spec.name)
        model.to(device())
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        return cls(
            spec=spec,
            model=model,
            processor=processor_of(spec, pictured=pictured),
            known=tuple(digests_of(model)),
            precision="bf16 autocast" if bf16 else dtype,
            attention=getattr(getattr(model, "config", None), "_attn_implementation", None) or "timm's own",
            pictured=pictured,
            writes=writes,
            measured_as=measured_as,
        )

    @property
    def reads_text(self) -> bool:
        """Whether the backbone reads texts, alone, with pictures or in pairs (images or sounds otherwise)."""
        return read_by(self.processor) in ("text", "both")

    @property
    def is_dual(self) -> bool:
        """Whether it is a dual encoder, which reads pairs."""
        return isinstance(self.processor, PairProcessor)

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return next(self.model.parameters()).device

    def attach(self, contender: Contender, head: HeadConfig | None, seed: int) -> Attached:
        """The contender on the backbone, with weights of this seed. `detach` brings the backbone back."""
        torch.manual_seed(seed)
        return attach(
            self.model,
            contender.config,
            head=head,
            backbone_noise=contender.noise,
            checkpoint="late" if contender.checkpoint else None,
            keep=contender.keep,
            lm_loss=self.lm_loss,
        )

    def model_spec(self, contender: Contender) -> ModelSpec:
        """The contender as `sidestep train` would be asked for it."""
        return ModelSpec(
            backbone=self.spec.model,
            text_backbone=self.spec.text_model,
            method=contender.config,
            pool=self.pool(contender),
            backbone_noise=contender.noise,
            checkpoint="late" if contender.checkpoint else None,
            keep=contender.keep,
            dtype=self.spec.dtype,
            revision=self.spec.revision,
            quantize=self.spec.quantize,
        )

    @property
    def lm_loss(self) -> LmLoss:
        """How the loss of written texts is computed: as `sidestep train` does it."""
        return "chunked" if self.writes else "own"

    def pool(self, contender: Contender) -> Pool | None:
        """What the contender's head reads. None: the default of the backbone's family."""
        return contender.pool or self.spec.pool

    def refusal(self, contender: Contender) -> str | None:
        """Why the contender cannot be run: it does not work on this backbone, trains nothing, or needs a library."""
        try:
            model = self.attach(contender, self.blank_head(contender), seed=0)
        except (ValueError, ModuleNotFoundError) as error:
            return str(error)
        try:
            return model.untrained if isinstance(model, SideModel) else None
        finally:
            detach(model)

    def blank_head(self, contender: Contender, pool: Pool | None = None) -> HeadConfig | None:
        """A head for two classes that reads what the contender's reads (else `pool`). None if texts are written.

        It is a head of pairs on a dual encoder, and one of every token where all tasks are such.
        """
        return None if self.writes else kind_named(self.measured_as).blank_head(2, self.pool(contender) or pool)

    def settings(self, contender: Contender) -> dict[str, Any]:
        """What a result says of backbone and contender."""
        changes_weights = issubclass(method_of(contender.config).implementation, WeightDelta)
        return {
            "backbone": self.spec.name,
            "model": self._model(),
            "digest": (joined(self.known) if self.is_dual else self.known[0]).exact[:16],
            "pool": self.pool(contender),
            "contender": contender.name,
            "method": contender.method,
            "config": contender.config.to_dict(),
            "checkpoint": contender.checkpoint,
            # what is new is told only where it is not as ever, so that results of before are found again
            **({} if contender.keep == "full" else {"keep": contender.keep}),
            **({} if self.spec.quantize is None else {"quantize": self.spec.quantize}),
            "noise": contender.noise or ("own" if changes_weights else "eval"),
            "precision": self.precision,
            "attention": self.attention,
            "device": self.device.type,
            "optimizer": "AdamW",
        }

    def _model(self) -> str:
        """The model's id. A folder is given by its class and its name, not by where it lies."""
        if self.spec.text_model is not None:
            both = (self.spec.model, self.spec.text_model)
            names = " and ".join(Path(name).name if Path(name).exists() else name for name in both)
            return f"{type(self.model).__name__} of {names}"
        folder = Path(self.spec.model)
        if is_gguf(self.spec.model):
            return f"{type(self.model).__name__} of {gguf_parts(self.spec.model)[1]}"
        if folder.exists():
            return f"{type(self.model).__name__} of the folder {folder.name!r}"
        name, at, file = self.spec.model.partition("@")
        return f"{name}{at}{Path(file).name}"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A task's rows, cut to what the comparison uses.

    Attributes:
        task: what was asked for.
        train, dev: as read.
    """

    task: Task
    train: Dataset
    dev: Dataset

    @classmethod
    def of(cls, task: Task, comparison: Comparison) -> Rows:
        """At most the comparison's number of rows: the first of a permutation with seed 0. With shots all rows stay.

        Raises:
            DataError: if the rows cannot be read. The message names the task.
        """
        try:
            train, dev = task.read()
        except DataError as error:
            raise DataError(f"task {task.name!r}: {error}") from error
        most = None if task.shots is not None else task.rows or comparison.rows
        return cls(task=task, train=_first(train, most), dev=_first(dev, comparison.dev_rows))


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A task's rows as a backbone reads them.

    Attributes:
        task: what was asked for.
        data: the training rows and dev, by the seed of a run. With shots every seed has rows of its own.
        trial: the training rows in two parts, for the choice of a rate. Dev rows are in neither.
        fingerprint: of training and dev rows.
        trial_fingerprint: of the training rows.
    """

    task: Task
    data: Mapping[int, TaskData]
    trial: TaskData
    fingerprint: str
    trial_fingerprint: str

    @classmethod
    def of(cls, rows: Rows, processor: Any, comparison: Comparison) -> Prepared:
        """The rows as token ids, pixels or what is heard.

        Raises:
            DataError: if columns or labels are unusable. The message names the task.
        """
        fields, seed = rows.task.fields, comparison.seeds[0]
        shots = rows.task.shots
        how: dict[str, Any] = {
            "kind": rows.task.problem,
            "max_length": comparison.max_length,
            "shots": shots,
            "separator": rows.task.separator,
            "frames": rows.task.frames,
            "answers": rows.task.answers,
            "boxes": rows.task.boxes,
        }
        try:
            data = dict.fromkeys(comparison.seeds, prepare(rows.train, rows.dev, fields, processor, seed=seed, **how))
            for other in comparison.seeds[1:] if shots is not None else ():
                data[other] = prepare(rows.train, rows.dev, fields, processor, seed=other, **how)
            inner, outer = hold_out(rows.train, rows.task.problem, fields, comparison.holdout, seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DataWarning)  # the same rows have been warned of
                trial = prepare(inner, outer, fields, processor, seed=seed, **how)
        except DataError as error:
            raise DataError(f"task {rows.task.name!r}: {error}") from error
        parts = [fingerprint(part, fields) for part in (rows.train, rows.dev)]
        return cls(task=rows.task, data=data, trial=trial, fingerprint="-".join(parts), trial_fingerprint=parts[0])


def device() -> torch.device:
    """Where runs take place: the accelerator, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def pairs(comparison: Comparison) -> dict[str, tuple[Task, ...]]:
    """The tasks of each backbone: those of texts, of images, of sounds, of pictures with texts, or of pairs.

    Raises:
        LoadError: if a backbone has no tokenizer, image processor or feature extractor, or does not write what its
            tasks ask for.
        ValueError: if nothing in the comparison reads a task, or a backbone has none, or tasks of several sorts.
    """
    found, used = {}, set()
    pictured = any(task.pictured for task in comparison.tasks)
    for backbone in comparison.backbones:
        reads = _read_by(backbone, pictured=pictured)
        tasks = tuple(task for task in comparison.tasks if task.holds in reads)
        if not tasks:
            words = " and ".join(in_words(one) for one in reads)
            raise ValueError(f"backbone {backbone.name!r} reads {words}, but no task has any: add one, or leave it out")
        if (writes := written_by(tasks)) is not None:
            check_writes(backbone.model, writes, revision=backbone.revision)
        found[backbone.name] = tasks
        used |= {task.name for task in tasks}
    for task in comparison.tasks:
        if task.name not in used:
            holds = in_words(task.holds)
            raise ValueError(
                f"task {task.name!r} is of {holds}, but no backbone reads {holds}: add one, or leave it out"
            )
    return found


def _read_by(backbone: Backbone, *, pictured: bool) -> tuple[Holds, ...]:
    """What a backbone reads. Whether it reads pictures with texts is looked at only if some rows are `pictured`."""
    processor = processor_of(backbone, pictured=pictured)
    if isinstance(processor, PairProcessor):
        return ("pairs",)
    if isinstance(processor, PicturedProcessor):
        return ("text", "pictured") if isinstance(processor, VisionLanguageProcessor) else ("pictured",)
    return (read_by(processor),)


def is_dual(spec: Backbone) -> bool:
    """Whether a backbone is a dual encoder, which reads pairs, or two encoders that become one."""
    if spec.text_model is not None:
        return True
    return not spec.model.startswith(TIMM) and config_of(spec.model, spec.revision).model_type in DUAL_FAMILIES


def processor_of(spec: Backbone, *, pictured: bool = False) -> Any:
    """The tokenizer, image processor or feature extractor of a backbone. Of a dual encoder a `PairProcessor`.

    Args:
        spec: the backbone.
        pictured: whether rows are pictures with texts, which a `PicturedProcessor` reads.

    Raises:
        LoadError: if there is none.
    """
    if is_dual(spec):
        return load_pair_processor(spec.model, spec.text_model, revision=spec.revision)
    return load_processor(spec.model, revision=spec.revision, pictures=pictured)


def written_by(tasks: Sequence[Task]) -> Written | None:
    """The kind of a backbone's tasks if these are texts to write.

    Raises:
        ValueError: if only some are texts to write, or they are of two kinds. A backbone has one head for all.
    """
    kinds = {task.name: None if task.problem is None else kind_named(task.problem).writes for task in tasks}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{name}: {kind or 'none is written'}" for name, kind in kinds.items())
        raise ValueError(f"some tasks are texts to write and others are not ({told}): compare them one after the other")
    return next(iter(kinds.values()), None)


def measured_as(tasks: Sequence[Task]) -> str:
    """The kind whose head is measured: that of a backbone's tasks if it reads every token of them all or pairs.

    Else classes.
    """
    kinds = {task.problem for task in tasks}
    kind = kinds.pop() if len(kinds) == 1 else None
    return kind if kind is not None and (kind_named(kind).of_tokens or kind_named(kind).dual) else "single"


def fingerprint(rows: Dataset, fields: Fields) -> str:
    """12 hexadecimal digits of the cells that are read, in order. Of images and sounds, the files' bytes count."""
    digest = sha256()
    for name in (fields.text, fields.text2, fields.label):
        if name is not None:
            digest.update(repr(rows.with_format(None)[name][:]).encode())
    if fields.files is not None:
        _, column = fields.files
        for cell in undecoded(rows, column)[column]:
            digest.update(content_of(cell))
    return digest.hexdigest()[:12]


def _first(rows: Dataset, count: int | None) -> Dataset:
    return rows if count is None or count >= len(rows) else rows.shuffle(seed=0).select(range(count))


def _set_attention(model: nn.Module, attention: Attention, name: str) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"attention={attention!r}: the attention of backbone {name!r} is timm's own. Leave it out")
    model.set_attn_implementation(attention)

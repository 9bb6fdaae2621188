"""One call for what `sidestep train` does: rows and a backbone by name, a method, a trained task in a folder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset

from sidestep import ranks
from sidestep.backbone import Noise
from sidestep.backbone.formats import Quantize
from sidestep.backbone.load import check_writes, load_backbone, load_pair
from sidestep.backbone.pixels import ImageTransform, adjusted
from sidestep.backbone.placement import DeviceMap, MaxMemory
from sidestep.backbone.processors import PairProcessor, load_pair_processor, load_processor
from sidestep.backbone.recompute import Checkpoint
from sidestep.data import Fields, TableOptions
from sidestep.data.augment import NONE
from sidestep.data.boxes import BoxForm
from sidestep.disk.atomic import refuse_inputs
from sidestep.disk.features import FeatureStore
from sidestep.disk.sources import backbones_at, rows_at
from sidestep.interface.keep import Keep
from sidestep.kinds.base import TaskKind, kind_named
from sidestep.kinds.prepare import head_for, prepare, read_rows
from sidestep.kinds.task_data import TaskData
from sidestep.measure.rows import rows_at_once
from sidestep.methods import MethodConfig
from sidestep.model.attach import Attached, attach, detach
from sidestep.model.heads import Retrieve
from sidestep.model.sharding import shard
from sidestep.model.token_loss import LmLoss
from sidestep.tasks.features import kept_features
from sidestep.training.checkpoints import as_begun, check_output, parts_of
from sidestep.training.launchers import asks_for_fsdp, check_shardable
from sidestep.training.results import Results
from sidestep.training.settings import TrainSettings
from sidestep.training.train import readable
from sidestep.training.train import train as train_model


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The rows of a task. For what is not told here, see the arguments of `kinds.prepare.prepare`.

    Attributes:
        train, dev: file, folder or hub id, or a data set. Without dev rows a share of the training rows is held out.
        text, text2, image, audio, video, label: the columns that are read. A model of pictures and texts reads text and
            image, retrieval text and image or video.
        kind: of task (see `sidestep.kinds`). None: by the labels.
        table: how files are read.
        train_split, dev_split: of a hub id or a folder of images, sounds or videos.
        transform: used in the place of the backbone's image processor.
        image_size, normalize: what is changed in the image processor.
    """

    train: str | Path | Dataset
    dev: str | Path | Dataset | None = None
    text: str | None = None
    text2: str | None = None
    image: str | None = None
    audio: str | None = None
    video: str | None = None
    label: str | None = "label"
    kind: str | None = None
    table: TableOptions = field(default_factory=TableOptions)
    train_split: str = "train"
    dev_split: str = "validation"
    dev_fraction: float = 0.1
    max_length: int | None = None
    shots: int | None = None
    shots_seed: int | None = None
    transform: ImageTransform | None = None
    image_size: int | None = None
    normalize: str | None = None
    augment: str = NONE
    skip_bad_files: bool = False
    max_new_tokens: int | None = None
    num_beams: int = 1
    separator: str | None = None
    frames: int | None = None
    answers: int | None = None
    boxes: BoxForm = "xyxy"

    @property
    def task_kind(self) -> TaskKind | None:
        """The kind that was named."""
        return None if self.kind is None else kind_named(self.kind)

    @property
    def fields(self) -> Fields:
        """The columns."""
        dual = self.task_kind is not None and self.task_kind.dual
        label = None if dual else self.label
        files = {"image": self.image, "audio": self.audio, "video": self.video}
        return Fields(text=self.text, text2=self.text2, label=label, **files)

    def rows(self, source: str | Path | Dataset, split: str) -> Dataset:
        """The rows of `train` or `dev`."""
        if isinstance(source, Dataset):
            return source
        return read_rows(str(source), self.fields, self.table, self.kind, split=split)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What is trained.

    Attributes:
        backbone: hub id, folder or "timm:NAME" (see `load_backbone`). Of a dual encoder the whole, or its image tower.
        method: its config.
        text_backbone: the text encoder, where the two encoders are not a pair yet (of retrieval, and of VQA).
        head: of a dual encoder. None: by the data.
        pool: what a Sidestep head reads.
        own_head: whether the backbone's own head is trained instead.
        backbone_noise, checkpoint, keep, lm_loss: as of `attach`.
        drop_path, dtype, revision, quantize: as of `load_backbone`.
        device_map, offload_folder, max_memory: as there.
        shard: whether the blocks' weights are shared out among the processes (see `model.sharding.shard`). An FSDP
            config of accelerate's launcher asks for that too.
    """

    backbone: str | Path
    method: MethodConfig
    text_backbone: str | Path | None = None
    head: Retrieve | None = None
    pool: Any = None
    own_head: bool = False
    backbone_noise: Noise | None = None
    checkpoint: Checkpoint | None = None
    keep: Keep = "full"
    lm_loss: LmLoss = "chunked"
    drop_path: float | None = None
    dtype: str | None = None
    revision: str | None = None
    shard: bool = False
    quantize: Quantize | None = None
    device_map: DeviceMap | None = None
    offload_folder: str | Path | None = None
    max_memory: MaxMemory | None = None

    @property
    def name(self) -> str:
        """The backbone's."""
        return str(self.backbone)

    @property
    def text_name(self) -> str | None:
        """The text encoder's."""
        return None if self.text_backbone is None else str(self.text_backbone)


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A run.

    Attributes:
        data: the rows.
        model: what is trained on them.
        training: how, and where the task goes.
        recipe: the name of the recipe that the run follows and what differs from it. The results tell it.
    """

    data: DataSpec
    model: ModelSpec
    training: TrainSettings
    recipe: dict[str, Any] | None = None


class Watch(Protocol):
    """Is told how far a run is."""

    def read(self, rows: int) -> None:
        """So many training rows were read, and are being prepared."""

    def started(self, model: Attached, data: TaskData, settings: TrainSettings) -> None:
        """Training begins."""

    def tell(self, line: str) -> None:
        """Something to know before the first step."""


def train(
    spec: RunSpec,
    watch: Watch | None = None,
    *,
    backbone: Any = None,
    data: TaskData | None = None,
    store: FeatureStore | None = None,
) -> tuple[Attached, TaskData, Results]:
    """Train a task and save it in `spec.training.output`.

    Several runs may share what takes time to make: a comparison's contenders, a demo's contestants.

    Args:
        spec: the run.
        watch: is told how far it is.
        backbone: as it was loaded by `spec.model`, with nothing attached. `detach` brings it back, and a run that fails
            does that. None: it is loaded.
        data: as it was prepared by `spec.data`. None: the rows are read.
        store: in memory, for features. See `training.train`.

    Returns:
        The model with the kept weights, in eval mode. The rows that it was trained on. The contents of results.json.

    Raises:
        OutputError: if the output is taken, or one of the inputs.
        LoadError: if the backbone cannot be loaded.
        DataError: if the rows cannot be used.
        UnsupportedBackbone: if the method cannot work on the backbone.
        ValueError: if settings do not go together.
        TrainError: if training diverges or memory runs out. Checkpoints stay.
    """
    with ranks.together():
        return _train(spec, watch if ranks.is_first() else None, backbone, data, store)


def _train(
    spec: RunSpec, watch: Watch | None, backbone: Any, data: TaskData | None, store: FeatureStore | None
) -> tuple[Attached, TaskData, Results]:
    spec = _as_launched(spec)
    ranks.first(lambda: check_places(spec))
    settings = as_begun(spec.training)
    data = task_data(spec, watch) if data is None else data
    model = attached(spec, data, backbone)
    try:
        if spec.model.shard:
            check_shardable(model, spec.training)
            shard(model)
        if watch is not None:
            watch.started(model, data, settings)
        tell = None if watch is None else watch.tell
        results = train_model(model, data, settings, recipe=spec.recipe, tell=tell, store=store)
    except BaseException:
        if backbone is not None:
            detach(model)
        raise
    return model, data, results


def _as_launched(spec: RunSpec) -> RunSpec:
    """The run, sharded if the launcher's config asks for that."""
    return replace(spec, model=replace(spec.model, shard=True)) if asks_for_fsdp() else spec


def store_features(spec: RunSpec, watch: Watch | None = None, *, backbone: Any = None) -> dict[str, Any]:
    """Store what the backbone's frozen part gives for the rows of a run, and train nothing.

    Processes that do this for the same rows at the same time share them. A process that is stopped leaves what it has
    stored, and the next one goes on. `train` of the same run finds it all.

    Args:
        spec: the run. Its features go to the disk, and its output is not touched.
        watch, backbone: as of `train`.

    Returns:
        What was stored, as results.json of a run has it.

    Raises:
        ValueError: if the run keeps no features on the disk, or they cannot be kept. Errors else as of `train`.
    """
    settings, spec = spec.training, _as_launched(spec)
    if settings.features != "disk":
        raise ValueError(f"--features {settings.features} with --features-only: it fills a folder. Say --features disk")
    data = task_data(spec, watch)
    model = attached(spec, data, backbone)
    try:
        if spec.model.shard:
            check_shardable(model, settings)
        kept = kept_features(
            model,
            readable(model, data),
            settings.feature_options,
            passes=settings.epochs,
            batch_size=settings.eval_batch_size or rows_at_once(model),
            autocast=settings.bf16,
            tell=None if watch is None else watch.tell,
            progress=settings.progress,
        )
    finally:
        if backbone is not None:
            detach(model)
    if kept is None:
        raise ValueError(f"the features do not fit on the disk of {settings.feature_options.place}: see the warning")
    return kept.told


def check_places(spec: RunSpec) -> None:
    """Refuse an output that is taken or an input, before anything is computed.

    Raises:
        OutputError: saying which.
    """
    check_output(spec.training)
    named = [str(source) for source in (spec.data.train, spec.data.dev) if isinstance(source, str | Path)]
    places = [*rows_at(*named), *backbones_at(spec.model.name, spec.model.text_name)]
    refuse_inputs(parts_of(spec.training.output), places)


def task_data(spec: RunSpec, watch: Watch | None = None) -> TaskData:
    """The rows of a run as its backbone reads them. Errors as of `train`."""
    asked, model, kind = spec.data, spec.model, spec.data.task_kind
    dual = kind is not None and kind.dual
    of_two = dual or (kind is not None and kind.pictured and model.text_backbone is not None)
    if (model.text_backbone is not None and not of_two) or (model.head is not None and not dual):
        raise ValueError("--text-backbone, --text-pool, --dim and --loss are for pairs: say --kind retrieval")
    if kind is not None and kind.writes is not None:
        check_writes(model.name, kind.writes, revision=model.revision)
    processor: Any
    if of_two:
        processor = load_pair_processor(model.name, model.text_name, revision=model.revision)
    else:
        pictures = asked.image is not None
        processor = asked.transform or load_processor(model.name, revision=model.revision, pictures=pictures)
    how: dict[str, Any] = {"size": asked.image_size, "normalize": asked.normalize}
    if isinstance(processor, PairProcessor):
        processor = replace(processor, image=adjusted(processor.image, **how))
    else:
        processor = adjusted(processor, **how)
    rows = asked.rows(asked.train, asked.train_split)
    if watch is not None:
        watch.read(len(rows))
    return prepare(
        rows,
        None if asked.dev is None else asked.rows(asked.dev, asked.dev_split),
        asked.fields,
        processor,
        kind=asked.kind,
        max_length=asked.max_length,
        dev_fraction=asked.dev_fraction,
        seed=spec.training.seed,
        shots=asked.shots,
        shots_seed=asked.shots_seed,
        augment=asked.augment,
        skip_bad_files=asked.skip_bad_files,
        max_new_tokens=asked.max_new_tokens,
        num_beams=asked.num_beams,
        separator=asked.separator,
        frames=asked.frames,
        answers=asked.answers,
        boxes=asked.boxes,
    )


def attached(spec: RunSpec, data: TaskData, backbone: Any = None) -> Attached:
    """The model of a run before training, from its seed, on a backbone that is loaded if none is given.

    Errors as of `train`.
    """
    own, kind = spec.model, kind_named(data.labels.kind)
    where: dict[str, Any] = {
        "name": own.name,
        "dtype": own.dtype,
        "revision": own.revision,
        "drop_path": own.drop_path,
        "quantize": own.quantize,
        "device_map": own.device_map,
        "offload_folder": own.offload_folder,
        "max_memory": own.max_memory,
    }
    if own.device_map is not None and (own.shard or ranks.count() > 1):
        raise ValueError("--device-map with several processes: each would place all of the backbone. Leave one out")
    how: dict[str, Any] = {
        "backbone_noise": own.backbone_noise or ("drop_path" if own.drop_path else None),
        "checkpoint": own.checkpoint,
        "keep": own.keep,
        "lm_loss": own.lm_loss if kind.writes else "own",
    }
    if own.own_head and own.pool is not None:
        raise ValueError(f"--pool {own.pool} with --own-head: the backbone's own head reads what it reads")
    if own.own_head and (kind.dual or kind.pictured or kind.writes is not None):
        why = "the embeddings are Sidestep's" if kind.dual else "it is for classification"
        raise ValueError(f"--own-head with --kind {kind.name}: {why}. Leave it out")
    head = None if own.own_head else own.head or head_for(data, own.pool)
    torch.manual_seed(spec.training.seed)
    if backbone is not None:
        return attach(backbone, own.method, head=head, **how)
    if kind.dual or own.text_name is not None:
        return attach(load_pair(**where, text_name=own.text_name), own.method, head=head, **how)
    outputs = data.labels.outputs if own.own_head else None
    backbone = load_backbone(**where, head=own.own_head and kind.own_head, num_labels=outputs, writes=kind.writes)
    return attach(backbone, own.method, head=head, **how)

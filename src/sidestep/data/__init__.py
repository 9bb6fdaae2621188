"""A user's data as a `datasets.Dataset`, its labels as numbers, its rows as what a backbone reads."""

from sidestep.backbone.pixels import ImageTransform
from sidestep.data.augment import Augmentation
from sidestep.data.encode import Collate, Fields, check_fields, encode_images, encode_text
from sidestep.data.encode_sounds import encode_sounds
from sidestep.data.joins import Separators
from sidestep.data.labels import Kind, LabelSpace, holdout, holdout_whole, label_space
from sidestep.data.messages import DataError, DataWarning
from sidestep.data.pictured import decoding, encode_beside, encode_pictured
from sidestep.data.shots import few_shot
from sidestep.data.tables import TableOptions, read
from sidestep.data.written import (
    CollateWritten,
    Generation,
    encode_prompts,
    encode_targets,
    prompt_limit,
    with_targets,
)

__all__ = [
    "Augmentation",
    "Collate",
    "CollateWritten",
    "DataError",
    "DataWarning",
    "Fields",
    "Generation",
    "ImageTransform",
    "Kind",
    "LabelSpace",
    "Separators",
    "TableOptions",
    "check_fields",
    "decoding",
    "encode_beside",
    "encode_images",
    "encode_pictured",
    "encode_prompts",
    "encode_sounds",
    "encode_targets",
    "encode_text",
    "few_shot",
    "holdout",
    "holdout_whole",
    "label_space",
    "prompt_limit",
    "read",
    "with_targets",
]

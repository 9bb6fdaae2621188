"""A user's data as a `datasets.Dataset`, its labels as numbers, its rows as what a backbone reads."""

from sidestep.data.encode import Collate, Fields, check_fields, encode_images, encode_text
from sidestep.data.labels import Kind, LabelSpace, holdout, label_space
from sidestep.data.tables import DataError, DataWarning, TableOptions, read

__all__ = [
    "Collate",
    "DataError",
    "DataWarning",
    "Fields",
    "Kind",
    "LabelSpace",
    "TableOptions",
    "check_fields",
    "encode_images",
    "encode_text",
    "holdout",
    "label_space",
    "read",
]

"""Pictures in a Hugging Face dataset on disk (`Dataset.save_to_disk`)."""

from __future__ import annotations

import hashlib
import io
from functools import lru_cache
from pathlib import Path
from typing import Any

from .entries import Entry, Found, Problem, RowPlace, captions_of
from .pictures import PictureError, picture_size

_CAPTIONS = ("captions", "text", "caption")


def read_dataset(path: Path, label: str) -> Found:
    """The rows of a dataset that was saved to disk: a column ``image``, and ``text``, ``caption`` or ``captions``.

    Raises:
        ValueError: the package `datasets` is not there; no dataset at this path; several splits; no column of pictures.
    """
    table = _opened(str(path))
    found = Found([], [])
    texts = [name for name in _CAPTIONS if name in table.column_names]
    captions = table.select_columns(texts) if texts else None
    for row in range(len(table)):
        name, place = f"{label}/{row}", RowPlace(str(path), row)
        try:
            content = picture_bytes(str(path), row)
            size = picture_size(io.BytesIO(content))
        except PictureError as error:
            found.problems.append(Problem(name, str(error)))
            continue
        values = dict(captions[row]) if captions is not None else {}
        stamp = hashlib.blake2b(content, digest_size=16).hexdigest()
        found.entries.append(Entry(name, place, stamp, *size, captions_of(values) or ("",)))
    return found


def picture_bytes(folder: str, row: int) -> bytes:
    """The file that a row's picture was made from; PictureError where it has none."""
    image = _opened(folder)[row]["image"]
    if not image:
        raise PictureError("no picture in this row")
    if image.get("bytes"):
        return image["bytes"]
    try:
        return Path(image["path"]).read_bytes()
    except (OSError, TypeError) as error:
        raise PictureError(f"its file {image.get('path')} cannot be opened") from error


@lru_cache(maxsize=8)
def _opened(folder: str) -> Any:
    """The dataset with its pictures as bytes; opened once in each process."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{folder} is to be read as a Hugging Face dataset and the package 'datasets' is not installed: "
            "pip install datasets, or convert the data to a folder of pictures."
        ) from error
    try:
        table = datasets.load_from_disk(folder)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise ValueError(
            f"{folder} is no Hugging Face dataset on disk, expected a folder written by save_to_disk: correct the path."
        ) from error
    if isinstance(table, datasets.DatasetDict):
        raise ValueError(
            f"{folder} holds the splits {', '.join(table)}, expected one: give the folder of a split, such as "
            f"{Path(folder) / next(iter(table), 'train')}."
        )
    if not isinstance(table.features.get("image"), datasets.Image):
        raise ValueError(
            f"{folder} has the columns {', '.join(table.column_names)}, expected a column 'image' of pictures "
            "(datasets.Image) beside text: rename or cast it and save the dataset again."
        )
    return table.cast_column("image", datasets.Image(decode=False))

"""Data options: which images are used, how they are decoded, split, augmented and loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from fastcnn.config.model import MIN_IMAGE_SIZE
from fastcnn.config.section import Bytes, Section
from fastcnn.config.synonyms import as_choice
from fastcnn.errors import UsageError, nearest

Augmentation = Literal["flip", "alternating_flip", "shift", "crop", "rotate", "colour", "cutout", "mixup", "cutmix"]
Loader = Literal["auto", "resident", "shared", "sharded", "mapped", "stream"]
Decoder = Literal["auto", "dali", "turbo", "pillow"]

STRENGTHS: dict[Augmentation, tuple[float, float]] = {
    "flip": (0.5, 1),  # probability
    "alternating_flip": (1, 1),  # fraction of the images
    "shift": (0.0625, 0.5),  # largest offset, as a fraction of the side: 8 pixels of 128
    "crop": (0.35, 1),  # smallest fraction of the area
    "rotate": (15, 180),  # largest angle in degrees
    "colour": (0.3, 1),  # largest change of brightness, contrast and saturation
    "cutout": (0.25, 1),  # fraction of the side
    "mixup": (0.2, 100),  # both parameters of the Beta distribution of the mixing weights
    "cutmix": (1, 100),  # the same
}
"""Default and largest strength of each augmentation."""

PRESETS: dict[str, tuple[str, ...]] = {"none": (), "light": ("flip", "shift"), "strong": ("flip", "crop", "colour")}
"""Named lists of augmentations."""

LAYOUT_FIELDS = ("exclude", "train_dir", "val_dir", "test_dir", "path_column", "label_column")
"""Options that say how DATA is read, where its folders and columns are not to be found by their names and content."""


@dataclasses.dataclass(frozen=True)
class LayoutOptions:
    """The options of `LAYOUT_FIELDS` that are given."""

    exclude: tuple[str, ...] = ()
    """Names of class or split folders, or classes of a table, that are left out."""
    folders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Split -> its folder below DATA; "train" of a table -> the folder that its paths begin in."""
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """ "path" and "label" -> that column of a table."""


def _with_strengths(items: tuple[str, ...]) -> tuple[str, ...]:
    """Return augmentations as name=strength, with presets written out."""
    found = {}
    preset = as_choice(items[0], PRESETS) if len(items) == 1 else ""
    for item in PRESETS.get(preset, items):
        name, equals, text = item.partition("=")
        name = as_choice(name, STRENGTHS)
        if name not in STRENGTHS:
            raise UsageError(
                f"--augment: expected {', '.join(PRESETS)} or a list of {', '.join(STRENGTHS)}, "
                f"got '{name}'{nearest(name, [*STRENGTHS, *PRESETS])}"
            )
        default, largest = STRENGTHS[name]
        try:
            strength = float(text) if equals else default
        except ValueError:
            raise UsageError(f"--augment: expected a number as the strength of {name}, got '{text}'") from None
        if not 0 < strength <= largest:
            raise UsageError(f"--augment: expected a strength of {name} above 0, up to {largest:g}, got {item}")
        found[name] = f"{name}={strength:g}"
    return tuple(found.values())


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Images: where they are, and how they are decoded, split, augmented and loaded."""

    data: str = ""
    """Folder of images: DATA/<class>/..., or DATA/train/<class>/... with val and test folders beside it. Or a CSV or
    Parquet file with path, label and, if it likes, split of each image."""
    path_column: str | None = None
    """Column of a CSV or Parquet file with the images' paths. Default: found by what it holds."""
    label_column: str | None = None
    """Column of a CSV or Parquet file with the images' classes. Default: found by its name or by what it holds."""
    exclude: tuple[str, ...] = ()
    """Names of folders of DATA that are no classes and no splits, such as runs,wandb: they are left out."""
    train_dir: str | None = None
    """Folder below DATA whose folders are the classes to train on; beside a CSV or Parquet file, the folder that its
    paths begin in. Default: found by its name, train or training."""
    val_dir: str | None = None
    """Folder below DATA of validation images, with --train-dir. Default: found by its name."""
    test_dir: str | None = None
    """Folder below DATA of test images, with --train-dir. Default: found by its name."""
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Fraction of the training images held out for validation. 0: train on all of them and validate on the val or test
    folder that is there alone."""
    split: str | None = None
    """split.csv of an earlier run, to use the same split. Default: a new split, stratified by class."""
    image_size: Annotated[int, Field(ge=MIN_IMAGE_SIZE, le=4096)] = 128
    """Height and width, in pixels, that images are resized to; 32 or more."""
    cache_size: Annotated[int, Field(le=4096)] | None = None
    """Height and width of the decoded images in the cache. A size above the image size loses less detail when
    images are cropped or rotated. Default: the image size."""
    augment: Annotated[tuple[str, ...], AfterValidator(_with_strengths)] = ()
    """Augmentation of the training images: none, light, strong, or a list such as flip,rotate=20 (name=strength)."""
    loader: Loader = "auto"
    """Where images are read from while training. resident: device memory. sharded: device memory, each device
    holding its part of an epoch. shared: memory that all runs on a CPU share. mapped: the cache on disk. stream: the
    files, decoded in every epoch. auto: resident, sharded, mapped or stream, the first that has room."""
    memory_limit: Bytes | None = None
    """Memory for the images, such as 2GB or 500MB. Default: 60% of the free memory of a GPU, 50% on a CPU."""
    decoder: Decoder = "auto"
    """Image decoder. auto: dali on a GPU, else turbo, else pillow."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Number of decoding threads. Default: one per core."""
    decode_timeout: Annotated[float, Field(ge=1, le=86_400)] = 60
    """Seconds that decoding one image may take; an image that takes longer is left out."""
    cache_dir: str | None = None
    """Folder for decoded images. Default: the user's cache folder."""
    verify_cache: bool = False
    """Read every image whose pixels are in the cache, and decode those whose bytes have changed. Default: read only
    those whose size, times or inode have."""
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Refuse the data when more than this fraction of the images cannot be used."""
    max_pixels: Annotated[int, Field(ge=1)] = 178_956_970
    """Leave out images with more pixels than this; the size is read from the header, nothing is decoded."""

    @model_validator(mode="after")
    def _check_cache_size(self) -> Self:
        if self.cache_size is not None and self.cache_size < self.image_size:
            raise UsageError(
                f"--cache-size: expected the image size ({self.image_size}) to 4096, got {self.cache_size}"
            )
        return self

    @property
    def decoded_size(self) -> int:
        """Height and width, in pixels, of decoded images."""
        return self.cache_size or self.image_size

    @property
    def layout(self) -> LayoutOptions:
        """The options that say how DATA is read."""
        folders = {"train": self.train_dir, "val": self.val_dir, "test": self.test_dir}
        columns = {"path": self.path_column, "label": self.label_column}
        return LayoutOptions(
            tuple(name.rstrip("/") or name for name in self.exclude),  # as the shell completes it
            {split: folder for split, folder in folders.items() if folder},
            {kind: name for kind, name in columns.items() if name},
        )

    @property
    def augmentations(self) -> list[tuple[str, float]]:
        """Name and strength of each augmentation."""
        return [(name, float(strength)) for name, _, strength in (item.partition("=") for item in self.augment)]


def require_data(data: str, command: str) -> None:
    """Raise UsageError where a command was given no DATA."""
    if not data:
        raise UsageError(f"which photos? fastcnn {command} DATA, where DATA is a folder of photos")

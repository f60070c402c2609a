"""Names that other trainers use for our options, metrics and values."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastcnn.errors import nearest

_NAMES = {
    "data": "dataset data_dir data_path data_root dataset_path",
    "val_fraction": "val_split validation_split val_ratio val_frac val_size valid_pct",
    "image_size": "imgsz img_size imgsize img_dim input_size im_size resolution",
    "augment": "augmentation augmentations data_augmentation data_aug aug",
    "workers": "num_workers n_workers",
    "filters": "num_filters n_filters channels num_channels filter_sizes",
    "kernel_size": "kernel ksize filter_size",
    "activation": "act activation_function activation_fn",
    "batch_norm": "batchnorm batch_normalization batch_normalisation bn use_batchnorm use_batch_norm use_bn",
    "sync_batch_norm": "sync_bn syncbn sync_batchnorm",
    "dense_neurons": "dense dense_units dense_size num_neurons hidden_size hidden_units fc_size n_dense",
    "dropout": "drop drop_rate dropout_rate dropout_prob",
    "init_from": "weights pretrained_weights checkpoint",
    "epochs": "num_epochs n_epochs nb_epochs max_epochs num_train_epochs",
    "batch_size": "bs batch batchsize per_device_train_batch_size train_batch_size",
    "optimizer": "opt optim optimiser",
    "lr": "learning_rate lr0 base_lr max_lr init_lr initial_lr",
    "weight_decay": "wd weightdecay l2 l2_reg",
    "schedule": "scheduler lr_scheduler lr_schedule sched lr_scheduler_type",
    "warmup_epochs": "warmup",
    "decay_epochs": "step_size lr_step_size",
    "decay_rate": "gamma lr_gamma",
    "clip_norm": "grad_clip clip_grad clip_grad_norm max_grad_norm gradient_clip_val",
    "label_smoothing": "smoothing label_smooth label_smoothing_factor",
    "ema": "ema_decay model_ema_decay",
    "patience": "early_stopping early_stopping_patience es_patience",
    "devices": "gpus num_gpus ngpus",
    "precision": "amp dtype mixed_precision",
    "seed": "random_seed random_state manual_seed",
    "wandb_project": "project",
}
"""Option -> its names elsewhere, in small letters with underscores."""

OPTION_SYNONYMS = {name: option for option, names in _NAMES.items() for name in names.split()}

FLIPS = ("hflip", "fliplr", "flip_lr", "horizontal_flip", "random_flip", "random_horizontal_flip")
"""Names of an option of its own for what is `augment: flip` here; its value is a switch or a probability."""

METRIC_SYNONYMS = {
    f"{split}{sep}{name}": f"{split}/{metric}"
    for split in ("train", "val")
    for metric, names in {"accuracy": ("accuracy", "acc", "top1"), "loss": ("loss",)}.items()
    for name in names
    for sep in "_-/. "
} | {"accuracy": "val/accuracy", "acc": "val/accuracy", "validation_accuracy": "val/accuracy"}
"""Metric elsewhere, in small letters -> ours."""

VALUE_SYNONYMS = {"gpu": "cuda", "swish": "silu", "leaky": "leaky_relu", "linear": "constant", "onecyclelr": "onecycle"}
"""Value elsewhere -> the choice that is proposed for it, where the option has that choice."""


def as_field(name: str) -> str:
    """Return the option that a name stands for, in our words (batch-size, Batch_Size) or another trainer's (bs)."""
    field = name.strip().replace("-", "_").lower()
    return "augment" if field in FLIPS else OPTION_SYNONYMS.get(field, field)


def in_our_words(name: str, value: Any) -> tuple[str, Any]:
    """Return an option and a value of it for those of another trainer: ("augment", "flip=0.5") for ("hflip", 0.5)."""
    field = as_field(name)
    if name.strip().replace("-", "_").lower() not in FLIPS:
        return field, value
    words = str(value).strip().lower()
    if words in ("false", "no", "off", "none", "0", "0.0"):
        return field, "none"
    return field, "flip" if words in ("true", "yes", "on", "1", "1.0") else f"flip={words}"


def propose_option(name: str, options: Collection[str]) -> str:
    """Return "; did you mean 'lr'?" for the option that `name` stands for or is most like, or ""."""
    field, value = in_our_words(name, True)
    if field not in options:
        return nearest(field, options)
    return f"; did you mean '{field}'?" if value is True else f"; did you mean '{field}={value}'?"


def propose_value(value: str, choices: Collection[str]) -> str:
    """Return "; did you mean 'cuda'?" for the choice that `value` stands for or is most like, or ""."""
    known = VALUE_SYNONYMS.get(value.strip().lower())
    return f"; did you mean '{known}'?" if known in choices else nearest(value, choices)


def as_choice(value: str, choices: Collection[str]) -> str:
    """Return the choice that differs from `value` in capitals, spaces, hyphens and underscores alone, else `value`."""
    folded = _folded(value)
    return next((choice for choice in choices if _folded(choice) == folded), value)


def _folded(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter not in " -_")

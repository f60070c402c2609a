"""Whether a file was meant as a photo: by its name, else by how it begins."""

import os
import stat

from pipelines.verdict import EXTENSIONS, Unusable, image_format

NAMED_AS_PHOTOS = {extension for extensions in EXTENSIONS.values() for extension in extensions} | {
    *("svg", "psd", "jxl", "ico", "exr", "dds", "eps", "tga"),
    *("dng", "cr2", "cr3", "nef", "arw", "raf", "orf", "rw2"),
}
"""Extensions, in small letters, of files that are pictures or claim to be; some of them no decoder reads."""

SYSTEM_FOLDERS = frozenset(
    ("__macosx", "@eadir", "__pycache__", "$recycle.bin", "system volume information", "lost+found", "#recycle")
)
"""Folders of systems and programs, in small letters: their files are no photos of the user, some are thumbnails."""

_BEGINNING = 128  # bytes, all that `image_format` looks at


def meant_as_photo(path: str | os.PathLike[str]) -> bool:
    """Return whether a file has the name of a photo, or begins like one; one that cannot be read may be one."""
    name = os.fspath(path)
    if named_as_photo(name):
        return True
    try:
        if not stat.S_ISREG(os.stat(name).st_mode):  # noqa: PTH116 - a named pipe would block for ever
            return True
        with open(name, "rb", buffering=0) as file:  # noqa: PTH123 - 3 us less than Path.open
            image_format(file.read(_BEGINNING))
    except Unusable as error:
        return error.verdict.reason != "not an image"
    except OSError:
        return True
    return True


def named_as_photo(name: str) -> bool:
    """Return whether a file has the name of a photo."""
    return name.rpartition(".")[2].lower() in NAMED_AS_PHOTOS


def of_the_system(folder: str) -> bool:
    """Return whether a folder of this name belongs to a system or program."""
    return folder.lower() in SYSTEM_FOLDERS


def may_hold_photos(folder: str) -> bool:
    """Return whether photos below a folder of this name are the user's: it is neither hidden nor the system's."""
    return not folder.startswith(".") and not of_the_system(folder)

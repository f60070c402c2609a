"""Uploads: the photos of a request, in a form, in JSON or as its whole body, each checked for type and size."""

from __future__ import annotations

import binascii
import re
from dataclasses import dataclass, field
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException

from fastcnn.errors import first_line, nearest
from fastcnn.inference.batcher import Limits
from pipelines.verdict import Unusable, image_format

EXPECTED = "expected a photo (image/* or application/octet-stream), multipart/form-data or application/json"
HEAD = 128  # bytes that tell whether it is a photo


class Refusal(HTTPException):
    """Error response: HTTP status, code for programs, message for people."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(status, message, headers or None)
        self.code = code


@dataclass
class Upload:
    """Photos of a request in the client's order, each its file's bytes or why it is not taken."""

    photos: list[bytes | Refusal]
    several: bool
    """Whether the answer is a list."""
    top_k: int | None = None


class PhotoList:
    """Photos of one request as they arrive, at most `limits.queue` and together at most `limits.upload` bytes."""

    def __init__(self, limits: Limits) -> None:
        self.photos: list[bytes | Refusal] = []
        self.bytes_left = limits.upload
        self._limits = limits

    def add(self, photo: bytes, size: int, kind: str = "") -> None:
        """Append a photo, or why it is not taken; its bytes need not be there if `size` is more than `bytes_left`.

        Raises Refusal for a photo too many.
        """
        if len(self.photos) == self._limits.queue:
            most = self._limits.queue
            raise Refusal(413, "too_many_photos", f"more than {most} photos in a request: send them in several")
        if kind and not is_photo_type(kind):
            self.photos.append(Refusal(415, "unsupported_media_type", f"expected a photo, got {kind}"))
        elif size <= self.bytes_left:
            self.bytes_left -= size
            self.photos.append(photo)
        elif size <= self._limits.upload:
            message = f"with this photo the request has more than {self._limits.upload:,} bytes: send it in another one"
            self.photos.append(Refusal(413, "too_large", message))
        else:
            self.photos.append(too_large(self._limits.upload))


@dataclass
class _Part:
    """Part of a form, so far."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    name: bytearray = field(default_factory=bytearray)
    """Of the header that is being read."""
    value: bytearray = field(default_factory=bytearray)
    data: bytearray = field(default_factory=bytearray)
    """Only its first bytes if `size` is too large."""
    size: int = 0


class Form:
    """Photos of a multipart/form-data body, read while it arrives."""

    def __init__(self, content_type: str, limits: Limits) -> None:
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise _invalid_form("its Content-Type has no boundary; leave that header to the client's library")
        self._photos, self._part = PhotoList(limits), _Part()
        self._top_k: int | None = None
        self._complete = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, start, end: self._part.name.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._part.value.extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_part_data": self._add,
                    "on_part_end": self._end,
                    "on_end": self._finish,
                },
            )
        except FormParserError as error:
            raise _invalid_form(first_line(error)) from None

    def write(self, chunk: bytes) -> None:
        """Read on. Raises Refusal for a malformed form, and for a field that is not known."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _invalid_form(first_line(error)) from None

    def upload(self) -> Upload:
        """Return the photos of the whole form."""
        if not self._complete:
            raise _invalid_form("it ends early")
        photos = self._photos.photos
        if not photos:
            raise Refusal(422, "no_photo", "no photo in the form: send one as a file, as curl -F photo=@photo.jpg does")
        return Upload(photos, several=len(photos) > 1, top_k=self._top_k)

    def _begin(self) -> None:
        self._part = _Part()

    def _end_header(self) -> None:
        part = self._part
        part.headers[bytes(part.name).lower()] = bytes(part.value)
        part.name.clear()
        part.value.clear()

    def _add(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        part.size += end - start
        if part.size <= self._photos.bytes_left:
            part.data += data[start:end]
        else:
            part.data += data[start : min(end, start + HEAD)]
            del part.data[HEAD:]

    def _end(self) -> None:
        part = self._part
        _, names = parse_options_header(part.headers.get(b"content-disposition"))
        filename = names.get(b"filename")
        kind = media_type(part.headers.get(b"content-type", b"").decode("latin-1"))
        if filename == b"" and not part.size:
            return  # a file field of a page in which nothing was chosen
        if filename is not None or (kind and is_photo_type(kind)) or looks_like_photo(part.data):
            self._photos.add(bytes(part.data), part.size, kind)
        else:
            self._set_field(names.get(b"name", b"").decode("utf-8", "replace"), bytes(part.data))

    def _set_field(self, name: str, value: bytes) -> None:
        if name not in ("top_k", "top-k"):
            message = f"the form's field {name!r} is neither a file nor top_k: send a photo as curl -F photo=@photo.jpg"
            raise Refusal(422, "invalid_request", f"{message} does{nearest(name, ['top_k'])}")
        if self._top_k is not None:
            raise Refusal(422, "invalid_request", "top_k: the parameter is given twice; give it once")
        if not re.fullmatch(rb"0*[1-9][0-9]{0,8}", value):
            raise Refusal(422, "invalid_request", "top_k: expected a whole number from 1")
        self._top_k = int(value)

    def _finish(self) -> None:
        self._complete = True


class JsonUpload(BaseModel):
    """Photos in base64, as they are or as data: URLs. `photo` is answered by an object, `photos` by a list."""

    model_config = ConfigDict(extra="forbid")
    photo: str | None = None
    photos: list[str] | None = Field(None, min_length=1)
    top_k: int | None = Field(None, ge=1, validation_alias=AliasChoices("top_k", "top-k"))


def from_json(body: bytes, limits: Limits) -> Upload:
    """Return the photos of a JSON body. Raises Refusal for what is not a JsonUpload."""
    try:
        request = JsonUpload.model_validate_json(body)
    except ValidationError as error:
        problems = [_problem(one["type"], one["loc"], one["msg"]) for one in error.errors(include_input=False)]
        raise Refusal(422, "invalid_request", "; ".join(problems[:3])) from None
    if (request.photo is None) == (request.photos is None):
        raise Refusal(422, "invalid_request", "expected either photo or photos, in base64")
    found = PhotoList(limits)
    for text in [request.photo] if request.photo is not None else request.photos or []:
        try:
            kind, photo = _from_base64(text)
        except ValueError:  # binascii's among them
            found.photos.append(Refusal(422, "invalid_base64", "the photo is not in base64, or not all of it"))
        else:
            found.add(photo, len(photo), kind)
    return Upload(found.photos, several=request.photos is not None, top_k=request.top_k)


def _problem(kind: str, place: tuple[int | str, ...], message: str) -> str:
    if kind == "extra_forbidden":
        known = list(JsonUpload.model_fields)
        return f"no field {place[-1]!r}{nearest(str(place[-1]), known) or '; expected ' + ', '.join(known)}"
    return f"{'.'.join(map(str, place))}: {message}" if place else message


def _from_base64(text: str) -> tuple[str, bytes]:
    """Return the content type, "" if there is none, and the bytes of base64 or of a data: URL. Raises ValueError."""
    kind = ""
    if text[:5].lower() == "data:":
        head, _, text = text[5:].partition(",")
        if not head.lower().endswith(";base64"):
            raise ValueError(head)
        kind = media_type(head)
    plain = "".join(text.split()).replace("-", "+").replace("_", "/")  # wrapped lines; the alphabet for URLs
    return kind, binascii.a2b_base64(plain, strict_mode=True)


def media_type(header: str) -> str:
    """Return the type that a Content-Type header names, without its parameters."""
    return header.partition(";")[0].strip().lower()


def is_photo_type(kind: str) -> bool:
    """Return whether a photo may come under this type. The actual format is read from the file's content."""
    return kind.startswith("image/") or kind == "application/octet-stream"


def looks_like_photo(data: bytes | bytearray) -> bool:
    """Return whether the first bytes are those of a format of photos, a supported one or not."""
    try:
        image_format(bytes(data[:HEAD]))
    except Unusable as error:
        return error.verdict.reason != "not an image"
    return True


def too_large(most: int) -> Refusal:
    """Return the refusal of a photo or request of more than `most` bytes."""
    return Refusal(413, "too_large", f"more than {most:,} bytes: send a smaller photo, or fewer in a request")


def _invalid_form(message: str) -> Refusal:
    return Refusal(422, "invalid_form", f"the form cannot be read: {message}")


_BINARY = {"type": "string", "format": "binary"}
REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "description": "A photo's file as it is (JPEG, PNG, WebP, BMP, TIFF...), a form with one or more, or base64 in "
    "JSON. It may be compressed with Content-Encoding: gzip.",
    "content": {
        "image/*": {"schema": _BINARY},
        "application/octet-stream": {"schema": _BINARY},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "photo": {
                        "type": "array",
                        "items": _BINARY,
                        "description": "Files; their fields may have any name",
                    },
                    "top_k": {"type": "integer", "minimum": 1},
                },
                "required": ["photo"],
            }
        },
        "application/json": {"schema": JsonUpload.model_json_schema()},
    },
}

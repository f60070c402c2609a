"""Every decoder against Pillow: same pixels within its tolerance, same verdicts, whatever the file."""

import io
import os
import random
import re
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

import pipelines
from pipelines import BACKENDS, DecoderUnavailable, Verdict
from pipelines.jpeg import header

SIZE = 64
TOLERANCE = {"pillow": 0.0, "turbo": 2.5, "dali": 0.5}  # mean difference from Pillow, levels a photo
SHARED = Path(__file__).parents[2].parent / "shared/data"  # where it is absent, conftest skips what is marked so


@pytest.fixture(params=BACKENDS)
def decoder(request: pytest.FixtureRequest) -> str:
    try:
        return pipelines.choose(request.param, gpu=False)[0]
    except DecoderUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", autouse=True)
def closed():
    yield
    pipelines.close()


def camera(width: int, height: int, seed: int) -> Image.Image:
    """A photo's statistics: soft shapes, finer texture, sensor noise, and no symmetry."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for cells, weight in ((4, 90), (16, 40), (64, 15)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        image += weight / 128 * (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float) - 128)
    image += 128 + np.linspace(-40, 40, width)[None, :, None] + rng.normal(0, 3, image.shape)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 90} if kind == "JPEG" else {}) | options)
    return file.getvalue()


def tagged(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    """JPEGs of several sizes, kinds and samplings; the large ones are decoded scaled by turbo."""
    return [
        encoded(camera(500, 375, 0)),
        encoded(camera(375, 500, 1), progressive=True),
        encoded(camera(301, 407, 2), subsampling=0),
        encoded(camera(640, 480, 3).convert("L")),
        encoded(camera(1101, 803, 4), quality=80),
        encoded(camera(2203, 2404, 5)),
        encoded(camera(90, 33, 6)),
        encoded(camera(400, 533, 7), exif=tagged(1)),
    ]


def decode(sources, decoder: str, boxes=None, size: int = SIZE, **options) -> tuple[np.ndarray, list[Verdict]]:
    out = np.full((len(sources), size, size, 3), 7, np.uint8)
    verdicts = pipelines.decode(sources, size, out, boxes, decoder=decoder, **options)
    assert len(verdicts) == len(sources)
    assert not any(row.any() for row, verdict in zip(out, verdicts, strict=True) if not verdict.ok)
    return out, verdicts


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean over each photo, in levels."""
    return np.abs(one.astype(np.int16) - other).reshape(len(one), -1).mean(1)


def assert_parity(sources, decoder: str, boxes=None, size: int = SIZE, **options) -> None:
    expected, expected_verdicts = decode(sources, "pillow", boxes, size)
    got, verdicts = decode(sources, decoder, boxes, size, **options)
    assert verdicts == expected_verdicts
    assert all(verdict.ok for verdict in verdicts)
    assert difference(got, expected).max() <= TOLERANCE[decoder]


def test_import_is_light():
    heavy = "{'torch', 'nvidia', 'PIL', 'simplejpeg', 'fastcnn'}"
    code = f"import sys, pipelines; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_reference_is_what_pillow_gives(photos):
    """The reference itself, against the three calls that everyone writes."""
    got, _ = decode(photos, "pillow")
    for row, photo in zip(got, photos, strict=True):
        expected = Image.open(io.BytesIO(photo)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        assert np.array_equal(row, np.asarray(expected))


@pytest.mark.parametrize("size", [32, 64, 128, 224])
def test_generated_photos_within_tolerance(decoder, photos, size):
    assert_parity(photos, decoder, size=size)


@pytest.mark.shared
def test_real_photos_within_tolerance(decoder):
    paths = sorted(SHARED.glob("clothing-10/train/*/*")) + sorted(SHARED.glob("animals-8/*/*"))
    assert_parity(random.Random(0).sample(paths, 150), decoder, size=128)


def test_the_graph_for_a_gpu_is_defined_without_one(monkeypatch):
    """Operators and their arguments, as DALI checks them; building the graph takes a GPU."""
    dali = pytest.importorskip("nvidia.dali")
    pytest.importorskip("nvidia.dali.fn")
    from pipelines import dali as decoder

    class Defined(dali.Pipeline):
        def __init__(self, device_id, **options):
            super().__init__(device_id=None, **options)

        def build(self):
            pass

    monkeypatch.setattr(decoder, "_dali", SimpleNamespace(Pipeline=Defined, fn=dali.fn, types=dali.types))
    graph = decoder._build(128, 2, 0).serialize()
    assert b"mixed" in graph
    assert b"jpeg_fancy_upsampling" in graph


@pytest.mark.cuda
def test_gpu_within_tolerance(photos):
    pipelines.choose("dali", gpu=True)
    assert_parity(photos * 20, "dali", gpu=0)
    whole = np.array([(10, 5, 60, 30)] * len(photos), float)
    assert_parity(photos, "dali", whole, gpu=0)
    assert pipelines.identity("dali", 0) != pipelines.identity("dali", None)


STORED_AS = {  # what turns an upright photo into the one stored under this EXIF orientation
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("with_boxes", [False, True])
@pytest.mark.parametrize("shape", [(400, 300), (1100, 804)])  # the larger is decoded scaled by turbo
def test_orientations(decoder, shape, with_boxes):
    upright = camera(*shape, seed=9)
    stored = [upright if turn is None else upright.transpose(turn) for turn in STORED_AS.values()]
    sources = [encoded(image, exif=tagged(number)) for image, number in zip(stored, STORED_AS, strict=True)]
    boxes = np.array([(shape[0] * 0.1, 20, shape[0] * 0.9, shape[1] - 50)] * 8) if with_boxes else None
    assert_parity(sources, decoder, boxes)
    got, _ = decode(sources, decoder, boxes)
    expected, _ = decode([encoded(upright, "PNG")], "pillow", None if boxes is None else boxes[:1])
    assert difference(got, np.repeat(expected, 8, 0)).max() < 2.5  # JPEG's own loss included


def test_orientation_elsewhere_or_damaged(decoder):
    """XMP's word counts where EXIF is silent; nonsense in EXIF is no reason to refuse or to turn."""
    image = camera(300, 200, 10)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    sources = [
        encoded(image),
        encoded(image.transpose(STORED_AS[6]), xmp=xmp),
        encoded(image, exif=tagged(1), xmp=xmp),
        encoded(image, exif=tagged(77)),
        encoded(image, exif=b"Exif\0\0garbage"),
        encoded(image, exif=b"Exif\0\0II*\0\xff\xff\0\0"),
        encoded(image, "PNG", exif=tagged(1)),
        encoded(image.transpose(STORED_AS[8]), "WEBP", exif=tagged(8), quality=95),
        encoded(image.transpose(STORED_AS[5]), "TIFF", exif=tagged(5)),
    ]
    got, verdicts = decode(sources, decoder)
    assert all(verdict.ok for verdict in verdicts)
    assert difference(got, np.repeat(got[:1], len(got), 0)).max() < 3


def over_white(image: Image.Image) -> Image.Image:
    pixels = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")


def kinds() -> dict[str, tuple[bytes, Image.Image]]:
    """Name -> (file, the RGB photo that it shows)."""
    rgb = camera(240, 180, 11)
    grey = rgb.convert("L")
    alpha = rgb.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(rgb.size))
    deep = np.asarray(grey).astype(np.uint16) * 257
    palette = rgb.quantize(64)
    cmyk = rgb.convert("CMYK")
    files = {
        "progressive": (encoded(rgb, progressive=True), rgb),
        "444": (encoded(rgb, subsampling=0), rgb),
        "rgb jpeg": (encoded(rgb, keep_rgb=True), rgb),
        "grey jpeg": (encoded(grey), grey),
        "cmyk jpeg": (encoded(cmyk), cmyk),
        "png": (encoded(rgb, "PNG"), rgb),
        "grey png": (encoded(grey, "PNG"), grey),
        "16-bit png": (encoded(Image.fromarray(deep), "PNG"), grey),
        "16-bit tiff": (encoded(Image.fromarray(deep), "TIFF"), grey),
        "float tiff": (encoded(Image.fromarray(np.asarray(grey).astype(np.float32) / 255), "TIFF"), grey),
        "int32 tiff": (encoded(Image.fromarray(deep.astype(np.int32)), "TIFF"), grey),
        "one bit": (encoded(grey.convert("1"), "PNG"), grey.convert("1")),
        "alpha png": (encoded(alpha, "PNG"), over_white(alpha)),
        "grey alpha png": (encoded(alpha.convert("LA"), "PNG"), over_white(alpha.convert("LA"))),
        "alpha webp": (encoded(alpha, "WEBP", lossless=True), over_white(alpha)),
        "palette png": (encoded(palette, "PNG"), palette),
        "transparent palette": (encoded(palette, "PNG", transparency=3), over_white(_with_hole(palette, 3))),
        "gif": (encoded(palette, "GIF"), palette),
        "animated gif": (encoded(palette, "GIF", save_all=True, append_images=[Image.new("P", rgb.size)]), palette),
        "bmp": (encoded(rgb, "BMP"), rgb),
        "tiff": (encoded(rgb, "TIFF"), rgb),
        "cmyk tiff": (encoded(cmyk, "TIFF"), cmyk),
        "webp": (encoded(rgb, "WEBP", quality=95), rgb),
        "ppm": (encoded(rgb, "PPM"), rgb),
        "mpo": (encoded(rgb, "MPO", save_all=True, append_images=[grey.convert("RGB")], quality=90), rgb),
    }
    if features.check("avif"):
        files["avif"] = (encoded(rgb, "AVIF", quality=95), rgb)
    if features.check("jpg_2000"):
        files["jpeg 2000"] = (encoded(rgb, "JPEG2000"), rgb)
    return files


def _with_hole(palette: Image.Image, index: int) -> Image.Image:
    image = palette.convert("RGBA")
    image.putalpha(Image.fromarray(np.where(np.asarray(palette) == index, 0, 255).astype(np.uint8)))
    return image


def test_every_kind_shows_its_photo(decoder, tmp_path):
    files = kinds()
    paths = [tmp_path / f"{name}.jpg" for name in files]  # named wrongly, most of them: content counts
    for path, (data, _) in zip(paths, files.values(), strict=True):
        path.write_bytes(data)
    got, verdicts = decode(paths, decoder)
    assert {path.stem: verdict for path, verdict in zip(paths, verdicts, strict=True) if not verdict.ok} == {}
    small = [image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR) for _, image in files.values()]
    apart = difference(got, np.stack([np.asarray(image) for image in small]))
    # Codec losses; a wrong scale, an inverted CMYK or alpha over black are tens of levels.
    assert {name: mean for name, mean in zip(files, apart, strict=True) if mean > 3} == {}
    assert_parity(paths, decoder)


def test_grey_values_without_a_scale_are_refused(decoder):
    values = np.linspace(-5, 90_000, 64 * 64, dtype=np.float32).reshape(64, 64)
    _, verdicts = decode([encoded(Image.fromarray(values), "TIFF")], decoder)
    assert verdicts[0].reason == "unsupported format"


def bad_sources(folder: Path) -> dict[str | bytes, str]:
    """Source -> the reason why it is unusable."""
    photo = encoded(camera(200, 150, 12))
    (folder / "folder.jpg").mkdir()
    (folder / "empty.jpg").touch()
    (folder / "page.jpg").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20)
    os.mkfifo(folder / "pipe.jpg")
    return {
        str(folder / "missing.jpg"): "unreadable",
        str(folder / "folder.jpg"): "unreadable",
        str(folder / "pipe.jpg"): "unreadable",
        "null\0character.jpg": "unreadable",
        str(folder / "empty.jpg"): "empty",
        b"": "empty",
        str(folder / "page.jpg"): "not an image",
        b"just text": "not an image",
        b"BMW is a maker of cars": "not an image",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>": "not an image",
        b"%PDF-1.7 ...": "not an image",
        b"\0": "not an image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "unsupported format",
        b"8BPS\0\1" + bytes(50): "unsupported format",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "unsupported format",
        photo[:3000]: "truncated",
        photo[:-2]: "truncated",
        photo[:50]: "truncated",
        b"\xff\xd8\xff": "corrupt",
        encoded(camera(200, 150, 12), "PNG")[:9000]: "truncated",
        b"\x89PNG\r\n\x1a\n" + bytes(100): "corrupt",
        b"GIF89a" + bytes(3): "corrupt",
        b"II*\0" + bytes(3): "corrupt",
    }


def test_bad_among_good(decoder, photos, tmp_path):
    bad = bad_sources(tmp_path)
    good = [photos[i % len(photos)] for i in range(3 * len(bad))]
    sources = [source for i, each in enumerate(bad) for source in (*good[3 * i : 3 * i + 3], each)]
    expected, _ = decode(photos, decoder)
    got, verdicts = decode(sources, decoder)
    for i, (source, reason) in enumerate(bad.items()):
        assert verdicts[4 * i + 3].reason == reason, source
        assert not verdicts[4 * i + 3].ok
    kept = [i for i in range(len(sources)) if i % 4 != 3]
    assert all(verdicts[i].ok for i in kept)
    assert np.array_equal(got[kept], expected[[i % len(photos) for i in range(len(good))]])


@pytest.mark.shared
def test_odd_images(decoder):
    """What Pillow loads is usable, what it does not is refused for the same reason by every decoder."""
    odd = SHARED / "odd-images"
    rows = [line.split("\t") for line in (odd / "README.tsv").read_text().splitlines()[1:]]
    paths = [odd / row[0] for row in rows]
    _, verdicts = decode(paths, decoder)
    assert verdicts == decode(paths, "pillow")[1]
    assert [verdict.ok for verdict in verdicts] == [row[7] == "ok" for row in rows]
    for row, verdict in zip(rows, verdicts, strict=True):
        assert verdict.warning == (row[8] if verdict.ok and row[8] != "-" else ""), row[0]
    reasons = {path.name: verdict.reason for path, verdict in zip(paths, verdicts, strict=True)}
    assert reasons["sharp__65536-uint32-limit.png"] == reasons["pil__decompression_bomb.gif"] == "too large"
    assert reasons["made__html-named.jpg"] == reasons["sharp__check.svg"] == "not an image"
    assert reasons["pil__ultrahdr.jpg"] == reasons["pil__truncated_image.png"] == "truncated"
    assert_parity([path for path, verdict in zip(paths, verdicts, strict=True) if verdict.ok], decoder, size=128)


def bomb_png(width: int, height: int) -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(1000))
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (head, body))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_bombs_are_refused_by_their_header(decoder):
    jpeg = bytearray(encoded(camera(64, 64, 13)))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    began = time.perf_counter()
    _, verdicts = decode([bomb_png(60_000, 60_000), bytes(jpeg), bomb_png(13_400, 13_400)], decoder)
    assert [verdict.reason for verdict in verdicts] == ["too large"] * 3
    assert time.perf_counter() - began < 2


def test_max_pixels(decoder, photos):
    _, verdicts = decode(photos, decoder, max_pixels=400 * 533)
    assert [verdict.reason for verdict in verdicts] == [
        "" if side * other <= 400 * 533 else "too large"
        for side, other in (Image.open(io.BytesIO(photo)).size for photo in photos)
    ]


def test_more_pixels_where_they_are_asked_for(decoder, monkeypatch):
    """Pillow's own limit is raised with ours."""
    monkeypatch.setattr("pipelines.pillow.MAX_PIXELS", 10_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    image = camera(300, 200, 14)
    sources = [encoded(image), encoded(image, "PNG"), encoded(image, "WEBP")]
    assert all(verdict.ok for verdict in decode(sources, decoder, max_pixels=60_000)[1])
    assert {verdict.reason for verdict in decode(sources, decoder, max_pixels=59_999)[1]} == {"too large"}


@pytest.mark.parametrize("options", [{"quality": 80}, {"lossless": True}, {"quality": 80, "exif": tagged(1)}])
def test_a_webp_is_refused_before_it_is_opened(decoder, options, monkeypatch):
    """Opening one allocates its pixels."""
    photo = encoded(camera(301, 203, 14), "WEBP", **options)
    monkeypatch.setattr(Image, "open", None)
    _, verdicts = decode([photo], decoder, max_pixels=301 * 203 - 1)
    assert verdicts == [Verdict("too large", "301x203 pixels")]


def test_damage_that_decodes_is_a_warning(decoder, photos):
    """Entropy data overwritten: libjpeg's strict word is passed on, and the pixels are those that can be read."""
    damaged = []
    for photo in photos[:3]:
        at = len(photo) // 2
        damaged.append(photo[:at] + b"\xff\xd3" + photo[at + 2 :])  # a marker where none belongs
    damaged.append(encoded(camera(90, 60, 1).convert("CMYK")).replace(b"\xff\xdb", b"\0\xff\xdb", 1))
    got, verdicts = decode([*damaged, *photos], decoder)
    assert all(verdict.ok for verdict in verdicts)
    assert [verdict.warning != "" for verdict in verdicts] == [True] * 4 + [False] * len(photos)
    assert all("Corrupt JPEG data" in verdict.warning for verdict in verdicts[:4])
    assert (got[:4].std((1, 2, 3)) > 5).all()


def test_no_memory_is_a_verdict(photos, monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr("pipelines.turbo.decode_jpeg", fail)
    assert [verdict.reason for verdict in decode(photos[:2], "turbo")[1]] == ["too large"] * 2


def test_warnings_stay_inside(decoder, monkeypatch):
    """Pillow warns above its first limit (here an error, as all warnings); the photo is usable all the same."""
    image = camera(300, 200, 14)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    palette = encoded(image.quantize(8), "PNG", transparency=bytes([0, 90, 255]))
    _, verdicts = decode([encoded(image), encoded(image, "PNG"), palette], decoder)
    assert all(verdict.ok for verdict in verdicts)


def test_bytes_and_paths_are_equal(decoder, photos, tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(len(photos))]
    for path, photo in zip(paths, photos, strict=True):
        path.write_bytes(photo)
    expected, _ = decode(photos, decoder)
    assert np.array_equal(decode(paths, decoder)[0], expected)
    assert np.array_equal(decode([str(path) for path in paths], decoder)[0], expected)


def test_boxes(decoder, photos):
    rng = np.random.default_rng(0)
    images = [ImageOps.exif_transpose(Image.open(io.BytesIO(photo))) for photo in photos]
    corners = np.sort(rng.random((len(photos), 2, 2)), axis=1)
    corners[:, 1] = np.minimum(corners[:, 1] + 0.1, 1)
    sizes = np.array([image.size for image in images])
    boxes = np.concatenate([corners[:, 0] * sizes, corners[:, 1] * sizes], axis=1)
    assert_parity(photos, decoder, boxes)
    whole = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
    assert difference(decode(photos, decoder, whole)[0], decode(photos, decoder)[0]).max() < 0.1
    # It is a crop, then a resize (they differ at the edges only, where the resize looks past the box).
    small = Image.Resampling.BILINEAR
    crops = [image.convert("RGB").crop(tuple(np.rint(box))) for image, box in zip(images, boxes, strict=True)]
    expected = np.stack([np.asarray(crop.resize((SIZE, SIZE), small)) for crop in crops])
    assert difference(decode(photos, decoder, np.rint(boxes))[0], expected).max() < 2.5


def test_boxes_at_and_beyond_the_edge(decoder, photos):
    photo = [encoded(camera(300, 200, 15))]
    inside, _ = decode(photo, decoder, np.array([[100, 50, 300, 200]]))
    beyond, _ = decode(photo, decoder, np.array([[100, 50, 300.001, 999]]))
    assert np.array_equal(inside, beyond)
    with pytest.raises(ValueError, match="outside the photo of 300x200"):
        decode(photo, decoder, np.array([[300, 0, 400, 100]]))
    for wrong in ([[100, 0, 100, 50]], [[0, 0, np.nan, 50]], [0, 0, 1, 1]):
        with pytest.raises(ValueError, match="boxes must be"):
            decode(photo, decoder, np.array(wrong, float))


def test_order_is_kept(decoder):
    """Each photo's grey tells its number."""
    photos = [encoded(Image.new("RGB", (20 + i % 7, 30), (i, i, i))) for i in range(250)]
    numbers = random.Random(0).choices(range(250), k=700)
    got, _ = decode([photos[i] for i in numbers], decoder, size=8)
    assert np.abs(got.astype(int).mean((1, 2, 3)) - numbers).max() <= 1


def test_workers_do_not_matter(decoder, photos):
    expected, _ = decode(photos, decoder, workers=1)
    for workers in (2, 5):
        assert np.array_equal(decode(photos, decoder, workers=workers)[0], expected)


def test_odd_names(decoder, photos, tmp_path):
    names = ["höhle.jpg", "写真.JPEG", "with space.jpg", "new\nline.jpg", "noextension", "-o.jpg", "%41{}.jpg"]
    paths = [str(tmp_path / name) for name in names] + [os.fsdecode(bytes(tmp_path) + b"/\xff\xfe.jpg")]
    for path in paths:
        Path(path).write_bytes(photos[0])
    got, verdicts = decode(paths, decoder)
    assert all(verdict.ok for verdict in verdicts)
    assert (got == got[0]).all()


def assert_one_verdict(sources: list[bytes]) -> list[Verdict]:
    """Return the verdicts, which are Pillow's for every decoder."""
    expected = decode(sources, "pillow")[1]
    for decoder in ("turbo", "dali"):
        try:
            pipelines.choose(decoder, gpu=False)
        except DecoderUnavailable:
            continue
        assert decode(sources, decoder)[1] == expected
    return expected


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_gets_one_verdict(data, photos):
    """Cut and overwritten anywhere: all decoders say what Pillow says, warnings included."""
    photo = data.draw(st.sampled_from([photos[0], photos[1], photos[2], photos[7]]))
    at = data.draw(st.integers(0, len(photo) - 1) | st.integers(0, 700))
    length = data.draw(st.integers(0, 20))
    noise = data.draw(st.binary(min_size=length, max_size=length))
    cut, overwritten = photo[:at], photo[:at] + noise + photo[at + length :]
    assert_one_verdict([cut, overwritten])


def with_flipped_bits(photo: bytes, rng: random.Random) -> bytes:
    """The photo with 1 to 4 bits of its scans flipped; one in four becomes a marker where none belongs."""
    first, damaged = header(photo).scan, bytearray(photo)
    stuffed = [found.end() - 1 for found in re.compile(b"\xff\0").finditer(photo, first)]
    for _ in range(rng.randint(1, 4)):
        at = rng.choice(stuffed) if stuffed and rng.random() < 0.25 else rng.randrange(first, len(photo) - 2)
        damaged[at] ^= 1 << rng.randrange(8)
    return bytes(damaged)


@pytest.mark.parametrize("count", [64, pytest.param(5_000, marks=pytest.mark.long)])
def test_flipped_bits_get_one_verdict(photos, count):
    rng = random.Random(0)
    small = [photos[i] for i in (0, 1, 2, 3, 6, 7)]
    verdicts = assert_one_verdict([with_flipped_bits(small[i % 6], rng) for i in range(count)])
    assert {"", "corrupt"} == {verdict.reason for verdict in verdicts}
    assert any(verdict.warning for verdict in verdicts)


@pytest.mark.long
@pytest.mark.shared
def test_flipped_bits_of_real_photos_get_one_verdict():
    rng = random.Random(0)
    paths = sorted(SHARED.glob("clothing-10/train/*/*")) + sorted(SHARED.glob("animals-8/*/*"))
    contents = [path.read_bytes() for path in rng.sample(paths, len(paths))]
    plain = [content for content in contents if header(content) is not None]
    verdicts = assert_one_verdict([with_flipped_bits(plain[i % len(plain)], rng) for i in range(5_000)])
    assert {"", "corrupt"} == {verdict.reason for verdict in verdicts}


def test_plain_header(photos):
    """The header agrees with Pillow's, and what is not plain is left to Pillow."""
    for photo in photos:
        image = Image.open(io.BytesIO(photo))
        head = header(photo)
        assert head is not None
        assert (head.width, head.height) == image.size
        assert head.orientation == image.getexif().get(0x0112, 1)
    plain = {name for name, (data, _) in kinds().items() if header(data) is not None}
    assert plain == {"progressive", "444", "grey jpeg", "mpo"}


def test_calls_from_several_threads(decoder, photos):
    expected, _ = decode(photos, decoder)
    got: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: got.append(decode(photos, decoder)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4
    assert all(np.array_equal(each, expected) for each in got)


def test_close_and_on(decoder, photos):
    expected, _ = decode(photos, decoder)
    pipelines.close()
    pipelines.close()
    assert np.array_equal(decode(photos, decoder)[0], expected)


def test_no_sources(decoder):
    assert decode([], decoder)[1] == []


def test_arguments_are_checked(photos):
    for out in (
        np.zeros((1, SIZE, SIZE, 3), np.float32),
        np.zeros((2, SIZE, SIZE, 3), np.uint8),
        np.zeros((1, 3, SIZE, SIZE), np.uint8),
        np.zeros((1, SIZE, SIZE, 4), np.uint8)[..., :3],
    ):
        with pytest.raises(ValueError, match="out must be"):
            pipelines.decode(photos[:1], SIZE, out)
    with pytest.raises(ValueError, match="unknown decoder 'pil'"):
        decode(photos, "pil")


def test_choose(monkeypatch):
    assert pipelines.choose("pillow", gpu=True) == ("pillow", "")
    assert pipelines.choose("auto", gpu=False) == ("turbo", "")
    monkeypatch.setitem(BACKENDS, "dali", "pipelines.not_there")
    monkeypatch.delitem(pipelines._imported, "dali", raising=False)
    name, note = pipelines.choose("auto", gpu=True)
    assert name == "turbo"
    assert "nvidia-dali is not installed" in note
    assert "pip install 'fastcnn[cuda13]'" in note
    with pytest.raises(DecoderUnavailable, match="pip install"):
        pipelines.choose("dali", gpu=True)
    monkeypatch.setitem(BACKENDS, "turbo", "pipelines.not_there")
    monkeypatch.delitem(pipelines._imported, "turbo", raising=False)
    assert pipelines.choose("auto", gpu=False)[0] == "pillow"
    assert "simplejpeg" in pipelines.choose("auto", gpu=False)[1]
    with pytest.raises(ValueError, match="unknown decoder"):
        pipelines.choose("opencv", gpu=False)


def test_identities_differ(decoder):
    assert pipelines.identity(decoder, None).startswith(decoder)
    assert len({pipelines.identity(name, None) for name in ("turbo", "pillow")}) == 2

"""The page of the service in headless Chromium: its form, sent as without scripts, and its script."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastcnn import predict_photos
from fastcnn.inference.artefact import Artefact
from tests.inference.conftest import Served

pytest.importorskip("fastapi")
pytest.importorskip("python_multipart")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.long, pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")]

# A script cannot choose a file on the disk, but can put one that it made into a field, as choosing it does.
CHOOSE = """const chosen = new DataTransfer();
for (const [name, content] of FILES)
  chosen.items.add(new File([Uint8Array.from(atob(content), one => one.charCodeAt(0))], name, {type: "image/jpeg"}));
"""
SUBMIT = """const field = document.getElementById("files");
field.files = chosen.files;
field.form.submit();
"""


@pytest.fixture
def chosen(photos: Path, tmp_path: Path) -> list[Path]:
    """A photo, a file that is none and another photo."""
    good, bad = sorted(photos.rglob("*.jpg")), tmp_path / "bad.jpg"
    bad.write_text("no photo")
    return [good[0], bad, good[-1]]


def shown(page: str, served: Served, chosen: list[Path], script: str, *options: str) -> str:
    """Return what Chromium makes of the service's page with another script at its end, which has the files `chosen`."""
    contents = [(path.name, base64.b64encode(path.read_bytes()).decode()) for path in chosen]
    script = f"<script>{CHOOSE.replace('FILES', json.dumps(contents))}{script}</script>"
    page = page.replace("<head>", f'<head><base href="http://{served.address}/">').replace(
        "</body>", f"{script}</body>"
    )
    Path("page.html").write_text(page, encoding="utf-8")
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={Path('profile').resolve()}",
    ]
    options = ("--virtual-time-budget=60000", "--dump-dom", *options, Path("page.html").resolve().as_uri())
    return subprocess.run([*command, *options], check=True, capture_output=True, encoding="utf-8").stdout


def test_its_form_is_answered(served: Served, model: Artefact, chosen: list[Path]) -> None:
    page = re.sub(r"<script>.*</script>", "", served.ask("/")[1], flags=re.DOTALL)
    dom = shown(page, served, chosen, SUBMIT)
    answers = json.loads(html.unescape(re.findall(r"<pre[^>]*>(.*)</pre>", dom, re.DOTALL)[0]))
    for answer, found in zip(answers, predict_photos(model, chosen), strict=True):
        if found.path.endswith("bad.jpg"):
            assert answer["error"]["code"] == "not_an_image"
        else:
            assert answer["predictions"][0]["probability"] == float(max(found.probabilities))  # to the bit


def test_its_script_shows_the_classes(served: Served, model: Artefact, chosen: list[Path]) -> None:
    # The page comes from a file here: to the browser it is another site's, which may not read answers.
    dom = shown(served.ask("/")[1], served, chosen, "take(chosen.files);", "--disable-web-security")
    cards = re.findall(r"<article>.*?</article>", dom, re.DOTALL)[::-1]  # the last one is on top
    for card, path, found in zip(cards, chosen, predict_photos(model, chosen), strict=True):
        assert path.name in card
        assert ("not an image (" if path.name == "bad.jpg" else f"{100 * max(found.probabilities):.1f}%") in card

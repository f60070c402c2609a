"""Asks a Triton Inference Server for the classes of photos: python classify.py http://HOST:8000 MODEL PHOTO...

Needs Pillow. MODEL is the name of a folder that `fastcnn export --triton` made.
"""

import json
import sys
import urllib.request
from typing import Any

from PIL import Image, ImageOps


def ask(url: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the server's answer to a request, or what is at the address."""
    data = None if request is None else json.dumps(request).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data)) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def main() -> None:
    """Print each photo's most probable class and its probability."""
    model = f"{sys.argv[1]}/v2/models/{sys.argv[2]}"
    about = ask(model)
    pixels, probabilities = about["inputs"][0], about["outputs"][0]
    _, height, width, _ = map(int, pixels["shape"])
    for path in sys.argv[3:]:
        photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        photo = photo.resize((width, height), Image.Resampling.BILINEAR)  # as in training
        answer = ask(
            f"{model}/infer",
            {
                "inputs": [
                    {
                        "name": pixels["name"],
                        "datatype": "UINT8",
                        "shape": [1, height, width, 3],
                        "data": list(photo.tobytes()),
                    }
                ],
                "outputs": [{"name": probabilities["name"], "parameters": {"classification": 1}}],
            },
        )
        probability, _, label = answer["outputs"][0]["data"][0].split(":", 2)
        print(f"{path}  {label} {float(probability):.7f}")


if __name__ == "__main__":
    main()

"""Prints the classes of photos by an ONNX file of `fastcnn export`: python classify.py MODEL.onnx PHOTO...

Needs onnxruntime, numpy and Pillow.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main() -> None:
    """Print each photo's most probable class and its probability."""
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    classes = json.loads(session.get_modelmeta().custom_metadata_map["fastcnn.json"])["classes"]
    name = session.get_inputs()[0].name
    for path in sys.argv[2:]:
        photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        # The model resizes, normalises and applies softmax itself: (N, H, W, 3) uint8 -> (N, classes) fp32.
        probabilities = session.run(None, {name: np.asarray(photo)[None]})[0][0]
        best = probabilities.argmax()
        print(f"{path}  {classes[best]} {probabilities[best]:.7f}")


if __name__ == "__main__":
    main()

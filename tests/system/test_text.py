import json
import subprocess
import sys

import pytest

from fastcnn.system.own_module import environment
from fastcnn.system.text import as_utf8, comparable, printable, table, to_json


def test_a_table_aligns_wide_letters_and_shows_markup_as_it_is() -> None:
    assert table(["class", "photos", "[b]note"], [["日本", "1", "[red]"], ["b", "10,000", ""]], right=["photos"]) == (
        "class  photos  [b]note\n日本        1  [red]\nb      10,000"
    )


def test_names_for_other_programs() -> None:
    assert as_utf8("a\udcff\ud800é") == "a\\xff\\ud800é"
    assert printable("a\udcff\nb") == "a\\xff b"
    assert to_json({"\udcff": ["\udc80", 1, None]}) == json.dumps({"\\xff": ["\\x80", 1, None]}, indent=1)
    assert comparable("Cafe\u0301\udcff") == comparable("Café\\xff")


@pytest.mark.parametrize("use", ["from fastcnn.system.console import Console", "text.table(['a'], [['b']])"])
def test_pythons_generator_is_the_callers_from_the_first_import_on(use: str) -> None:
    """In a process of its own: here rich, which draws while it is imported, is loaded."""
    lines = ["import random", "from fastcnn.system import text", "before = random.getstate()", use]
    code = "; ".join([*lines, "import rich.style", "assert random.getstate() == before"])
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)

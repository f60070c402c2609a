"""Nothing is collected while a command imports torch or ends, and everything afterwards."""

from __future__ import annotations

import gc

import pytest

from fastcnn.system import quick_start


def failing_import() -> None:
    with quick_start.importing():
        assert not gc.isenabled()
        raise ImportError


@pytest.mark.parametrize("enabled", [True, False])
def test_collecting_is_left_as_it_was(enabled: bool) -> None:
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ImportError):
            failing_import()
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_the_end_has_the_exit_code_and_nothing_left_to_look_through() -> None:
    try:
        with pytest.raises(SystemExit) as ended:
            quick_start.end(3)
        assert ended.value.code == 3
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()

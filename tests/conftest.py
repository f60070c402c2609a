"""Photos that the tests generate, a cache folder of their own, and runs that several tests look at."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import hypothesis
import pytest
import torch

from pipelines import workers

# The machine may be busy: no deadlines. The same examples each time, so that CI is red only for a reason.
hypothesis.settings.register_profile("fastcnn", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fastcnn")

# A shell's background jobs ignore SIGINT, what nohup starts SIGHUP, and what they start inherits that; commands under
# test must not.
for ignored, usual in {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}.items():
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, usual)

# Without a GPU the kernels are run by Triton's interpreter, which has to be asked for before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT / "scripts"))

# What a test starts in another folder finds the package too, where it is not installed or was named by a relative path.
_paths = [str(Path(path).absolute()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(ROOT), *_paths]))


# Files that take longest. They are begun first: one that is begun last leaves the other cores waiting for its end.
LONGEST = (
    "end_to_end/test_docs.py",
    "training/test_engines.py",
    "training/test_compiled_engine.py",
    "pipelines/test_pipelines.py",
    "system/test_ranks.py",
    "runs/test_tracker.py",
    "runs/test_moved.py",
    "bench/test_kernels.py",
    "bench/test_bench.py",
    "bench/test_parity.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; skip, visibly, what this machine lacks."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if item.get_closest_marker("shared") and not SHARED_DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason="needs the real photos in ../shared/data"))


@pytest.fixture(scope="session", autouse=True)
def _cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests out of the user's cache folder."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache-home"))
    os.environ.setdefault("MPLCONFIGDIR", str(ROOT / ".pytest_cache" / "matplotlib"))  # its list of fonts takes seconds
    yield
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session", autouse=True)
def _no_wandb() -> Iterator[None]:
    """Record nothing in W&B, in the suite's own time; tests/test_tracker.py asks for it by option."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        yield


class KeptServer(workers.Server):
    """Decoder server that waits for its next user instead of ending: importing torch anew takes a second."""

    idle: ClassVar[dict[Any, KeptServer]] = {}

    @classmethod
    def take(cls, module: str, *, gpu: int | None, fork: bool = False) -> KeptServer:
        """Return an idle server that was started in the same environment, or a new one."""
        assert not fork  # this process has threads
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        key = module, gpu, tuple(sys.path), tuple(sorted(environment.items()))
        server = cls.idle.pop(key, None)
        if server is None or server._process is None or server._process.poll() is not None:
            server = cls(module, gpu=gpu)
        server.key = key
        return server

    def _start(self) -> None:
        super()._start()
        for key in [key for key, server in self.idle.items() if server is self]:
            del self.idle[key]

    def close(self, *, wait: bool = True) -> None:
        alive = self._process is not None and self._process.poll() is None
        if not (alive and self._ready and self.key not in self.idle):
            super().close(wait=wait)
            return
        if len(self.idle) == 2:  # the environment has changed, and it may never be asked for again
            super(KeptServer, self.idle.pop(next(iter(self.idle)))).close()
        self.idle[self.key] = self


@pytest.fixture(scope="session", autouse=True)
def _kept_decoders() -> Iterator[None]:
    """Share decoder servers between tests; tests/pipelines/test_workers.py has each start its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "Server", KeptServer.take)
        yield
    while KeptServer.idle:
        workers.Server.close(KeptServer.idle.popitem()[1])


@pytest.fixture(scope="session", autouse=True)
def _scripted_here() -> Iterator[None]:
    """Script networks in this process; exports use a new one where something was scripted before, which takes 2 s."""
    from fastcnn.export import exporters, script_process

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporters, "script", script_process.script_here)
        yield


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test in a folder of its own, so that runs/ is too."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def verified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have exports verified in this process, in tests of something else: another one has to import torch anew."""
    from fastcnn.export import exporters
    from fastcnn.export.verify import verify_file
    from fastcnn.inference import artefact

    monkeypatch.setattr(
        exporters, "verify_in_new_process", lambda path, *run, **how: verify_file(artefact.open(path), *run, **how)
    )


@pytest.fixture
def compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have inductor find a compiler, and forget what was compiled before and in the test.

    But in the long form it writes loops without vector instructions: trying those out takes it ten seconds.
    """
    import torch._inductor.config

    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler")
    torch._dynamo.reset()
    vectors = None if request.node.get_closest_marker("long") else False
    with torch._inductor.config.patch({"cpp.vec_isa_ok": vectors, "compile_threads": 1}):
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of 4 classes of 30 generated photos. Read-only: tests that change photos copy it."""
    from make_dataset import make

    folder = tmp_path_factory.mktemp("data") / "photos"
    make(folder, classes=4, photos=120, seed=0)
    return folder


@pytest.fixture(scope="session")
def run_dir(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two epochs on `photos`. Read-only."""
    from fastcnn import Config, fit

    config = Config(data=str(photos), epochs=2, image_size=32, filters=(8,), batch_size=16)
    return fit(config, run_dir=tmp_path_factory.mktemp("runs") / "run").run_dir


@pytest.fixture(scope="session")
def exports(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the exported file of `run_dir` for a format, all in one folder with their card. Read-only.

    They are verified in this process: another one has to import torch anew. tests/end_to_end/test_docs.py and
    tests/export/test_export.py export with a process that verifies.
    """
    from fastcnn import export_run
    from fastcnn.export import exporters
    from fastcnn.export.verify import verify_file
    from fastcnn.inference import artefact

    folder = tmp_path_factory.mktemp("exports")

    def exported(format: str) -> Path:
        if format == "onnx":
            pytest.importorskip("onnxruntime")
            pytest.importorskip("onnxscript")
        path = folder / f"model.{format}"
        if not path.is_file():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    exporters,
                    "verify_in_new_process",
                    lambda path, *run, **how: verify_file(artefact.open(path), *run, **how),
                )
                export_run(run_dir, format=format, output=path)
        return path

    return exported

"""Decoding in worker processes: what a decoder that dies costs, and what it does not."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import pipelines
from fastcnn.config import DataConfig
from fastcnn.data import cache, cache_files, cache_folders
from fastcnn.data.cached_photos import Cache
from fastcnn.data.index import scan
from fastcnn.errors import FastCNNError, FastCNNWarning
from pipelines import Verdict, workers
from pipelines.shared_memory import shared
from pipelines.workers import Workers
from tests.conftest import SHARED_DATA
from tests.pipelines.test_pipelines import camera, encoded

SIZE = 32

SERVER = workers.Server


@pytest.fixture(autouse=True)
def _own_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start and end servers as a run does: tests/conftest.py keeps them elsewhere."""
    monkeypatch.setattr(workers, "Server", SERVER)


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    return [encoded(camera(60, 40, seed)) for seed in range(40)]


def decode(decoding: Workers, sources: list[bytes]) -> tuple[np.ndarray, list[Verdict]]:
    out = shared((len(sources), SIZE, SIZE, 3))
    verdicts = decoding.decode(sources, SIZE, out)
    assert len(verdicts) == len(sources)
    return out, verdicts


def expected(sources: list[bytes], decoder: str = "pillow") -> np.ndarray:
    out = np.zeros((len(sources), SIZE, SIZE, 3), np.uint8)
    pipelines.decode(sources, SIZE, out, decoder=decoder)
    return out


def runs(process: Path) -> bool:
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.mark.parametrize("decoder", pipelines.BACKENDS)
def test_pixels_and_verdicts_are_those_of_this_process(decoder: str, photos: list[bytes]) -> None:
    try:
        pipelines.choose(decoder, gpu=False)
    except pipelines.DecoderUnavailable as error:
        pytest.skip(str(error))
    sources = [*photos, b"", b"text", photos[0][:400]]
    with Workers(decoder) as decoding:
        got, verdicts = decode(decoding, sources)
        assert decode(decoding, [])[1] == []
    out = np.zeros_like(got)
    assert verdicts == pipelines.decode(sources, SIZE, out, decoder=decoder)
    assert np.array_equal(got, out)
    pipelines.close()


@pytest.mark.cuda
def test_dali_on_a_gpu_is_that_of_this_process(photos: list[bytes]) -> None:
    pipelines.choose("dali", gpu=True)
    out = np.zeros((len(photos), SIZE, SIZE, 3), np.uint8)
    verdicts = pipelines.decode(photos, SIZE, out, decoder="dali", gpu=0)
    with Workers("dali", gpu=0) as decoding:
        got, same = decode(decoding, photos)
    assert same == verdicts
    assert np.array_equal(got, out)
    pipelines.close()


DEATHS = {
    "segfault": ("decoder crash", "SIGSEGV"),
    "abort": ("decoder crash", "SIGABRT"),
    "exit": ("decoder crash", "exit code 7"),
    "raise": ("decoder crash", "RuntimeError: no decoder should"),
    "out of memory": ("decoder killed", "out of memory"),
}


@pytest.mark.parametrize("death", DEATHS)
def test_the_guilty_photo_is_found(death: str, planted: str, photos: list[bytes]) -> None:
    sources = list(photos)
    for guilty in (0, 17, 18, 39):
        sources[guilty] += death.encode()
    with Workers(planted) as decoding:
        got, verdicts = decode(decoding, sources)
    reason, detail = DEATHS[death]
    assert [i for i, verdict in enumerate(verdicts) if not verdict.ok] == [0, 17, 18, 39]
    assert {verdicts[i].reason for i in (0, 17, 18, 39)} == {reason}
    assert detail in verdicts[0].detail
    right = expected(photos)
    right[[0, 17, 18, 39]] = 0
    assert np.array_equal(got, right)


def test_a_death_that_does_not_come_again_costs_nothing(planted: str, photos: list[bytes]) -> None:
    with Workers(planted) as decoding:
        _, verdicts = decode(decoding, [*photos[:20], photos[20] + b"once", *photos[21:]])
    assert all(verdict.ok for verdict in verdicts)


def test_several_workers(planted: str, photos: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "THREADS", 1)
    sources = [*photos[:30], photos[30] + b"segfault", *photos[31:]]
    with Workers(planted, threads=3) as decoding:
        got, verdicts = decode(decoding, sources)
    assert [verdict.ok for verdict in verdicts] == [i != 30 for i in range(40)]
    kept = [i for i in range(40) if i != 30]
    assert np.array_equal(got[kept], expected(photos)[kept])


def test_a_decoder_that_dies_of_everything_is_given_up(planted: str, photos: list[bytes]) -> None:
    Path("broken").touch()
    with (
        Workers(planted) as decoding,
        pytest.raises(pipelines.DecoderUnavailable, match=r"fails on every photo .*SIGSEGV.*--decoder"),
    ):
        decode(decoding, photos)


def test_a_folder_that_begins_with_many_that_kill(planted: str, photos: list[bytes]) -> None:
    with Workers(planted) as decoding:
        _, verdicts = decode(decoding, [photo + b"segfault" for photo in photos[:30]] + photos[30:])
    assert [verdict.ok for verdict in verdicts] == [False] * 30 + [True] * 10


def test_a_killed_worker_and_a_killed_server_are_replaced(photos: list[bytes]) -> None:
    right = expected(photos)
    with Workers("pillow") as decoding:
        assert np.array_equal(decode(decoding, photos)[0], right)
        worker, server = decoding._workers[0], decoding._server
        assert worker is not None
        assert server is not None
        assert server._process is not None
        os.kill(worker.pid, signal.SIGKILL)
        assert np.array_equal(decode(decoding, photos)[0], right)
        worker = decoding._workers[0]
        assert worker is not None
        os.kill(server._process.pid, signal.SIGKILL)
        os.kill(worker.pid, signal.SIGKILL)
        assert np.array_equal(decode(decoding, photos)[0], right)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_relative_paths_are_the_callers(photos: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it changed its working directory after the server was started."""
    workers.start_early("pillow")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("photo.jpg").write_bytes(photos[0])
    out = shared((1, SIZE, SIZE, 3))
    with Workers("pillow") as decoding:
        assert [verdict.reason for verdict in decoding.decode([Path("photo.jpg")], SIZE, out)] == [""]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_server_outlives_its_caller_neither_in_an_import_nor_with_workers(
    photos: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time; time.sleep(60)")
    monkeypatch.syspath_prepend(tmp_path)
    importing = workers.Server("slow_to_import", gpu=None)
    with Workers("pillow") as decoding:
        decode(decoding, photos)
        server, worker = decoding._server, decoding._workers[0]
        assert server
        assert worker
        for each in (importing, server):  # as where the caller is killed
            each._connection.close()
            each._link.close()
            assert each._process
            each._process.wait(10)
        assert not Path(f"/proc/{worker.pid}").exists(), "nor as a zombie"


def test_nothing_is_left_behind(photos: list[bytes]) -> None:
    before, files = children(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(2):
        with Workers("pillow") as decoding:
            decode(decoding, photos)
            worker = decoding._workers[0]
        assert worker is not None
        assert not runs(Path(f"/proc/{worker.pid}"))
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) <= files  # noqa: PTH208


def test_workers_end_with_their_caller(planted: str, photos: list[bytes], tmp_path: Path) -> None:
    """Killed in the middle of a batch, the caller leaves no process."""
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
import pipelines
from pipelines.shared_memory import shared
from pipelines.workers import Workers
pipelines.BACKENDS["planted"] = "planted_decoder"
decoding = Workers("planted")
photo = open("photo.jpg", "rb").read()
decoding.decode([photo], {SIZE}, shared((1, {SIZE}, {SIZE}, 3)))
print(decoding._server._process.pid, decoding._workers[0].pid, flush=True)
decoding.decode([photo + b"slow"], {SIZE}, shared((1, {SIZE}, {SIZE}, 3)))
"""
    Path("photo.jpg").write_bytes(photos[0])
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        processes = [Path("/proc") / number for number in caller.stdout.readline().split()]
        time.sleep(0.5)
        caller.kill()
    for _ in range(100):
        if not any(map(runs, processes)):
            break
        time.sleep(0.05)
    else:
        pytest.fail("the server or its worker outlives its caller")


INTERRUPTED = """
import sys; sys.path[:0] = {path!r}
import pipelines
from fastcnn.system import signals
from pipelines import workers
from pipelines.shared_memory import shared
from pipelines.workers import Workers
pipelines.BACKENDS["planted"] = "planted_decoder"
workers.THREADS = 1
photo = open("photo.jpg", "rb").read()
with signals.raising(), Workers("planted", threads={threads}) as decoding:
    out = shared(({threads}, {size}, {size}, 3))
    decoding.decode([photo] * {threads}, {size}, out)
    print(decoding._server._process.pid, *(worker.pid for worker in decoding._workers), flush=True)
    decoding.decode([photo + b"slow"] * {threads}, {size}, out)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize(("signum", "threads"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_an_interruption_in_the_middle_of_a_batch_leaves_no_process(
    planted: str, photos: list[bytes], signum: int, threads: int
) -> None:
    Path("photo.jpg").write_bytes(photos[0])
    code = INTERRUPTED.format(path=sys.path, threads=threads, size=SIZE)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as caller:
        assert caller.stdout is not None
        processes = [Path("/proc") / number for number in caller.stdout.readline().split()]
        assert len(processes) == 1 + threads
        while caller.poll() is None and len(list(Path().glob("begun-*"))) < threads:
            time.sleep(0.02)
        caller.send_signal(signum)
        _, told = caller.communicate()
    assert "StopSignal" in told
    assert [process.name for process in processes if process.exists()] == [], "nor as a zombie"


@pytest.mark.parametrize("when", ["before", "during the start"])
def test_a_server_that_is_given_up_is_not_started_again(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that start when an interruption comes still ask for workers, after those that run were ended."""
    server, started = workers.Server("pipelines.pillow", gpu=None), []
    start, server.given_up = server._start, when == "before"

    def interrupted_start() -> None:
        start()
        started.append(server._process)
        server.given_up, server._process = True, None  # as the thread that was interrupted leaves it

    monkeypatch.setattr(server, "_start", interrupted_start)
    server.close()
    with pytest.raises(workers.Unavailable, match="interrupted"):
        server.fork()
    assert [process.returncode for process in started] == ([] if when == "before" else [0])


INTERRUPTED_AFTER = """
import os, signal, sys, threading; sys.path[:0] = {path!r}
import pipelines
from fastcnn.system import signals
from pipelines import workers
from pipelines.shared_memory import shared
from pipelines.workers import Workers
pipelines.BACKENDS["planted"] = "planted_decoder"
workers.THREADS = 1
photo = open("photo.jpg", "rb").read()
out = shared((12, {size}, {size}, 3))
with signals.raising(), Workers("planted", threads=12) as decoding:
    decoding.decode([photo], {size}, out[:1])
    threading.Timer({seconds}, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    decoding.decode([photo + b"slow"] * 12, {size}, out)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("milliseconds", [*range(0, 40, 2), *range(40, 200, 20)])
def test_an_interruption_while_threads_start_leaves_no_process(
    planted: str, photos: list[bytes], milliseconds: int
) -> None:
    Path("photo.jpg").write_bytes(photos[0])
    code = INTERRUPTED_AFTER.format(path=sys.path, size=SIZE, seconds=milliseconds / 1000)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "StopSignal" in ended.stderr
    mine, commands = str(Path("modules").resolve()), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another that ends meanwhile
            commands.append((process / "cmdline").read_text(errors="replace"))
    assert [command for command in commands if mine in command] == []


def test_an_interruption_while_a_server_ends_does_not_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    server = workers.Server("pipelines.pillow", gpu=None)
    process = server._process
    assert process is not None
    wait, interruptions = process.wait, iter([KeyboardInterrupt])

    def interrupted_wait() -> int:
        for interruption in interruptions:
            raise interruption
        return wait()

    monkeypatch.setattr(process, "wait", interrupted_wait)
    with pytest.raises(KeyboardInterrupt):
        server.close()
    assert process.returncode is not None


def test_where_no_process_can_be_started(photos: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is this process that decodes, and says so."""
    monkeypatch.setattr(sys, "executable", "")
    with Workers("pillow") as decoding:
        got, _ = decode(decoding, photos)
        assert "starts no worker processes" in decoding.note
    assert np.array_equal(got, expected(photos))


def test_a_server_started_early_is_used_or_ended(photos: list[bytes]) -> None:
    workers.start_early("pillow")
    server = workers._early["pillow"]
    with Workers("pillow") as decoding:
        assert np.array_equal(decode(decoding, photos)[0], expected(photos))
        assert decoding._server is server
    workers.start_early("pillow")
    process = workers._early["pillow"]._process
    assert process is not None
    workers.end_early()
    assert process.returncode is not None
    assert not workers._early


def write(folder: Path, contents: list[bytes]) -> Path:
    for i, content in enumerate(contents):
        (folder / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        (folder / f"class {i % 2}" / f"{i:03}.jpg").write_bytes(content)
    return folder


def build(folder: Path, decoder: str, **options: object) -> Cache:
    config = DataConfig(image_size=SIZE, decoder="pillow", cache_dir=str(folder.parent / "cache"))
    object.__setattr__(config, "decoder", decoder)  # perhaps one that only tests know
    return cache.build(scan(folder), config, **options)


def test_a_cache_is_built_around_photos_that_kill(
    planted: str, photos: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 of 500: those are listed, 495 are there, pixels right, and the next build decodes nothing again."""
    contents = [photos[i % 40] + (b"segfault" if i in (3, 100, 101, 102, 499) else b"") for i in range(500)]
    data = write(tmp_path / "data", contents)
    monkeypatch.setattr(cache_files, "CHUNK", 128)
    built = build(data, planted)
    paths = scan(data).paths
    bad = {paths[photo][-7:-4] for photo in built.reasons}
    assert bad == {"003", "100", "101", "102", "499"}
    assert set(built.reasons.values()) == {"decoder crash"}
    assert np.count_nonzero(built.rows >= 0) == 495
    right = expected(photos)
    for path, row in zip(scan(data).paths, built.rows, strict=True):
        assert row < 0 or np.array_equal(built.images[row], right[int(path[-7:-4]) % 40])
    assert build(data, planted).num_decoded == 0


def test_only_a_folder_without_a_cache_is_started_early(photos: list[bytes], tmp_path: Path) -> None:
    data = write(tmp_path / "data", photos[:4])
    cache_folders.start_early(data, "pillow", tmp_path / "cache")
    assert list(workers._early) == (["pillow"] if pipelines.num_cores() > 1 else [])
    build(data, "pillow")
    assert not workers._early
    cache_folders.start_early(data, "pillow", tmp_path / "cache")
    assert not workers._early


def test_killed_for_memory_is_asked_again_by_the_next_run(planted: str, photos: list[bytes], tmp_path: Path) -> None:
    data = write(tmp_path / "data", [*photos[:9], photos[9] + b"out of memory"])
    assert "decoder killed" in build(data, planted).reasons.values()
    assert build(data, planted).num_decoded == 1


def test_a_build_that_cannot_start_processes_says_so(
    photos: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "data", photos[:10])
    monkeypatch.setattr(sys, "executable", "")
    with pytest.warns(FastCNNWarning, match="decoded in this process"):
        assert build(data, "pillow").num_decoded == 10
    data = write(tmp_path / "data", photos[:11])
    with pytest.raises(FastCNNError, match="--strict"):
        build(data, "pillow", strict=True)


UNFILTERED = """
from pipelines import dali

dali.header = lambda data: dali.Header(100, 100, 1, 0)  # whatever the file is, DALI gets it
dali.complaint = lambda data: ""
dali._complete = lambda data, head: True
dali._region = lambda head, box: dali.np.array([0, 0, 32, 32], dali.np.float32)
dali._CPU_BATCH = 64  # 32 and more is where it dies
decode, identity, close = dali.decode, dali.identity, dali.close
"""


@pytest.fixture
def unfiltered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """DALI without what stands before it; in this process, too, until the test ends."""
    pytest.importorskip("nvidia.dali")
    from pipelines import dali

    for name in ("header", "complaint", "_complete", "_region", "_CPU_BATCH"):
        monkeypatch.setattr(dali, name, getattr(dali, name))
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "unfiltered_dali.py").write_text(UNFILTERED)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setitem(pipelines.BACKENDS, "unfiltered", "unfiltered_dali")
    return "unfiltered"


def pages(count: int) -> list[bytes]:
    texts = [b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20, b"this is no photo\n" * 50]
    return [texts[i % 2] + str(i).encode() for i in range(count)]


def mixed(photos: list[bytes], num_photos: int, num_pages: int) -> list[bytes]:
    contents = [photos[i % len(photos)] for i in range(num_photos)]
    step = num_photos // num_pages
    for i, page in enumerate(pages(num_pages)):
        contents.insert(i * (step + 1), page)
    return contents


@pytest.mark.parametrize(("num_photos", "num_pages"), [(128, 16), pytest.param(1_000, 64, marks=pytest.mark.long)])
def test_dali_itself_dies_of_text_and_the_build_goes_on(
    unfiltered: str,
    photos: list[bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_photos: int,
    num_pages: int,
) -> None:
    deaths: list[str] = []

    def autopsy(server: workers.Server, worker: workers.Worker) -> Verdict:
        verdict = examine(server, worker)
        deaths.append(verdict.detail)
        return verdict

    examine = workers.Server.autopsy
    monkeypatch.setattr(workers.Server, "autopsy", autopsy)
    data = write(tmp_path / "data", mixed(photos, num_photos, num_pages))
    built = build(data, unfiltered)
    assert np.count_nonzero(built.rows >= 0) == num_photos
    for i, path in enumerate(scan(data).paths):
        assert (i in built.reasons) == (data / path).read_bytes().startswith((b"<", b"this"))
    print(f"{len(deaths)} deaths: {set(deaths)}")
    if num_pages == 64:  # fewer do not kill DALI 2.4.0 every time
        assert any("SIGSEGV" in death for death in deaths)


def test_text_does_not_even_reach_dali(photos: list[bytes], tmp_path: Path) -> None:
    """64 text and HTML files among 1,000 photos: 64 with their reason, 1,000 cached."""
    pytest.importorskip("nvidia.dali")
    data = write(tmp_path / "data", mixed(photos, 1_000, 64))
    built = build(data, "dali")
    assert [*built.reasons.values()] == ["not an image"] * 64
    assert np.count_nonzero(built.rows >= 0) == 1_000


@pytest.mark.long
@pytest.mark.shared
def test_odd_images_among_good_ones(tmp_path: Path) -> None:
    """With each decoder: every good photo is cached, and each odd one has the verdict that README.tsv implies."""
    odd, reasons, damage = SHARED_DATA / "odd-images", {}, {}
    rows = [line.split("\t") for line in (odd / "README.tsv").read_text().splitlines()[1:]]
    good = sorted((SHARED_DATA / "animals-8" / "dog").iterdir())[:26]
    for i, photo in enumerate(good):
        (tmp_path / "data" / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / f"class {i % 2}" / f"{3 * i:03} good.jpg").symlink_to(photo)
    for i, row in enumerate(rows):
        (tmp_path / "data" / "class 0" / f"{2 * i:03} odd {row[0]}").symlink_to(odd / row[0])
    index = scan(tmp_path / "data")
    for decoder in pipelines.BACKENDS:
        try:
            pipelines.choose(decoder, gpu=False)
        except pipelines.DecoderUnavailable:
            continue
        built = build(tmp_path / "data", decoder)
        found = {path: built.reasons.get(i, "") for i, path in enumerate(index.paths)}
        assert not any(reason for path, reason in found.items() if path.endswith("good.jpg"))
        reasons[decoder] = {path.partition(" odd ")[2]: reason for path, reason in found.items() if " odd " in path}
        damage[decoder] = {index.paths[i].partition(" odd ")[2]: text for i, text in built.damage.items()}
    assert len(reasons["pillow"]) == 39
    assert {name for name, reason in reasons["pillow"].items() if not reason} == {
        row[0] for row in rows if row[7] == "ok"
    }
    assert damage["pillow"] == {row[0]: row[8] for row in rows if row[7] == "ok" and row[8] != "-"}
    assert all(each == reasons["pillow"] for each in reasons.values())
    assert all(each == damage["pillow"] for each in damage.values())

"""The documents' commands run, or are listed with the reason; their links, paths and options exist."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from fastcnn.cli import app
from fastcnn.sweeps import sweep_file

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "examples").glob("*/README.md")),
    )
}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TABLE = re.compile(r"<!-- table: \S+ -->.*?<!-- end -->", re.DOTALL)

# The small form of a command: these come last, so they count.
SMALL = shlex.split("--epochs 1 --image-size 32 --filters 8 --batch-size 16 --no-report --quiet")

# Why a command, known by how it begins, is not run here: where there is a test of it, its file.
NOT_RUN = {
    "scripts/quickstart.sh": "makes an environment; its commands are those of the five below it",
    "scripts/test.sh": "this suite",
    "scripts/check.sh": "run by .ci/run",
    "scripts/bench.sh": "makes an environment; tests/bench/test_bench.py runs its benchmarks",
    "scripts/gpu_proof.sh": "minutes each; tests/bench/test_gpu_proof.py runs the small form",
    "scripts/peers.sh": "downloads; tests/bench/test_baselines.py trains the peers where they are",
    "scripts/gpu_pack.sh": "downloads; tests/bench/test_gpu_proof.py",
    "scripts/bench_compare.sh": "makes an environment; tests/bench/test_compare.py",
    "python scripts/kill_test.py": "minutes; tests/runs/test_faults.py kills runs",
    "python scripts/readme_tables.py": "writes into the tree; tests/bench/test_bench.py",
    "python -m bench.scale --write": "writes into the tree; tests/bench/test_scale.py",
    "python -m bench.harness.roofline": "tests/bench/test_bench.py",
    "python -m bench.kernels": "compiles for a minute; tests/bench/test_kernels.py",
    "python -m bench.recipes": "hours of training; tests/bench/test_bench.py",
    "fastcnn bench": "minutes; tests/bench/test_bench.py",
    "fastcnn parity": "hours of training; tests/bench/test_parity.py",
    "fastcnn data download": "needs the internet; tests/data_tools/test_download.py downloads from a local server",
    "fastcnn serve": "runs until it is stopped; tests/inference/test_serve.py",
    "curl": "needs the server; tests/inference/test_serve.py",
    "fastcnn train photos --devices 8": "needs eight GPUs; two processes on a CPU are run below",
    "torchrun": "needs eight GPUs; tests/system/test_ranks.py",
    "fastcnn train photos --wandb online": "needs a W&B account; tests/runs/test_tracker.py",
    "fastcnn sweep photos --wandb": "needs a W&B account; tests/sweeps/test_sweep.py",
    "fastcnn sweep photos/inaturalist_12K --wandb": "needs a W&B account; tests/sweeps/test_sweep.py",
    "wandb": "needs a W&B account",
    "pip install": "installs packages",
    "cmake": "tests/end_to_end/test_examples.py",
    "build/classify": "tests/end_to_end/test_examples.py",
    "docker": "needs Docker and NVIDIA's image",
    "python examples/": "tests/end_to_end/test_examples.py",
}
EPOCHS = itertools.count(3)  # a run is resumed for more each time
# Commands that start processes which import torch: seconds each. tests/cli/test_doctor.py runs doctor in any form.
LONG = re.compile(r"--devices|--export|^fastcnn (doctor|export|sweep (?!--print))|\|")


def commands(text: str) -> list[str]:
    """Return the commands of the fenced blocks of shell: continued lines joined, comments cut off."""
    blocks = "\n".join(block for language, block in FENCED.findall(text) if language == "sh")
    lines = (re.sub(r"(^|\s+)#\s.*", "", line).strip() for line in blocks.replace("\\\n", " ").splitlines())
    return [" ".join(line.split()) for line in lines if line]


def why_not(command: str) -> str:
    """Return why a command is not run here; "" where it is."""
    if command == "python scripts/readme_tables.py --check":
        return ""
    return next((reason for start, reason in NOT_RUN.items() if f"{command} ".startswith(f"{start} ".rstrip(" "))), "")


COMMANDS = {page: commands(text) for page, text in PAGES.items()}
# Commands of the README with what they print: run by a test of their own.
SHOWN: dict[str, str] = dict(
    re.findall(r"^```sh\n(fastcnn [^\n]*)\n```\n\n```text\n(.*?)^```$", PAGES["README.md"], re.DOTALL | re.MULTILINE)
)
RUN = [
    command
    for command in dict.fromkeys(command for found in COMMANDS.values() for command in found)
    if command not in SHOWN and not why_not(command)
]


@pytest.fixture(scope="module")
def workshop(
    photos: Path, run_dir: Path, exports: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with what the documents name: photos, runs and an exported file of each, a sweep file."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "other_photos").symlink_to(photos)
    shutil.copytree(photos, folder / "photos")
    (folder / "new_folder").symlink_to("photos")
    rows = [f"{path.relative_to(folder)},{path.parent.name}\n" for path in sorted(folder.glob("photos/*/*.jpg"))]
    (folder / "photos.csv").write_text("".join(["file,species\n", *rows]), encoding="utf-8")
    shutil.copy(next(photos.glob("*/*.jpg")), folder / "photo.jpg")
    shutil.copytree(run_dir, folder / "runs" / "photos")
    shutil.copy(exports("torchscript"), folder / "runs" / "photos")
    shutil.copytree(folder / "runs" / "photos", folder / "runs" / "inaturalist_12K")
    sweep = sweep_file.shipped().replace("- 64\n", "- 8\n")
    (folder / "sweep.yaml").write_text(sweep, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _command_line_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what the command line sets for its process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def call(arguments: list[str]) -> int:
    """Run a command in this process; return its exit code."""
    status = app.main(arguments)
    return status


def each(commands: Iterable[str]) -> list[Any]:
    """Return commands as a test's parameters, those that start processes marked long."""
    return [pytest.param(one, marks=[pytest.mark.long] if LONG.search(one) else []) for one in commands]


def small(words: list[str]) -> list[str]:
    """Return a command's words with the options of its small form."""
    if words[0] == "train" and "--resume" in words:
        return [*words, "--epochs", str(next(EPOCHS))]
    if words[0] == "train" and "--config" in words:
        return [*words, "--epochs", "1", "--no-report"]
    if words[0] == "sweep" and "--print-file" not in words:
        return [*words, *SMALL, "--trials", "2"]
    return [*words, *SMALL] if words[0] == "train" else words


def test_the_readme_shows_five_commands() -> None:
    assert len(SHOWN) == 5


@pytest.mark.parametrize("command", each(SHOWN))
def test_the_readme_shows_what_is_printed(
    command: str, workshop: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each word of the README's output, class names and precision aside, is printed by the command's small form."""
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workshop / "cache"))
    if "train" in command:
        shutil.rmtree(workshop / "cache", ignore_errors=True)  # decoding is shown too
    assert call([word for word in small(shlex.split(command)[1:]) if word != "--quiet"]) == 0
    printed = set(re.findall(r"[A-Za-z]+", "".join(capfd.readouterr())))
    assert set(re.findall(r"[A-Za-z]{2,}", re.sub(r"crescent-plain|SHA-256 \w+|bf16", "", SHOWN[command]))) <= printed


@pytest.mark.parametrize("command", each(RUN))
def test_the_command_runs(
    command: str, workshop: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workshop / "cache"))
    if command.startswith("python "):
        arguments = [sys.executable, *shlex.split(command)[1:]]
        assert subprocess.run(arguments, check=False, cwd=ROOT, capture_output=True).returncode == 0
        return
    command = command.replace("photos/inaturalist_12K", "photos")
    if "|" in command:
        piped = command.replace("fastcnn", f"{shlex.quote(sys.executable)} -m fastcnn.cli")
        assert subprocess.run(["bash", "-c", piped], check=False, env=None).returncode == 0
        return
    words, _, _file = command.partition(" > ")
    assert call(small(shlex.split(words)[1:])) == 0, capsys.readouterr().err


def test_every_command_left_out_is_in_the_documents_and_its_test_exists() -> None:
    everything = [command for found in COMMANDS.values() for command in found]
    for start, reason in NOT_RUN.items():
        assert any(command.startswith(start) for command in everything), f"{start} is in no document"
        for path in re.findall(r"tests/\S+\.py", reason):
            assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_a_page_has_a_command_that_is_run(page: str) -> None:
    assert any(not why_not(command) for command in COMMANDS[page])


@pytest.mark.parametrize("page", PAGES)
def test_commands_stand_in_fenced_blocks(page: str) -> None:
    outside = FENCED.sub("", PAGES[page])
    assert not re.findall(r"^ {4,}(?:fastcnn|python|pip|scripts/|torchrun|wandb|curl)\b.*", outside, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_text_name_what_exists(page: str) -> None:
    for code in re.findall(r"`((?:fastcnn |scripts/|python )[^`\n]+)`", FENCED.sub("", PAGES[page])):
        words = code.replace("\\|", "|").split()
        if words[0] == "fastcnn":
            command: click.Command = app.commands
            while len(words) > 1 and isinstance(command, click.Group) and not words[1].startswith("-"):
                found = command.commands.get(words.pop(1))
                assert found, code
                command = found
            known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            given = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
            assert command.name in ("bench", "parity") or given <= known | {"--help"}, code
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), code
        else:
            assert (ROOT / words[words[0] == "python"]).exists(), code


@pytest.mark.parametrize("page", PAGES)
def test_options_exist(page: str) -> None:
    def options(command: click.Command) -> set[str]:
        names = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        inside = command.commands.values() if isinstance(command, click.Group) else []
        return names.union(*map(options, inside))

    foreign = {  # of our scripts and benchmarks, of torchrun, git, pytest, and of other trainers
        "--long", "--check", "--write", "--launches", "--only", "--budget", "--out", "--device", "--seeds", "--margin",
        "--ingredients", "--types", "--quick", "--small", "--nnodes", "--rdzv-endpoint", "--photos", "--kills",
        "--threads", "--learning-rate",
    }  # fmt: skip
    named = re.findall(r"`(--[a-z][a-z0-9_-]+)", FENCED.sub("", PAGES[page]))
    assert {name.replace("_", "-") for name in named} <= options(app.commands) | foreign


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_resolve(page: str) -> None:
    text, folder = FENCED.sub("", PAGES[page]), (ROOT / page).parent
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", text):
        path = (folder / target).resolve() if target else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings], (
                anchor
            )
    for path, name in re.findall(
        r"`((?:fastcnn|pipelines|bench|tests|scripts|examples)/[\w./-]+)`(?:: `(\w+)`)?", text
    ):
        revised = re.search(rf"`{re.escape(path)}` of revision", text)  # deleted since
        assert revised or (ROOT / path).exists() or path in LATER, path
        if name:
            assert re.search(rf"^{name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (path, name)


LATER = {"bench/results/<machine>/", "pipelines/reduced.py"}  # made by a command, or by the reader


def test_pages_are_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150
    for page, text in PAGES.items():
        if page not in ("docs/notes.md", "docs/scale.md"):
            assert len(TABLE.sub("", text).splitlines()) < 200, page


def test_every_published_table_is_on_one_page() -> None:
    import readme_tables

    records = readme_tables.published(readme_tables.PUBLISHED)
    texts = [path.read_text(encoding="utf-8") for path in readme_tables.documents()]
    shown = sorted(name for text in texts for name in re.findall(r"<!-- table: (\S+) -->", text))
    made = {name for name, table in readme_tables.tables.TABLES.items() if any(map(table.lines, records))}
    assert shown == sorted(made - {"stages"})


def test_the_readmes_picture_is_drawn(tmp_path: Path) -> None:
    import readme_picture

    assert readme_picture.main(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_the_decoder_that_contributing_adds(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    import pipelines

    (code,) = [block for language, block in FENCED.findall(PAGES["CONTRIBUTING.md"]) if language == "python"]
    (tmp_path / "reduced_decoder.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(pipelines.BACKENDS, "reduced", "reduced_decoder")
    sources = [*sorted(photos.glob("*/*.jpg"))[:8], b"no image"]
    reduced, pillow = (np.empty((len(sources), 32, 32, 3), np.uint8) for _ in range(2))
    verdicts = pipelines.decode(sources, 32, reduced, decoder="reduced")
    assert verdicts == pipelines.decode(sources, 32, pillow, decoder="pillow")
    assert np.abs(reduced.astype(int) - pillow).mean(axis=(1, 2, 3)).max() < 1.0
    assert pipelines.identity("reduced", None) == "reduced-1"

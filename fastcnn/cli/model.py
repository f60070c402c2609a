"""The commands that use a trained model: eval, export, verify, predict and serve."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from fastcnn.cli.group import SETTINGS
from fastcnn.cli.options import (
    ExportCommand,
    config_options,
    given,
    json_option,
    layout_options,
    moved_to_option,
    parse_origins,
    parse_size,
    photos_in,
    reading_of,
    say_opening,
    sha256_option,
)
from fastcnn.config import Export, as_choice, resolve
from fastcnn.errors import CheckError, FastCNNError, UsageError, os_error_as
from fastcnn.system import quick_start, signals
from fastcnn.system.text import printable, to_json

if TYPE_CHECKING:
    from fastcnn.inference.artefact import Artefact


@click.command("eval", **SETTINGS)
@click.argument("run")
@click.argument("data", required=False)
@moved_to_option
@config_options("device", "cache_dir")
@layout_options
@click.option("--decoder", metavar="auto|dali|turbo|pillow", help="Image decoder. Default: the run's.")
@click.option("--decode-timeout", metavar="SECONDS", help="Most that decoding one image may take. Default: the run's.")
@json_option
@click.option("--output", metavar="FILE", help="Also write the JSON to a file.")
@signals.raising()
def evaluate(
    *, run: str, data: str | None, moved_to: str | None, as_json: bool, output: str | None, **options: Any
) -> None:
    """Evaluate the best model of a run.

    RUN is a folder, or a name under runs/. Printed are accuracy, loss, top-5 accuracy and the scores of each class.
    Without DATA: on the run's own validation and test images. With DATA: on its val and test folders; if it has none,
    on its train folder; else on all of DATA/<class>/...
    """
    say_opening(run)
    with quick_start.importing():
        from fastcnn.runs.evaluate_run import evaluate_run
    from fastcnn.system.console import Console

    options = given(options)
    config, reading = resolve(options), reading_of(options, data or moved_to)
    data, moved_to = (folder and photos_in(folder, quiet=as_json) for folder in (data, moved_to))
    with Console().progress("decoding", "images") as progress:
        scores = evaluate_run(
            run,
            data,
            moved_to=moved_to,
            cache_dir=config.cache_dir,
            device=config.device,
            decoder=config.decoder if "decoder" in options else None,
            timeout=config.decode_timeout if "decode_timeout" in options else None,
            reading=reading,
            progress=progress,
        )
    text = to_json(scores.to_dict())
    if output:
        with os_error_as(f"cannot write {output}"):
            Path(output).write_text(text + "\n", encoding="utf-8")
    if as_json:
        click.echo(text)
        return
    click.echo(f"epoch {scores.best_epoch} of {scores.run_dir}, {scores.precision} on {scores.device}")
    for name, card in scores.by_split.items():
        where = f"{scores.data}, held out by the run" if data is None else str(scores.data)
        click.echo(f"\n{name} images of {where}\n{card.table()}")


@click.command(cls=ExportCommand, **SETTINGS)
@click.argument("run")
@click.option(
    "--format", "formats", default="torchscript", metavar="LIST", help=f"Formats: {', '.join(get_args(Export))}."
)
@click.option("--half", metavar="[bf16|fp16]", help="16-bit weights and arithmetic. Without a value: bf16; ONNX: fp16.")
@click.option("--output", metavar="FILE", help="Output file. Default: model.<format> in the run folder.")
@click.option("--triton", metavar="DIR", help="Also add the model to this Triton model repository, under RUN's name.")
@click.option("--quick", is_flag=True, help="Compare on 500 validation images instead of all of them.")
@moved_to_option
@config_options("cache_dir")
def export(
    *, run: str, formats: str, half: Any, output: str | None, triton: str | None, moved_to: str | None, **how: Any
) -> None:
    """Export the best model of a run for deployment.

    RUN is a folder, or a name under runs/. A separate process compares each file with the trained model, on its
    validation images, before it is kept.
    """
    from fastcnn.system.console import Console

    names = [as_choice(name.strip(), get_args(Export)) for name in formats.split(",")]
    half = half and half.lower()
    for option, value in (("--output", output), ("--triton", triton)):
        if value and len(names) > 1:
            raise UsageError(f"{option} works with one format, and --format has {len(names)}: give one")
    if triton and names[0] == "pt2":
        raise UsageError("--triton: expected --format torchscript or onnx, got pt2")
    console, moved_to = Console(), moved_to and photos_in(moved_to)
    say_opening(run)
    with quick_start.importing():
        from fastcnn.export.exporters import export_run
    for name in names:
        with console.progress(f"exporting {name}", "images") as progress:
            path = export_run(
                run,
                format=name,
                output=output,
                half=half,
                moved_to=moved_to,
                progress=progress,
                note=console.line,
                **how,
            )
    if triton:
        from fastcnn.export.triton_repository import repository_name, write_repository
        from fastcnn.storage import run_folder

        folder = write_repository(path, triton, repository_name(run_folder.find(run)))
        click.echo(f"model repository {triton}: {folder.name}")


@click.command("verify", **SETTINGS)
@click.argument("model")
@click.argument("data", required=False)
@moved_to_option
@config_options("cache_dir")
@layout_options
@sha256_option
@json_option
def verify(
    *,
    model: str,
    data: str | None,
    moved_to: str | None,
    cache_dir: str | None,
    sha256: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Verify an exported model.

    MODEL (a file, or a run folder) must be unchanged and give the trained model's probabilities, which are compared on
    the golden inputs stored in the file and, in its run folder, on the validation images. With DATA, a folder of images
    in class folders: how much the probabilities depend on the image decoder. The exit code is 4 if the check fails.
    """
    import dataclasses

    from fastcnn.system.console import Console

    how = resolve(reading_of(options, data)).layout
    console, moved_to = Console(), moved_to and photos_in(moved_to, quiet=as_json)
    with console.progress("verifying", "images") as progress:
        with quick_start.importing():
            from fastcnn.export.verify import verify_file
        from fastcnn.inference import artefact

        opened = artefact.open(model, sha256=sha256, warn_of_strangers=True)
        verification = verify_file(opened, None, moved_to, cache_dir, progress=progress)
    sensitivity = None
    if data:
        data = photos_in(data, quiet=as_json)
        import torch

        from fastcnn.export.decoder_sensitivity import measure

        with console.progress("comparing", "images") as progress:
            gpu = 0 if torch.cuda.is_available() else None
            sensitivity = measure(opened, data, gpu=gpu, options=how, progress=progress)
    if as_json:
        answer = dataclasses.asdict(verification) | ({"decoders": sensitivity.to_dict()} if sensitivity else {})
        click.echo(to_json(answer))
    else:
        click.echo("\n".join([f"{opened.path}  SHA-256 {verification.sha256}", *verification.lines()]))
        if sensitivity:
            click.echo(f"\n{sensitivity.table()}")
    if verification.problems:
        raise CheckError(f"{opened.path}: {'; '.join(verification.problems)}")


@click.command("predict", **SETTINGS)
@click.argument("model")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option(
    "--top-k", type=click.IntRange(1), default=1, metavar="N", help="Number of most probable classes to print."
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "csv", "jsonl"], case_sensitive=False),
    default="table",
    help="Output format.",
)
@config_options("workers", "max_pixels", "decode_timeout")
@click.option("--quiet", is_flag=True, help="Print no progress and no summary.")
@sha256_option
@signals.raising()
def predict(
    *, model: str, inputs: tuple[str, ...], top_k: int, format_: str, quiet: bool, sha256: str | None, **options: Any
) -> int:
    """Classify images with an exported model.

    MODEL is an exported file, or a run: a folder, or a name under runs/. INPUT is an image, a folder, a glob, or - to
    read paths from standard input. An image that cannot be used gets a line with the reason, and the exit code is 1.
    """
    started, config = time.perf_counter(), resolve(given(options))
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads, which nothing here uses, prevent a fork
    path = _find(model)
    say_opening(str(path), quiet=quiet)
    from fastcnn.inference.classifier import decoder_forked
    from fastcnn.inference.predict import predict_photos, writer
    from fastcnn.system.console import Console

    with decoder_forked():
        with quick_start.importing():
            opened = _open(path, sha256, quiet=quiet)
        write, bad = writer(format_, opened.classes, top_k), 0
        with Console(quiet=quiet).progress("predicting", "images") as progress:
            for prediction in predict_photos(
                opened,
                inputs,
                workers=config.workers,
                max_pixels=config.max_pixels,
                timeout=config.decode_timeout,
                started=started,
                progress=progress,
                note=lambda text: None if quiet else click.echo(text, err=True),
            ):
                write(prediction)
                bad += bool(prediction.reason)
    return 1 if bad else 0


@click.command("serve", **SETTINGS)
@click.argument("model")
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 is all addresses of this machine.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, metavar="N", help="Port; 0 is any free port.")
@config_options("workers", "max_pixels", "decode_timeout")
@click.option(
    "--max-upload",
    metavar="SIZE",
    callback=parse_size,
    default="20MB",
    help="Largest photo accepted; also all photos of a request.",
)
@click.option(
    "--max-queue", type=click.IntRange(1), default=256, metavar="N", help="Images that may wait; more are refused."
)
@click.option("--max-batch", type=click.IntRange(1), default=32, metavar="N", help="Largest batch of images.")
@click.option("--window", type=click.FloatRange(0), default=5.0, metavar="MS", help="Time to wait for a batch to fill.")
@click.option(
    "--cors-origin",
    "cors_origins",
    metavar="ORIGIN",
    multiple=True,
    callback=parse_origins,
    help="Origin whose pages may ask, as https://example.org; may be repeated; * is any. Default: none.",
)
@sha256_option
def serve(
    *,
    model: str,
    host: str,
    port: int,
    max_upload: int,
    max_queue: int,
    max_batch: int,
    window: float,
    cors_origins: tuple[str, ...],
    sha256: str | None,
    **options: Any,
) -> None:
    """Serve an exported model over HTTP.

    MODEL is an exported file, or a run: a folder, or a name under runs/. There is a web page, a JSON interface and
    metrics for Prometheus.
    """
    config = resolve(given(options))
    with quick_start.importing():
        opened = _open(_find(model), sha256)
    try:
        with quick_start.importing():
            from fastcnn.inference import batcher
            from fastcnn.inference import serve as service
    except ImportError as error:
        raise FastCNNError(f"serve needs {error.name}: pip install 'fastcnn[serve]'") from None
    limits = batcher.Limits(
        upload=max_upload,
        pixels=config.max_pixels,
        decoding=config.decode_timeout,
        queue=max_queue,
        batch=max_batch,
        window=window / 1000,
    )
    service.serve(opened, host, port, limits, workers=config.workers, cors_origins=cors_origins)


def _find(model: str) -> Path:
    """Return the exported file that MODEL names, or the folder of its run where that was not exported."""
    from fastcnn.inference import artefact
    from fastcnn.storage import run_folder

    path = Path(model)
    if not path.exists() and (run_folder.RUNS / path).is_dir():
        path = run_folder.RUNS / path
    exported = path.is_dir() and artefact.exported_in(path)
    return path if not exported and (path / "best.pt").is_file() else artefact.find(path)


def _open(path: Path, sha256: str | None, *, quiet: bool = False) -> Artefact:
    """Return the exported model of a file or a run; one made for now of a run that was not exported."""
    from fastcnn.inference import artefact

    if sha256 or path.is_file():
        return artefact.open(path, sha256=sha256, warn_of_strangers=True)
    if not quiet:
        click.echo(f"{printable(str(path))} was not exported: its best.pt is, to a temporary file", err=True)
    from fastcnn.export.exporters import open_run

    return open_run(path)

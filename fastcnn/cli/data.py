"""The commands for images: data check, download and shard; cache list, info and clear."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from fastcnn.cli.group import SETTINGS, Commands
from fastcnn.cli.options import config_options, given, json_option, layout_options, parse_size, photos_in
from fastcnn.config import resolve
from fastcnn.errors import FastCNNError, nearest
from fastcnn.system import signals
from fastcnn.system.text import to_json


@click.group(cls=Commands, **SETTINGS)
def data() -> None:
    """Check, download or shard folders of images."""


@data.command("check", **SETTINGS)
@click.argument("folder", metavar="DATA")
@json_option
@click.option("--html", metavar="FILE", help="Also write a web page that shows the images.")
@config_options("decoder", "workers", "decode_timeout", "max_bad", "max_pixels")
@layout_options
@signals.raising()
def data_check(folder: str, as_json: bool, html: str | None, **options: Any) -> int:
    """Check a folder of images for problems.

    Reported are classes, sizes and formats, and images that are damaged, duplicated or perhaps mislabelled. Every image
    is decoded; nothing in DATA is changed. The exit code is 3 if a run would refuse DATA.
    """
    from fastcnn.data_tools import check, check_report
    from fastcnn.system.console import Console

    config, folder = resolve(given(options)), photos_in(folder, quiet=as_json)
    with Console().progress("checking", "images") as progress:
        findings = check.check(
            folder,
            decoder=config.decoder,
            workers=config.workers,
            max_bad=config.max_bad,
            max_pixels=config.max_pixels,
            timeout=config.decode_timeout,
            options=config.layout,
            progress=progress,
        )
    if html:
        check_report.write(Path(html), findings)
    if as_json:
        click.echo(to_json(findings.to_dict()))
    else:
        click.echo(check.table(findings))
        if html:
            click.echo(f"\npage: {html}")
    return 3 if findings.refusal else 0


@data.command("download", **SETTINGS)
@click.argument("name")
@click.argument("folder", metavar="DIR")
@click.option("--url", metavar="URL", help="Address of the archive, for a mirror. Default: the data set's own.")
def data_download(name: str, folder: str, url: str | None) -> None:
    """Download a data set and unpack it in DIR.

    NAME is inaturalist12k. An interrupted download continues where it stopped when the command is run again.
    """
    from fastcnn.data_tools.download import download
    from fastcnn.system.console import Console

    images = download(name, folder, url=url, console=Console())
    click.echo(f"next: fastcnn train {shlex.quote(str(images))}")


@data.command("shard", **SETTINGS)
@click.argument("folder", metavar="DATA")
@click.argument("out", metavar="OUT")
@click.option("--photos", type=click.IntRange(1), metavar="N", help="Images per shard at most. Default: no limit.")
@click.option("--shard-size", metavar="SIZE", callback=parse_size, default="256MB", help="Size of a shard at most.")
@click.option("--seed", type=click.IntRange(0), default=0, metavar="N", help="Random seed of the order of the images.")
@layout_options
def data_shard(folder: str, out: str, photos: int | None, shard_size: int, seed: int, **options: Any) -> None:
    """Write the images in DATA to OUT as WebDataset shards.

    The shards are OUT/000000.tar ..., or OUT/train/000000.tar ... Files are copied unchanged, in a random order, as
    readers of shards shuffle in a window at best. OUT can be used wherever DATA can. OUT stays empty until all shards
    are written.
    """
    from fastcnn.data_tools.write_shards import write
    from fastcnn.system.console import Console

    how, folder = resolve(given(options)).layout, photos_in(folder)
    written = write(folder, out, photos_each=photos, bytes_each=shard_size, seed=seed, options=how, console=Console())
    if strange := written.no_images:
        some = "1 file is" if len(strange) == 1 else f"{len(strange):,} files are"
        click.echo(f"{some} no image and in the shards all the same: see fastcnn data check {shlex.quote(folder)}")
    click.echo(f"{written.photos:,} photos in {written.shards:,} shard{'s' * (written.shards != 1)}")
    click.echo(f"next: fastcnn train {shlex.quote(out)}")


@click.group(cls=Commands, **SETTINGS)
def cache() -> None:
    """List or delete the decoded images kept on disk."""


@cache.command("list", **SETTINGS)
@config_options("cache_dir")
def cache_list(cache_dir: str | None) -> None:
    """List the caches: key, images, size, decoder and data folder."""
    from fastcnn.data.cache_folders import default_folder, list_caches
    from fastcnn.system.text import printable, table

    rows = [
        [
            entry["key"],
            f"{entry['photos']:,}",
            f"{entry['image_size']}x{entry['image_size']}",
            f"{entry['bytes'] / 2**20:,.0f}",
            entry["decoder"],
            printable(entry["root"]),
        ]
        for entry in list_caches(cache_dir)
    ]
    if not rows:
        click.echo(f"no caches in {printable(str(Path(default_folder(cache_dir)).resolve()))}")
        return
    columns = ["key", "images", "size", "MiB", "decoder", "data folder"]
    click.echo(table(columns, rows, right=["images", "size", "MiB"]))


@cache.command("info", **SETTINGS)
@config_options("cache_dir")
def cache_info(cache_dir: str | None) -> None:
    """Print the folder of the caches, their number and their size."""
    from fastcnn.data.cache_folders import default_folder, list_caches

    caches = list_caches(cache_dir)
    click.echo(f"folder  {default_folder(cache_dir)}")
    click.echo(f"caches  {len(caches)}")
    click.echo(f"images  {sum(entry['photos'] for entry in caches):,}")
    click.echo(f"size    {sum(entry['bytes'] for entry in caches) / 2**20:,.0f} MiB")


@cache.command("clear", **SETTINGS)
@click.argument("key", required=False)
@click.option("--force", is_flag=True, help="Delete caches that a run is reading, too.")
@config_options("cache_dir")
def cache_clear(key: str | None, force: bool, cache_dir: str | None) -> None:
    """Delete the cache KEY, or all caches. Images are decoded again when they are next needed.

    A cache that a run is reading, or is decoding images into, is left alone.
    """
    from fastcnn.data.cache_folders import clear, list_caches

    keys = [entry["key"] for entry in list_caches(cache_dir)]
    if key and key not in keys:
        raise FastCNNError(f"no cache {key}{nearest(key, keys)}; see fastcnn cache list")
    click.echo(f"freed {clear(cache_dir, key, force=force) / 2**20:,.0f} MiB")

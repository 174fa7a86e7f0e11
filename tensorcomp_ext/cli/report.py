"""``tensorcomp report``: what a saved network is and what compression did to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tensorcomp_ext.cli.common import Screen
from tensorcomp_ext.cli.html import write_report
from tensorcomp_ext.cli.summary import summary_table
from tensorcomp_ext.compress.checkpoint import Header
from tensorcomp_ext.compress.storage import read_header


def report(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A file saved by tensorcomp.")],
    html: Annotated[Path | None, typer.Option(dir_okay=False, help="Write it for a browser, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the configuration and the compression report saved in a file, without loading the network."""
    screen = Screen(as_json)
    header = read_header(file)
    name = header.meta["model"].get("name") if isinstance(header.meta.get("model"), dict) else None
    screen.say(
        f"{file}: {name or 'a network'} in format version {header.format_version}, written by tensorcomp_ext "
        f"{header.library_version} under torch {header.torch_version}, {file.stat().st_size:,} bytes"
    )
    if header.report is not None:
        screen.show(header.report.table())
        if header.report.details:
            screen.show(summary_table(header.report.details))
    else:
        screen.show(_layers(header))
    if html is not None:
        if header.report is None:
            raise ValueError(f"{file} was saved without a compression report, so there is nothing for --html")
        write_report(html, header.report)
    screen.result(describe(file, header))


def describe(file: Path, header: Header) -> dict[str, Any]:
    """All of a file's configuration as a JSON-able dictionary."""
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "format_version": header.format_version,
        "library_version": header.library_version,
        "torch_version": header.torch_version,
        "meta": header.meta,
        "layers": header.layers,
        "plans": header.plans,
        "aliases": header.aliases,
        "tensors": {
            name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in header.tensors.items()
        },
        "report": None if header.report is None else header.report.to_dict(),
    }


def _layers(header: Header) -> Table:
    table = Table("layer", "type", "format", "ranks")
    for name, config in header.layers.items():
        table.add_row(name, str(config.get("type")), str(config.get("format")), str(config.get("rank")))
    return table

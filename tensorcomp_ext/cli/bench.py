"""``tensorcomp bench``: latency against the strongest library alternatives, on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table as RichTable

from tensorcomp_ext import data, models
from tensorcomp_ext.bench import (
    SUITES,
    Settings,
    read_results,
    run_suite,
    suite_cases,
)
from tensorcomp_ext.bench.chain_summary import chain_lines
from tensorcomp_ext.bench.device_summary import device_table, network_table, never_slower_line
from tensorcomp_ext.bench.embedding_summary import embedding_table
from tensorcomp_ext.bench.sparse_summary import sparse_lines, sparse_tables
from tensorcomp_ext.bench.suite import COMPILED_TEXT, choose_effort
from tensorcomp_ext.bench.summary import compare
from tensorcomp_ext.bench.tables import (
    Table,
    bfloat16_table,
    compare_table,
    overhead_table,
    row_line,
    summary_table,
)
from tensorcomp_ext.cli.common import Screen
from tensorcomp_ext.cli.sweep import RANKS, run_sweep

_STDOUT = Path("-")


def bench(
    suite: Annotated[str, typer.Option(help=f"What to measure: {', '.join(SUITES)}.")] = "tucker2",
    cases: Annotated[
        Path | None,
        typer.Option(
            help="JSON list of objects. "
            + " ".join(f"{name}: {suite.keys}." for name, suite in SUITES.items())
            + " Without it, the development cases."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of float32, bfloat16, float16 and, on CUDA, tf32; several with commas.")
    ] = "float32",
    layout: Annotated[str, typer.Option(help="nchw (contiguous), nhwc (channels-last).")] = "nchw,nhwc",
    direction: Annotated[
        str, typer.Option(help="forward; backward = a training step, forward included.")
    ] = "forward,backward",
    threads: Annotated[
        str, typer.Option(help="Thread counts, such as 1,2. By default 1,2; with --device cuda 1.")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compiled: Annotated[
        str,
        typer.Option(help="torch.compile'd baselines: always, best (in the layout fastest eager), never."),
    ] = "",
    seconds: Annotated[float | None, typer.Option(help="Time to spend on each row's samples.")] = None,
    limit: Annotated[float | None, typer.Option(help="Seconds after which no further row is begun.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few small cases, few samples: does it run?")
    ] = False,
    sweep: Annotated[
        str | None,
        typer.Option(help=f"Compress this network at several ranks instead: {', '.join(models.names())}."),
    ] = None,
    rank: Annotated[
        list[str] | None, typer.Option(help=f"Ranks of --sweep, repeated. By default {', '.join(RANKS)}.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Trained weights for --sweep.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data", exists=True, file_okay=False, help="Data set of --sweep: adds accuracy."),
    ] = None,
    dataset: Annotated[str, typer.Option(help=f"Its name: {', '.join(data.names())}.")] = "cifar10",
    batch: Annotated[int, typer.Option(min=1, help="Batch of --sweep.")] = 1,
    html: Annotated[Path | None, typer.Option(dir_okay=False, help="Report of --sweep.")] = None,
    against: Annotated[
        Path | None, typer.Option("--compare", help="Results of an earlier run: print what changed.")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write the results here; - for stdout.")
    ] = None,
) -> None:
    """Measure our ops and layers against the best torch can do, interleaved, and against the machine's
    roofline."""
    screen = Screen(as_json == _STDOUT)
    if sweep is not None:
        run_sweep(screen, sweep, rank, weights, (dataset, data_dir), batch, seconds, html, as_json)
        return
    earlier = read_results(against) if against else None
    settings = Settings(
        suite=suite,
        cases=suite_cases(suite, device, quick=quick, path=cases),
        dtypes=_words(dtype),
        layouts=_words(layout),
        directions=_words(direction),
        threads=_numbers(threads or ("1" if device == "cuda" else "1,2")),
        device=device,
        compiled=compiled or ("never" if quick else "always"),
        effort=choose_effort(device, quick=quick, seconds=seconds),
        limit_s=limit,
    )
    results = _run(settings, None if as_json == _STDOUT else as_json, screen)
    _show(results, screen)
    if earlier is not None:
        changes = compare(earlier, results)
        screen.show(_rich(compare_table(changes), "Changes"))
        if changes["geomean"] is not None:
            screen.say(f"geometric mean {changes['geomean']:.3f}x over {len(changes['rows'])} rows")
    if as_json == _STDOUT:
        typer.echo(json.dumps(results))
    if any(row["error"] for row in results["rows"]):
        raise typer.Exit(1)


def _run(settings: Settings, path: Path | None, screen: Screen) -> dict[str, Any]:
    screen.say(f"baselines: {COMPILED_TEXT[settings.compiled]}")
    with screen.progress("bench") as tick:

        def start(index: int, count: int, label: str) -> None:
            tick(index, count, label)

        def report(index: int, count: int, row: dict[str, Any]) -> None:
            screen.say(f"[{index}/{count}] {row_line(row)}")

        return run_suite(settings, path, report=report, start=start)


def _show(results: dict[str, Any], screen: Screen) -> None:
    screen.say(f"{results['machine']['cpu']}, {results['machine']['cores']} cores, kernels: {results['isa']}")
    for rate in results["rates"]["peak_flops"]:
        how = f"{rate['dtype']}, {rate['threads']} threads: {rate['value'] / 1e9:.0f} GFLOP/s ({rate['how']})"
        screen.say(f"peak {how}")
    if "gpu" in results:
        gpu = results["gpu"]
        screen.say(f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}")
    if results["summary"]["groups"]:
        screen.show(_rich(summary_table(results, cases=False), "Geometric means"))
    if results["summary"].get("device"):
        screen.show(_rich(device_table(results), "Large rows; least in brackets"))
    if results["suite"] == "embedding":
        screen.show(_rich(embedding_table(results), "Embeddings"))
    if results["suite"] == "lowrank_sparse":
        for title, table in sparse_tables(results):
            screen.show(_rich(table, title))
    for line in [*chain_lines(results), *sparse_lines(results)]:
        screen.say(line)
    if "network" in results["summary"]:
        screen.show(_rich(network_table(results), "Networks"))
        screen.say(never_slower_line(results))
    if results["summary"]["bfloat16"]:
        screen.show(_rich(bfloat16_table(results), "bfloat16"))
    if results.get("overhead"):
        screen.show(_rich(overhead_table(results), "A call on 1x8x4x4"))


def _rich(table: Table, title: str) -> RichTable:
    head, body = table
    found = RichTable(*head, title=title)
    for cells in body:
        found.add_row(*cells)
    return found


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} must be numbers such as 1,2", param_hint="--threads") from error

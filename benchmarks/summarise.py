"""Writes the tables of ``benchmarks/README.md`` from ``benchmarks/results/*.json``: no figure is typed by
hand.

``python -m benchmarks.summarise`` fills the text between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``;
``--check`` changes nothing and fails where the file is not what the results give.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tensorcomp_ext.bench.chain_summary import chain_lines
from tensorcomp_ext.bench.device_summary import network_table, never_slower_line
from tensorcomp_ext.bench.embedding_summary import embedding_table
from tensorcomp_ext.bench.equal_size_summary import EQUAL_SIZE, equal_size_lines, equal_size_table
from tensorcomp_ext.bench.experiment_summary import (
    EXPERIMENTS,
    RING_TIMES,
    experiment_lines,
    experiment_table,
    ring_times_lines,
    ring_times_table,
)
from tensorcomp_ext.bench.sparse_summary import sparse_lines, sparse_tables
from tensorcomp_ext.bench.suite import read_results
from tensorcomp_ext.bench.tables import bfloat16_table, markdown, overhead_table, rows_table, summary_table

HERE = Path(__file__).resolve().parent


def conditions(results: dict[str, Any]) -> str:
    """Machine, versions and settings of a run, in lines."""
    machine, versions, settings = results["machine"], results["versions"], results["settings"]
    caches = ", ".join(f"L{c['level']} {c['type'].lower()} {c['size']}" for c in machine["caches"])
    native = versions["native"]["build"] or {}
    rates = [
        f"{r['dtype']} {r['threads']} threads {r['value'] / 1e9:.0f} GFLOP/s"
        for r in results["rates"]["peak_flops"]
    ]
    built = native.get("compiler", "nothing (reference only)")
    effort = settings["effort"]
    model = f"family {machine['family']}, model {machine['model']}"
    load = ", ".join(f"{value:.2f}" for value in results["load_average"] or [])
    dirty = " (with uncommitted changes)" if versions["git_dirty"] else ""
    lines = [
        f"{machine['cpu']} ({model}), {machine['cores']} cores; {caches}",
        f"kernels: {results['isa']}; native code built with {built}",
        f"Python {versions['python']}, torch {versions['torch']}; revision {versions['git_revision']}{dirty}",
        f"measured multiply-add peak: {'; '.join(rates)}",
        f"baselines: {settings['compiled_means']}",
        f"{effort['min_rounds']} to {effort['max_rounds']} rounds a row; {results['started']}; "
        f"load average when it began: {load or 'unknown'}",
    ]
    if not results["complete"]:
        lines.append("**the run was interrupted: not all rows are there**")
    return "\n".join(f"- {line}" for line in lines)


def latency_section(results: dict[str, Any]) -> str:
    """One run of a latency suite: conditions, summary, bfloat16, call overhead, then every row folded
    away."""
    parts = [conditions(results)]
    if results["suite"] == "network":
        return "\n\n".join([*parts, never_slower_line(results), markdown(network_table(results))])
    parts.append(markdown(summary_table(results)))
    if results["suite"] == "embedding":
        parts.append(markdown(embedding_table(results)))
    if results["suite"] == "lowrank_sparse":
        parts += [f"{title}:\n\n{markdown(table)}" for title, table in sparse_tables(results)]
    if lines := [*chain_lines(results), *sparse_lines(results)]:
        parts.append("\n".join(f"- {line}" for line in lines))
    if results["summary"]["bfloat16"]:
        parts.append(markdown(bfloat16_table(results)))
    if results.get("overhead"):
        parts += ["A layer call on a 1×8×4×4 input:", markdown(overhead_table(results))]
    for group in results["summary"]["groups"]:
        if group["layout"] == "all":
            continue
        keys = (group["dtype"], group["direction"], group["threads"], group["layout"])
        title = f"{keys[0]}, {keys[1]}, {keys[2]} threads, {keys[3]}"
        table = markdown(rows_table(results, *keys))
        parts.append(f"<details><summary>{title}</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(parts)


def accuracy_section(results: dict[str, Any]) -> str:
    """The pretrained networks: accuracy and latency together."""
    head = ["network", "ranks", "parameters", "MACs", "correct before", "decomposed", "fine-tuned"]
    batches = results["config"]["batches"]
    head += [f"batch {b}: dense / compressed ms, ratio" for b in batches]
    body = []
    for row in results["rows"]:
        total = row["accuracy"]["total"]
        cells = [
            row["network"],
            row["rule"],
            f"{row['parameters']['dense']:,} → {row['parameters']['compressed']:,}",
            f"{row['macs']['dense'] / 1e6:.1f} M → {row['macs']['compressed'] / 1e6:.1f} M",
        ]
        cells += [f"{row['accuracy'][k]} of {total:,}" for k in ("before", "decomposed", "finetuned")]
        for b in batches:
            entry = row["latency"][str(b)]
            dense, ours = entry["dense_us"] / 1e3, entry["compressed_us"] / 1e3
            cells.append(f"{dense:.2f} / {ours:.2f}, {entry['ratio']:.2f}")
        body.append(cells)
    versions, config = results["versions"], results["config"]
    note = (
        f"{results['machine']['cpu']}, {config['threads']} threads, torch {versions['torch']}, "
        f"seed {config['seed']}, revision {versions['git_revision']}"
    )
    return f"- {note}\n\n{markdown((head, body))}"


def section(path: Path) -> str:
    """The text for one results file."""
    results = json.loads(path.read_text(encoding="utf-8"))
    if results.get("suite") == "cifar_resnets":
        return accuracy_section(results)
    if results.get("suite") == EQUAL_SIZE:
        lines = "\n".join(f"- {line}" for line in equal_size_lines(results))
        return f"{lines}\n\n{markdown(equal_size_table(results))}"
    if results.get("suite") in EXPERIMENTS:
        lines = "\n".join(f"- {line}" for line in experiment_lines(results))
        return f"{lines}\n\n{markdown(experiment_table(results))}"
    if results.get("suite") == RING_TIMES:
        lines = "\n".join(f"- {line}" for line in ring_times_lines(results))
        return f"{lines}\n\n{markdown(ring_times_table(results))}"
    return latency_section(read_results(path))


def fill(text: str, name: str, content: str) -> str:
    """``text`` with what lies between the two markers of ``name`` replaced.

    Raises:
        ValueError: the markers are not there.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"README.md has no {begin} … {end} for results/{name}.json")
    return f"{before}{begin}\n{content}\n{end}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing, fail where the tables are out of date"
    )
    parser.add_argument("--folder", type=Path, default=HERE, help="where README.md and results/ lie")
    options = parser.parse_args(arguments)
    readme = options.folder / "README.md"
    text = filled = readme.read_text(encoding="utf-8")
    for path in sorted((options.folder / "results").glob("*.json")):
        filled = fill(filled, path.stem, section(path))
    if options.check:
        return int(filled != text)
    readme.write_text(filled, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The configuration inside a saved network, checked as the work of a stranger."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tensorcomp_ext.compress.report import Report

MAX_SIZE = (
    1 << 40
)  # of any whole number in a layer configuration: beyond it sizes overflow before they are compared
Shapes = Mapping[str, tuple[int, ...]]


class CheckpointError(ValueError):
    """A file that is not, or no longer, a network saved by this package, or one for another model."""


@dataclass(frozen=True)
class Header:
    """What a saved network says about itself.

    ``layers`` maps the names of factorised layers to their configurations, ``plans`` is what
    `plan.export_choices` said, ``aliases`` further names of a tensor to the stored one, ``tensors`` every
    name to (dtype, shape). ``report`` is that of the compression, if one was saved; ``meta`` is what the
    caller of ``save`` added.
    """

    format_version: int
    library_version: str
    torch_version: str
    layers: dict[str, dict[str, Any]]
    plans: dict[str, Any]
    aliases: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    report: Report | None
    meta: dict[str, Any]


def parse_header(
    path: str | os.PathLike[str], metadata: Mapping[str, str] | None, stored: Shapes, key: str, version: int
) -> Header:
    """Check and return the configuration of the file ``path``.

    ``metadata`` is the file's safetensors metadata, ``stored`` the shapes of its tensors, ``key`` where the
    configuration stands, ``version`` the newest format version understood. CheckpointError names what is
    wrong.
    """
    place = os.fspath(path)
    text = (metadata or {}).get(key)
    if text is None:
        raise CheckpointError(f"load: {place} was not saved by tensorcomp_ext: its metadata has no {key!r}")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"load: {place}: the configuration is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"load: {place}: the configuration must be an object, got {type(data).__name__}"
        )
    found = data.get("format_version")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise CheckpointError(
            f"load: {place}: format_version must be a positive whole number, got {found!r:.40}"
        )
    if found > version:
        raise CheckpointError(
            f"load: {place} has format version {found}, this tensorcomp_ext understands up to {version}; "
            f"it was written by version {data.get('library_version')!r:.40}: update the package"
        )
    layers, plans, aliases = (_section(place, data, name) for name in ("layers", "plans", "aliases"))
    for name, config in layers.items():
        if not isinstance(config, dict):
            raise CheckpointError(f"load: {place}: the configuration of layer {name!r} must be an object")
        _check_sizes(place, name, config, 0)
    for alias, target in aliases.items():
        if not isinstance(target, str) or target not in stored or alias in stored:
            raise CheckpointError(f"load: {place}: {alias!r} stands for {target!r:.80}, which is not stored")
    return Header(
        format_version=found,
        library_version=str(data.get("library_version")),
        torch_version=str(data.get("torch_version")),
        layers=layers,
        plans=plans,
        aliases=aliases,
        tensors=_tensors(place, data, stored, aliases),
        report=_report(place, data.get("report")),
        meta=_section(place, data, "meta"),
    )


def _section(place: str, data: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = data.get(name)
    if not isinstance(section, dict):
        raise CheckpointError(f"load: {place}: {name!r} must be an object, got {type(section).__name__}")
    return section


def _check_sizes(place: str, layer: str, value: Any, depth: int) -> None:
    if depth > 8:
        raise CheckpointError(f"load: {place}: the configuration of layer {layer!r} is nested too deep")
    if isinstance(value, (int, float)) and not abs(value) < MAX_SIZE:
        raise CheckpointError(
            f"load: {place}: a number in the configuration of layer {layer!r} is out of range"
        )
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_sizes(place, layer, item, depth + 1)


def _tensors(
    place: str, data: Mapping[str, Any], stored: Shapes, aliases: Mapping[str, str]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The list of tensors, which must agree with what is stored."""
    listed = _section(place, data, "tensors")
    if set(listed) != set(stored) | set(aliases):
        odd = sorted(set(listed) ^ (set(stored) | set(aliases)))
        raise CheckpointError(
            f"load: {place}: the list of tensors and the tensors differ: {', '.join(odd[:5])}"
        )
    result: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in listed.items():
        shape = stored[aliases.get(name, name)]
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] != list(shape):
            raise CheckpointError(
                f"load: {place}: tensor {name!r} has shape {list(shape)}, listed as {entry!r:.80}"
            )
        result[name] = (str(entry[0]), shape)
    return result


def _report(place: str, data: Any) -> Report | None:
    if data is None:
        return None
    try:
        return Report.from_dict(data)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"load: {place}: {error}") from error

"""Rank specifications as users write them, in Python or as text."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor

from tensorcomp_ext._warnings import warn

from ..decompose import DecompositionError
from .layouts import RankLayout, Ranks, rank_layout
from .rules import RankRule, Ratio, rule_class

RankSpec: TypeAlias = int | float | Sequence[int] | RankRule | str | Mapping[str, Any]


def _match(spec: Mapping[str, Any], name: str | None) -> Any:
    """First pattern that matches the layer name; the bare "*" is the default wherever it stands."""
    if name is None:
        raise ValueError("rank: a mapping by layer name needs the name of the layer")
    for pattern, value in spec.items():
        if pattern != "*" and fnmatchcase(name, pattern):
            return value
    if "*" in spec:
        return spec["*"]
    raise ValueError(f"{name}: no rank given; patterns are {list(spec)}")


def _index(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _clip(layout: RankLayout, values: list[int], prefix: str) -> Ranks:
    clipped = []
    for label, value, limit in zip(layout.names, values, layout.limits, strict=True):
        if value < 1:
            raise ValueError(f"{prefix}{layout.format}: {label} must be at least 1, got {value}")
        if value > limit:
            warn(
                f"{prefix}{layout.format}: {label} {value} exceeds {limit}; clipped to {limit}",
            )
        clipped.append(min(value, limit))
    return tuple(clipped)


def resolve_rank(
    spec: RankSpec,
    weight: Tensor,
    format: str,
    name: str | None = None,
    *,
    pixels: tuple[int, int] = (1, 1),
    **options: Any,
) -> int | Ranks:
    """Ranks of `weight` in the named format, as it takes them: (R_out, R_in) for "tucker2", R for "svd".

    Arguments:
        spec: an int (the same for every rank), a tuple of ints, a float in (0, 1] (fraction of the dense
            weights, as `Ratio`), a rule, text as `parse_rank` takes it, or a mapping from layer-name
            patterns (fnmatch; the first that matches; "*" is the default) to any of these
        weight: dense weight, [T, S, *k] for "tucker2", [M, N] for "svd"; either for the formats that fold
        name: the layer's name, for mappings and as a prefix of messages
        pixels: positions (H·W, H'·W') the layer reads and writes for one sample, for rules that count
            operations
        options: of the format: in_modes, out_modes and the like

    Ranks above their limit are clipped with a warning; an int for a format of many ranks is the largest that
    each may be, and warns only where none can reach it. Ranks of a train are taken with or without the
    boundary ones, those of a ring with or without the first repeated at the end. Raises ValueError for a
    rank below 1, a fraction outside (0, 1], the wrong number of ranks, NaN or Inf in the weight; TypeError
    for anything that is no specification; DecompositionError when no driver converges.
    """
    prefix = f"{name}: " if name else ""
    if isinstance(spec, Mapping):
        spec = _match(spec, name)
    if isinstance(spec, str):
        try:
            spec = parse_rank(spec)
        except ValueError as error:
            raise ValueError(f"{prefix}{error}") from error
    if isinstance(spec, float):
        if not 0.0 < spec <= 1.0:
            raise ValueError(f"{prefix}a fractional rank must be in (0, 1], got {spec}")
        spec = Ratio(spec)
    if isinstance(spec, RankRule):
        try:
            return spec.resolve(weight, format, pixels=pixels, **options)
        except ValueError as error:
            raise ValueError(f"{prefix}{error}") from error
        except DecompositionError as error:
            raise DecompositionError(f"{prefix}{error}") from error
    layout = rank_layout(weight, format, **options)
    single = _index(spec)
    if single is not None:
        if layout.int_is_bound and layout.limits and 1 <= single <= max(layout.limits):
            return layout.pack(tuple(min(single, limit) for limit in layout.limits))
        return layout.pack(_clip(layout, [single] * len(layout.names), prefix))
    values = [_index(value) for value in spec] if isinstance(spec, (tuple, list)) else [None]
    ranks = [value for value in values if value is not None]
    if len(ranks) != len(values):
        raise TypeError(
            f"{prefix}rank must be an int, a tuple of ints, a float in (0, 1], a rank rule, text such as "
            f"'energy:0.95' or a mapping from layer names to any of these, got {spec!r}"
        )
    ranks = list(layout.inner(ranks))
    if len(ranks) != len(layout.names):
        raise ValueError(
            f"{prefix}{format} takes {len(layout.names)} rank(s) ({', '.join(layout.names)}), "
            f"got {tuple(ranks)}"
        )
    return layout.pack(_clip(layout, ranks, prefix))


def parse_rank(text: str) -> int | float | Ranks | RankRule:
    """Rank specification from text, as a command line or a report writes it.

    "16" is an int, "16,24" a tuple, "0.25" a fraction of the dense weights, and "vbmf", "vbmf:exact",
    "energy", "energy:0.95", "ratio:0.25", "params:10000", "flops:2e6" are rules, as for whole networks are
    "network-params:0.25", "network-flops:0.5" and "latency:2.0"; `str(rule)` gives the text back. Raises
    ValueError that says what was expected.
    """
    head, colon, argument = text.strip().partition(":")
    if head[:1].isalpha():
        rule = rule_class(head.strip().lower())
        if colon and not argument.strip():
            raise ValueError(f"rank {text!r}: nothing follows the colon")
        try:
            return rule.parse(argument.strip())
        except (ValueError, OverflowError) as error:
            raise ValueError(f"rank {text!r}: {error}") from error
    try:
        if "," in text:
            ranks = tuple(int(part) for part in text.split(","))
        elif any(mark in text for mark in ".eE"):
            fraction = float(text)
            if not 0.0 < fraction <= 1.0:
                raise ValueError
            return fraction
        else:
            ranks = (int(text),)
        if min(ranks) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"rank {text!r}: expected a positive int (16), several (16,24), a fraction in (0, 1] (0.25) "
            f"or a rule (vbmf, energy:0.95, ratio:0.25, params:10000, flops:2e6, latency:2.0)"
        ) from None
    return ranks[0] if "," not in text else ranks

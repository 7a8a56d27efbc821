"""A model's spec as plain data and back, for the header of a checkpoint whose model is no row of the table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from repvgg.errors import UsageError
from repvgg.models.spec import ModelSpec, SqueezeExciteSpec, Stage

_WIDEST, _MOST_PIXELS = 2**20, 2**31


def spec_to_data(spec: ModelSpec) -> dict[str, Any]:
    """The spec as JSON can hold it."""
    data: dict[str, Any] = json.loads(json.dumps(asdict(spec)))
    return data


def spec_from_data(data: Mapping[str, Any]) -> ModelSpec:
    """The spec that :func:`spec_to_data` was given; fields of later versions are passed over.

    Raises:
        UsageError: the data describe no model.
    """
    try:
        gate = data.get("squeeze_excite")
        spec = ModelSpec(
            name=str(data["name"]),
            stem=_stage(data["stem"]),
            stages=tuple(map(_stage, data["stages"])),
            groups=_count(data.get("groups", 1), _WIDEST),
            squeeze_excite=None if gate is None else _gate(gate),
            auxiliary=tuple(_count(index, _WIDEST, least=0) for index in data.get("auxiliary", ())),
            input_size=_count(data.get("input_size", ModelSpec.input_size), _MOST_PIXELS),
            source=str(data.get("source", "")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"This describes no model ({type(error).__name__}: {error}).") from error
    if not spec.stages:
        raise UsageError("This describes no model (it has no stage).")
    return spec


def _stage(data: Mapping[str, Any]) -> Stage:
    return Stage(*(_count(data[name], _WIDEST) for name in ("depth", "channels", "stride")))


def _gate(data: Mapping[str, Any]) -> SqueezeExciteSpec:
    if data["place"] not in ("before_relu", "after_relu"):
        raise ValueError(f"no place {data['place']!r} for a gate")
    return SqueezeExciteSpec(data["place"], _count(data["reduction"], _WIDEST))


def _count(value: Any, most: int, least: int = 1) -> int:
    if type(value) is not int or not least <= value < most:
        raise ValueError(f"{value!r} is no count")
    return value

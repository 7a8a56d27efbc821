"""The model card (README) on the Hugging Face hub, generated from the header of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from repvgg.checkpoints import Metadata
from repvgg.errors import require
from repvgg.models.repvgg import RepVGG

_FORMS = {"train": "train form, three branches a block", "plain": "plain form, one 3x3 convolution a block"}
_MAX_CLASSES = 20


def model_card(model: RepVGG, about: Metadata, repository: str, licence: str | None) -> str:
    """Return a README with the YAML front matter that the hub reads; it states nothing that the header does not.

    Args:
        model: the model, whose parameters are counted.
        about: its header.
        repository: OWNER/NAME, for the example code.
        licence: an identifier of the hub; None makes the card say that none is stated.

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
    """
    hub = require("huggingface_hub", "hub")
    data = hub.ModelCardData(
        license=licence,
        library_name="repvgg",
        pipeline_tag="image-classification",
        tags=["repvgg", "structural-re-parameterization", f"{about.form}-form"],
        metrics=sorted(about.metrics) or None,
        base_model=about.source.partition("@")[0] or None,
    )
    sections = "\n\n".join(_sections(model, about, repository, licence))
    return str(hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{sections}\n"))


def _sections(model: RepVGG, about: Metadata, repository: str, licence: str | None) -> Iterator[str]:
    yield f"# {_cell(about.model)}"
    yield f"An image classifier of the RepVGG family (Ding et al., CVPR 2021), in the {_FORMS[about.form]}."
    yield _table(("", ""), _facts(model, about))
    if about.metrics:
        yield "## Metrics"
        yield "As reported by the training run."
        yield _table(("metric", "value"), [(name, f"{value:g}") for name, value in sorted(about.metrics.items())])
    if about.classes:
        yield "## Classes"
        yield _classes(about.classes)
    if about.recipe:
        yield "## Recipe"
        yield f"```json\n{json.dumps(about.recipe, indent=1, sort_keys=True, default=str)}\n```"
    yield "## Use"
    yield _example(about, repository)
    yield "## Licence"
    yield f"The weights are under {licence}." if licence else "No licence is stated for the weights."


def _facts(model: RepVGG, about: Metadata) -> list[tuple[str, str]]:
    size = about.input_size
    rows = [
        ("form", _FORMS[about.form]),
        ("parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}"),
        ("input", f"{about.in_channels} x {size} x {size}"),
        ("mean of the pixels", _numbers(about.mean)),
        ("standard deviation", _numbers(about.std)),
        ("classes", str(about.num_classes)),
        ("averaged weights", "yes" if about.ema else "no"),
        ("source", about.source),
        ("written by", f"repvgg {about.version}" if about.version else ""),
    ]
    return [(name, value) for name, value in rows if value]


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _classes(names: tuple[str, ...]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > _MAX_CLASSES else ""
    return ", ".join(map(_cell, names[:_MAX_CLASSES])) + more


def _table(titles: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [titles, ("---", "---"), *((_cell(name), _cell(value)) for name, value in rows)]
    return "\n".join(f"| {name} | {value} |" for name, value in lines)


def _cell(text: Any) -> str:
    # Escape what Markdown would interpret: class names come from folders of the user's data set.
    return " ".join(str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())


def _example(about: Metadata, repository: str) -> str:
    lines = ["import repvgg", "", f'loaded = repvgg.from_pretrained("{repository}")  # in eval mode']
    if about.form == "train":
        lines.append(f'plain = repvgg.from_pretrained("{repository}", plain=True).model  # collapsed and verified')
    if about.mean:
        lines.append("logits = loaded.model((pixels - mean) / std)  # pixels in [0, 1]; see loaded.metadata")
    return "\n".join(["```python", *lines, "```"])

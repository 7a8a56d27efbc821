"""The Hugging Face hub: fetch and cache files, load published weights, push models with a generated model card."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from repvgg._arguments import check_model
from repvgg._files import write_text
from repvgg.checkpoints import Metadata
from repvgg.data.config import IMAGENET_MEAN, IMAGENET_STD
from repvgg.errors import FreshWeightsWarning, OutputError, SourceError, UsageError, first_line, require
from repvgg.models.checkpoint import LoadedModel, describe_model, form_of, load, save
from repvgg.models.registry import spec_of
from repvgg.models.repvgg import RepVGG
from repvgg.models.spec import ModelSpec

WEIGHTS_FILE = "model.safetensors"
_CARD_FILE = "README.md"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class FetchedFile:
    """A file of a repository, in the local cache."""

    path: Path  # of the file
    repository: str  # OWNER/NAME
    revision: str  # its commit, 40 hex digits; empty if the cache does not record it

    @property
    def source(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


def fetch(
    repository: str,
    file: str = WEIGHTS_FILE,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
) -> FetchedFile:
    """Download a file of a model repository, unless the cache has it and it is up to date.

    Args:
        repository: OWNER/NAME.
        file: its path in the repository.
        revision: a commit, a branch or a tag; None selects the newest commit of the main branch. Only a commit is
            reproducible.
        cache_dir: where files are stored; None selects the cache of huggingface_hub (``HF_HOME``, ``HF_HUB_CACHE``).
        token: for a private repository; None selects the one stored by ``hf auth login``.

    Raises:
        SourceError: there is no such file, or it is not in the cache and the hub cannot be reached; the text names
            repository, file and cache.
    """
    hub = require("huggingface_hub", "hub")
    try:
        path = Path(hub.hf_hub_download(repository, file, revision=revision, cache_dir=cache_dir, token=token))
    except Exception as error:  # huggingface_hub also raises errors of its HTTP client and of the file system
        cache = str(cache_dir or hub.constants.HF_HUB_CACHE)
        at = f" at {revision}" if revision else ""
        raise SourceError(
            f"{file!r} of {repository}{at} is not in the cache {cache!r}, and could not be downloaded "
            f"({first_line(error)}): connect to the network once, or load a local file."
        ) from error
    # The cache stores files as snapshots/COMMIT/FILE.
    commit = path.parents[len(Path(file).parts) - 1].name
    return FetchedFile(path, repository, commit if _COMMIT.fullmatch(commit) else "")


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    plain: bool | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
) -> LoadedModel:
    """Rebuild a model from a repository of the Hugging Face hub or from a local folder, in eval mode.

    It reads ``model.safetensors``, written by :func:`push_to_hub` or by timm; see :func:`repvgg.load`.

    Args:
        source: OWNER/NAME, a folder, or a checkpoint file.
        plain: see :func:`repvgg.load`.
        revision: see :func:`fetch`; the metadata's ``source`` records the commit.
        cache_dir: see :func:`fetch`.
        token: see :func:`fetch`.

    Raises:
        SourceError: there is no such folder or repository, or the file is not in the cache and the hub cannot be
            reached.
        CheckpointError: the file is not a checkpoint of a model; see :func:`repvgg.load`.
        UsageError: a revision of a local folder was requested.
    """
    path = Path(source)
    if not path.exists():
        if not _REPOSITORY.fullmatch(str(source)):
            raise SourceError(f"{str(source)!r} is neither a folder nor a repository OWNER/NAME.")
        found = fetch(str(source), revision=revision, cache_dir=cache_dir, token=token)
        loaded = load(found.path, plain=plain)
        return replace(loaded, metadata=replace(loaded.metadata, source=found.source))
    if revision is not None:
        raise UsageError(f"{str(source)!r} is a local path, which has no revision {revision!r}.")
    if path.is_dir() and not (path / WEIGHTS_FILE).exists():
        raise SourceError(f"There is no {WEIGHTS_FILE!r} in {str(source)!r}.")
    return load(path / WEIGHTS_FILE if path.is_dir() else path, plain=plain)


@dataclass(frozen=True)
class Pretrained:
    """ImageNet-1k weights of a registered model, published by timm in the train form."""

    model: str  # name of the model
    repository: str  # OWNER/NAME on the hub; the file is model.safetensors
    top1: float  # published accuracy on the ImageNet-1k validation images, in percent
    input_size: int = 224  # height and width in pixels for that accuracy
    crop: float = 0.875  # the centre crop, as a fraction of the shorter side
    licence: str = "mit"  # of the weights
    # None: the commits were not known when the table was written. The structure is verified tensor by tensor instead.
    revision: str | None = None  # the commit; None selects the newest


_TOP1 = {
    "repvgg_a0": 72.426,
    "repvgg_a1": 74.474,
    "repvgg_a2": 76.488,
    "repvgg_b0": 75.158,
    "repvgg_b1": 78.370,
    "repvgg_b1g4": 77.608,
    "repvgg_b2": 78.788,
    "repvgg_b2g4": 79.396,
    "repvgg_b3": 80.528,
    "repvgg_b3g4": 80.224,
}
#: Published weights by the name of the model.
PRETRAINED: dict[str, Pretrained] = {
    **{name: Pretrained(name, f"timm/{name}.rvgg_in1k", top1) for name, top1 in _TOP1.items()},
    "repvgg_d2se": Pretrained("repvgg_d2se", "timm/repvgg_d2se.rvgg_in1k", 83.550, input_size=320, crop=1.0),
}


def load_pretrained(
    name: str | ModelSpec,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    plain: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> LoadedModel:
    """Load the published weights of a model, in eval mode, with the preprocessing that they need.

    Args:
        name: of a registered model, or its specification.
        num_classes: number of logits, 1000 if None; for another number the classifier is newly initialized.
        in_channels: channels of the images, 3 if None; for another number the first block is newly initialized.
        plain: collapse the model and verify the result.
        revision: the commit of the repository; None selects the one in the table, or else the newest.
        cache_dir: see :func:`fetch`.

    Returns:
        The model. Its metadata contain repository and commit (``source``), the normalization of pixels, the size and
        crop of images, and the published top-1 accuracy if no weights are newly initialized.

    Raises:
        UnknownModelError: there is no such model.
        UsageError: there are no published weights of it, or a count is below 1.
        SourceError: the file is not in the cache and the hub cannot be reached; the text names the cache.
        CheckpointError: the file is of another model.

    Warns:
        FreshWeightsWarning: some weights are newly initialized; the text says which.
    """
    spec = name if isinstance(name, ModelSpec) else spec_of(name)
    if spec.name not in PRETRAINED or spec != spec_of(spec.name):
        known = ", ".join(PRETRAINED)
        raise UsageError(f"There are no published weights of {spec.name!r} to load: there are of {known}.")
    pretrained = PRETRAINED[spec.name]
    # load() compares the file with the registered model tensor by tensor: a changed repository cannot go unnoticed.
    found = fetch(pretrained.repository, revision=revision or pretrained.revision, cache_dir=cache_dir)
    loaded = load(found.path, pretrained.model, plain=plain or None)
    metadata = replace(
        loaded.metadata,
        input_size=pretrained.input_size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        recipe={"dataset": "ImageNet-1k", "interpolation": "bilinear", "test_crop": pretrained.crop},
        metrics={"top1": pretrained.top1 / 100},
        source=found.source,
    )
    loaded = replace(loaded, metadata=metadata)
    classes = metadata.num_classes if num_classes is None else num_classes
    channels = metadata.in_channels if in_channels is None else in_channels
    if (classes, channels) == (metadata.num_classes, metadata.in_channels):
        return loaded
    return _adapted(loaded, classes, channels, plain)


def _adapted(loaded: LoadedModel, num_classes: int, in_channels: int, plain: bool) -> LoadedModel:
    """Copy the weights into a model with other numbers of classes or channels; what does not fit stays initialized."""
    about = loaded.metadata
    assert isinstance(loaded.model, RepVGG)  # all published weights are of classifiers
    model = RepVGG(loaded.model.spec, num_classes, in_channels, plain)
    fresh = ["head"] * (num_classes != about.num_classes) + ["stem.conv"] * (in_channels != about.in_channels)
    kept = {
        name: tensor
        for name, tensor in loaded.model.state_dict().items()
        if not any(name.startswith(f"{module}.") for module in fresh)
    }
    model.load_state_dict({**model.state_dict(), **kept})
    # Published files may be in half precision; the new layers follow them.
    model = model.to(next(loaded.model.parameters()).dtype)
    warnings.warn(
        f"{' and '.join(map(repr, fresh))} of {about.model} have fresh weights, as the published ones are for "
        f"{about.num_classes} classes and {about.in_channels} channels: train the model before you use it.",
        FreshWeightsWarning,
        stacklevel=4,  # the caller of create_model(pretrained=True)
    )
    about = replace(about, num_classes=num_classes, in_channels=in_channels, metrics={})
    if in_channels != loaded.metadata.in_channels:
        about = replace(about, mean=(), std=())  # published per channel
    return replace(loaded, model=model.eval(), metadata=about)


def push_to_hub(
    model: RepVGG,
    repository: str,
    metadata: Metadata | None = None,
    *,
    licence: str | None = None,
    private: bool = False,
    message: str = "Upload a RepVGG model",
    token: str | None = None,
) -> str:
    """Upload a model with its header and a model card generated from it; the repository is created if necessary.

    Args:
        model: in either form.
        repository: OWNER/NAME.
        metadata: what is known about the model; None describes its structure only.
        licence: of the weights, an identifier of the hub such as "mit"; None makes the card say that none is stated.
        private: make a new repository private.
        message: of the commit.
        token: None selects the one stored by ``hf auth login``.

    Returns:
        The URL of the commit.

    Raises:
        UsageError: the repository is not OWNER/NAME, or the header is invalid or describes another model.
        OutputError: the hub refuses the upload or cannot be reached.
    """
    check_model(model, "push_to_hub")
    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(f"A repository is named OWNER/NAME, not {repository!r}.")
    about = metadata or describe_model(model, form_of(model))
    _check_header(model, about)
    api = _api(token)
    # One folder, one commit: weights and card can never disagree.
    with TemporaryDirectory(prefix="repvgg-") as folder:
        save(Path(folder) / WEIGHTS_FILE, model, about)
        write_text(Path(folder) / _CARD_FILE, model_card(model, about, repository, licence))
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
        except Exception as error:  # huggingface_hub also raises errors of its HTTP client
            raise OutputError(f"{repository} could not be pushed to: {first_line(error)}.") from error
    return str(commit)


def _check_header(model: RepVGG, about: Metadata) -> None:
    # Loading would reject a header of another model, but only after the upload.
    own = describe_model(model, form_of(model))
    for name in ("model", "form", "num_classes", "in_channels"):
        stated, actual = getattr(about, name), getattr(own, name)
        if stated != actual:
            raise UsageError(f"The metadata says that {name!r} is {stated!r}, and the model's is {actual!r}.")


def _api(token: str | None) -> Any:
    # A function, so that tests can replace the client.
    return require("huggingface_hub", "hub").HfApi(token=token, library_name="repvgg")


_FORMS = {"train": "train form, three branches a block", "plain": "plain form, one 3x3 convolution a block"}
_MAX_CLASSES = 20


def model_card(model: RepVGG, about: Metadata, repository: str, licence: str | None) -> str:
    """Return a README with the YAML front matter that the hub reads; it states nothing that the header does not."""
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
        more = f", … ({len(about.classes)} in all)" if len(about.classes) > _MAX_CLASSES else ""
        yield ", ".join(map(_cell, about.classes[:_MAX_CLASSES])) + more
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
        ("mean of the pixels", ", ".join(f"{value:g}" for value in about.mean)),
        ("standard deviation", ", ".join(f"{value:g}" for value in about.std)),
        ("classes", str(about.num_classes)),
        ("averaged weights", "yes" if about.ema else "no"),
        ("source", about.source),
        ("written by", f"repvgg {about.version}" if about.version else ""),
    ]
    return [(name, value) for name, value in rows if value]


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

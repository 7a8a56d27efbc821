"""Models on the Hugging Face hub: files fetched and cached, models pushed with a card."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from repvgg._files import write_text
from repvgg.checkpoints import Metadata
from repvgg.errors import OutputError, SourceError, UsageError, first_line, require
from repvgg.models.builder import RepVGG
from repvgg.models.card import model_card
from repvgg.models.loading import Loaded, describe_model, form_of, load, save

WEIGHTS = "model.safetensors"
_CARD = "README.md"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_REVISION = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Fetched:
    """A file of a repository, in the cache.

    Attributes:
        path: of the file.
        repository: OWNER/NAME.
        revision: the commit that it is of, 40 hex digits; empty if the cache does not tell.
    """

    path: Path
    repository: str
    revision: str

    @property
    def source(self) -> str:
        """The file in words, for a header."""
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


def fetch(
    repository: str,
    file: str = WEIGHTS,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
) -> Fetched:
    """A file of a model repository, out of the cache where it is there and up to date.

    Args:
        repository: OWNER/NAME.
        file: its path there.
        revision: a commit, a branch or a tag; None takes the newest commit of the main branch. Only a commit pins.
        cache_dir: where files are kept; None takes the cache of huggingface_hub (``HF_HOME``, ``HF_HUB_CACHE``).
        token: for a private repository; None takes the one that the machine is logged in with.

    Raises:
        SourceError: there is no such file, or it is not in the cache and the hub cannot be reached; the text names the
            repository, the file and the cache.
    """
    hub = require("huggingface_hub")
    try:
        path = Path(hub.hf_hub_download(repository, file, revision=revision, cache_dir=cache_dir, token=token))
    except Exception as error:  # of its own, of its HTTP client, of the disk
        cache = str(cache_dir or hub.constants.HF_HUB_CACHE)
        at = f" at {revision}" if revision else ""
        raise SourceError(
            f"{file!r} of {repository}{at} is not in the cache {cache!r}, and could not be downloaded "
            f"({first_line(error)}): go online once, or load a file that you have."
        ) from error
    commit = path.parents[len(Path(file).parts) - 1].name
    return Fetched(path, repository, commit if _REVISION.fullmatch(commit) else "")


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    plain: bool | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
) -> Loaded:
    """Rebuild a model from a repository of the Hugging Face hub or from a local folder, in eval mode.

    What is read is its ``model.safetensors``: one that :func:`push_to_hub` wrote, or timm's; see :func:`repvgg.load`.

    Args:
        source: OWNER/NAME, a folder, or a checkpoint.
        plain: as :func:`repvgg.load` takes it.
        revision: a commit, a branch or a tag of the repository; None takes the newest. The commit that it turned out to
            be is in the metadata's ``source``.
        cache_dir: where downloads are kept; None takes the cache of huggingface_hub.
        token: for a private repository; None takes the one that the machine is logged in with.

    Raises:
        SourceError: no such folder or repository, or the hub cannot be reached and the file is not in the cache.
        CheckpointError: the file is no checkpoint of a model; see :func:`repvgg.load`.
        UsageError: a revision of a local folder.
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
    if path.is_dir() and not (path / WEIGHTS).exists():
        raise SourceError(f"There is no {WEIGHTS!r} in {str(source)!r}.")
    return load(path / WEIGHTS if path.is_dir() else path, plain=plain)


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
    """Upload a model with its header and a card that is written from it; the repository is made if it is not there.

    Args:
        model: in either form.
        repository: OWNER/NAME.
        metadata: what the run knows of the model; None describes its structure alone.
        licence: of the weights, an identifier of the hub such as "mit"; without it the card says that none is stated.
        private: make a new repository private.
        message: of the commit.
        token: None takes the one that the machine is logged in with.

    Returns:
        Where the hub says that the commit is.

    Raises:
        UsageError: no OWNER/NAME, or a header that makes no sense or is not of this model.
        OutputError: the hub refused, or cannot be reached.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(f"A repository is named OWNER/NAME, not {repository!r}.")
    about = metadata or describe_model(model, form_of(model))
    _check_header(model, about)
    api = _api(token)
    with TemporaryDirectory(prefix="repvgg-") as folder:
        save(Path(folder) / WEIGHTS, model, about)
        write_text(Path(folder) / _CARD, model_card(model, about, repository, licence))
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
        except Exception as error:  # of its own, of its HTTP client
            raise OutputError(f"{repository} could not be pushed to: {first_line(error)}.") from error
    return str(commit)


def _check_header(model: RepVGG, about: Metadata) -> None:
    """A header of another model would be found out by whoever downloads it."""
    own = describe_model(model, form_of(model))
    for name in ("model", "form", "num_classes", "in_channels"):
        said, found = getattr(about, name), getattr(own, name)
        if said != found:
            raise UsageError(f"The metadata says that {name!r} is {said!r}, and the model's is {found!r}.")


def _api(token: str | None) -> Any:
    """The client that writes; tests put another in its place."""
    return require("huggingface_hub").HfApi(token=token, library_name="repvgg")

"""From names of models to networks that can be timed side by side, each in the forms that are worth comparing."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from repvgg.collapse import fold_batch_norms, reparameterize
from repvgg.errors import CheckpointError, NothingFoldedWarning, UnsupportedError, UsageError, first_line
from repvgg.models import BASELINES, RepVGG, create_baseline, create_model, form_of, list_models, named_model
from repvgg.studies.engines import ENGINES, Shape

TRAIN, FOLDED, PLAIN = FORMS = ("train form", "batch norms folded", "plain form")


@dataclass(frozen=True, eq=False)
class Candidate:
    """A network that takes part.

    Attributes:
        name: in tables.
        model: what it was asked for with; its other forms share it.
        form: of :data:`FORMS`.
        make: gives the network, in eval mode on the CPU; it is asked once.
        image: (C, H, W) of what it takes.
        engine: what runs it, of :data:`repvgg.studies.engines.ENGINES`.
    """

    name: str
    model: str
    form: str
    make: Callable[[], nn.Module]
    image: Shape
    engine: str = "torch"


def candidates_of(
    models: Sequence[str], input_size: int | None = None, engines: Sequence[str] = ("torch",)
) -> list[Candidate]:
    """All forms of each model of ours, and others as they would be deployed: batch norms and branches folded.

    A model that comes alone, of whomever, is taken in its three forms. A checkpoint in the plain form has no other.
    Each takes part once for each engine, and has its name behind its own if there are several.

    Args:
        models: names as :func:`repvgg.models.named_model` reads them.
        input_size: height and width of the images; None takes what each model is made for.
        engines: names of :data:`repvgg.studies.engines.ENGINES`.

    Raises:
        UsageError: a model is named twice, or none is named.
        UnknownModelError: there is no such model.
        CheckpointError: the only model is in the plain form already, and PyTorch the only engine.
    """
    if not models or len(set(models)) < len(models):
        raise UsageError("Name the models to time, each once.")
    several = len(engines) > 1
    found = [candidate for name in models for candidate in _forms(name, len(models) == 1, [*engines] == ["torch"])]
    if input_size is not None:
        found = [replace(candidate, image=(candidate.image[0], input_size, input_size)) for candidate in found]
    return [
        replace(candidate, engine=engine, name=f"{candidate.name}, {engine}" if several else candidate.name)
        for candidate in found
        for engine in engines
    ]


def runnable(candidates: Sequence[Candidate]) -> tuple[list[Candidate], dict[str, str]]:
    """Those that their engine can run, and why the others are left out, by name.

    Raises:
        UsageError: there is none left.
    """
    kept, left_out = [], {}
    for candidate in candidates:
        try:
            ENGINES[candidate.engine].check(candidate.make())
            kept.append(candidate)
        except UnsupportedError as error:
            left_out[candidate.name] = first_line(error)
    if not kept:
        name, why = next(iter(left_out.items()))
        raise UsageError(f"The engine can run none of these, not {name!r} for one: {why}.")
    return kept, left_out


def _forms(name: str, alone: bool, torch_alone: bool) -> list[Candidate]:
    """The forms of one model. Those with weights that somebody trained are proven equal on the way."""
    sourced = named_model(name)
    model, proven = sourced.model, sourced.weights != "random"
    ours = isinstance(model, RepVGG)
    if isinstance(model, RepVGG) and form_of(model) == "plain":
        if alone and torch_alone:
            raise CheckpointError(f"{name!r} is in the plain form already: give a checkpoint in the train form.")
        return [_candidate(name, name, PLAIN, model, sourced.input_shape)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingFoldedWarning)  # then its forms are the same, and the times show it
        plain = reparameterize(model, prove=proven)[0]
        if not (ours or alone):
            return [_candidate(name, name, PLAIN, plain, sourced.input_shape)]
        folded = fold_batch_norms(model, prove=proven)[0]
    forms = dict(zip(FORMS, (model, folded, plain), strict=True))
    return [
        _candidate(form if alone else f"{name}, {form}", name, form, network, sourced.input_shape)
        for form, network in forms.items()
    ]


def _candidate(name: str, model: str, form: str, network: nn.Module, image: Shape) -> Candidate:
    return Candidate(name, model, form, lambda: network, image)


def baseline_among(candidates: Sequence[Candidate], wanted: str | None) -> str:
    """The name of the candidate that a person means; of a model in several forms the one that would be deployed.

    Args:
        candidates: all of them; the first is the baseline if ``wanted`` is None.
        wanted: a candidate's name, its model's, or that without what stands in front of a colon or in front of a file.

    Raises:
        UsageError: there is none of that name; the text tells the nearest.
    """
    if wanted is None:
        return candidates[0].name
    by_name = {alias: candidate.name for candidate in candidates for alias in _aliases(candidate)}
    if wanted in by_name:
        return by_name[wanted]
    close = difflib.get_close_matches(wanted, by_name, n=3)
    others = f"name it as one of them, or take one of {', '.join(map(repr, by_name))}."
    known = f"did you mean {' or '.join(map(repr, close))}?" if close else others
    raise UsageError(f"The baseline {wanted!r} is not among the models: {known}")


def _aliases(candidate: Candidate) -> tuple[str, ...]:
    """The plain form comes last of a model's forms, so that it is what the model's name means."""
    model = candidate.model
    return candidate.name, model, model.rpartition(":")[2], Path(model).name


def deployed(name: str) -> nn.Module:
    """A row of the tables with random weights as it would be deployed: one of ours plain, a baseline collapsed.

    The paper folds the batch norms of its baselines (§4.1). The collapse does that, and merges branches that MobileOne
    has and the paper's baselines do not.
    """
    if name in list_models():
        return create_model(name, plain=True).eval()
    assert name in BASELINES
    return plain_form(create_baseline(name).eval())


def plain_form(model: nn.Module, image: Tensor | None = None) -> nn.Module:
    """A network collapsed, for counting and timing: nothing is proven, as of its weights nobody asks which.

    Where there is nothing to fold, as in VGG-16 without batch norms, that is a copy: counts and times show it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingFoldedWarning)
        return reparameterize(model, image, prove=False)[0]

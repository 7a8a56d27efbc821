"""The models: a table of frozen rows and one builder."""

from repvgg.models.builder import RepVGG, TrainingOutput, create_model, list_models
from repvgg.models.loading import Loaded, describe_model, form_of, load, save
from repvgg.models.sources import Sourced, resolve
from repvgg.models.spec import SPECS, ModelSpec, SqueezeExciteSpec, Stage, spec_of
from repvgg.models.spec_data import spec_from_data, spec_to_data
from repvgg.models.weights import load_weights

__all__ = [
    "SPECS",
    "Loaded",
    "ModelSpec",
    "RepVGG",
    "Sourced",
    "SqueezeExciteSpec",
    "Stage",
    "TrainingOutput",
    "create_model",
    "describe_model",
    "form_of",
    "list_models",
    "load",
    "load_weights",
    "resolve",
    "save",
    "spec_from_data",
    "spec_of",
    "spec_to_data",
]

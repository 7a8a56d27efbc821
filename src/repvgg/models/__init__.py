"""The models: a table of frozen rows and one builder."""

from repvgg.models.builder import RepVGG, TrainingOutput, create_model, list_models
from repvgg.models.loading import Loaded, describe_model, load, save
from repvgg.models.spec import SPECS, ModelSpec, SqueezeExciteSpec, Stage, spec_of

__all__ = [
    "SPECS",
    "Loaded",
    "ModelSpec",
    "RepVGG",
    "SqueezeExciteSpec",
    "Stage",
    "TrainingOutput",
    "create_model",
    "describe_model",
    "list_models",
    "load",
    "save",
    "spec_of",
]

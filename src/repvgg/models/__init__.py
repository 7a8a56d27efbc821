"""The models: a table of frozen rows and one builder."""

from repvgg.models.baselines import BASELINES, Baseline, baseline_of, create_baseline, list_baselines
from repvgg.models.builder import RepVGG, TrainingOutput, create_model, list_models
from repvgg.models.comparisons import (
    COMPARISONS,
    Comparison,
    create_comparison,
    create_variant,
    plain_net,
    residual_reorg,
)
from repvgg.models.hub import from_pretrained, push_to_hub
from repvgg.models.loading import Loaded, collapsed, describe_model, form_of, load, save
from repvgg.models.named import named_model
from repvgg.models.pretrained import PRETRAINED, Pretrained, load_pretrained
from repvgg.models.sources import Sourced, resolve
from repvgg.models.spec import SPECS, ModelSpec, SqueezeExciteSpec, Stage, spec_of
from repvgg.models.spec_data import spec_from_data, spec_to_data
from repvgg.models.starting_values import delta_orthogonal_, max_norm_
from repvgg.models.weights import load_weights

__all__ = [
    "BASELINES",
    "COMPARISONS",
    "PRETRAINED",
    "SPECS",
    "Baseline",
    "Comparison",
    "Loaded",
    "ModelSpec",
    "Pretrained",
    "RepVGG",
    "Sourced",
    "SqueezeExciteSpec",
    "Stage",
    "TrainingOutput",
    "baseline_of",
    "collapsed",
    "create_baseline",
    "create_comparison",
    "create_model",
    "create_variant",
    "delta_orthogonal_",
    "describe_model",
    "form_of",
    "from_pretrained",
    "list_baselines",
    "list_models",
    "load",
    "load_pretrained",
    "load_weights",
    "max_norm_",
    "named_model",
    "plain_net",
    "push_to_hub",
    "residual_reorg",
    "resolve",
    "save",
    "spec_from_data",
    "spec_of",
    "spec_to_data",
]

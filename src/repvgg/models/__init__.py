"""The models: a registry of architectures, a factory that builds them, and their checkpoints."""

from repvgg.models.backbones import ResNetBackbone, build_pspnet
from repvgg.models.checkpoint import (
    LoadedModel,
    collapse_loaded,
    describe_model,
    form_of,
    load,
    load_weights,
    save,
    set_backbone,
)
from repvgg.models.dilation import DilationRule, dilate_
from repvgg.models.factory import (
    ResolvedModel,
    create_baseline,
    create_comparison,
    create_model,
    create_variant,
    named_model,
    resolve,
)
from repvgg.models.hub import PRETRAINED, Pretrained, from_pretrained, load_pretrained, push_to_hub
from repvgg.models.phases import PhaseImages, PhaseReport, dilate_by_phases
from repvgg.models.pspnet import Model, PSPNet
from repvgg.models.registry import (
    ARCHITECTURES,
    BASELINES,
    COMPARISONS,
    PSPNETS,
    SPECS,
    Baseline,
    Comparison,
    baseline_of,
    list_baselines,
    list_models,
    list_segmentation_models,
    spec_of,
)
from repvgg.models.repvgg import RepVGG, RepVGGBackbone, TrainingOutput
from repvgg.models.spec import ModelSpec, PSPNetSpec, SqueezeExciteSpec, Stage, spec_from_data, spec_to_data
from repvgg.models.variants import delta_orthogonal_, max_norm_, plain_net, residual_reorg

# Former names, kept for code that uses them.
Loaded, Sourced, collapsed = LoadedModel, ResolvedModel, collapse_loaded

__all__ = [
    "ARCHITECTURES",
    "BASELINES",
    "COMPARISONS",
    "PRETRAINED",
    "PSPNETS",
    "SPECS",
    "Baseline",
    "Comparison",
    "DilationRule",
    "LoadedModel",
    "Model",
    "ModelSpec",
    "PSPNet",
    "PSPNetSpec",
    "PhaseImages",
    "PhaseReport",
    "Pretrained",
    "RepVGG",
    "RepVGGBackbone",
    "ResNetBackbone",
    "ResolvedModel",
    "SqueezeExciteSpec",
    "Stage",
    "TrainingOutput",
    "baseline_of",
    "build_pspnet",
    "collapse_loaded",
    "create_baseline",
    "create_comparison",
    "create_model",
    "create_variant",
    "delta_orthogonal_",
    "describe_model",
    "dilate_",
    "dilate_by_phases",
    "form_of",
    "from_pretrained",
    "list_baselines",
    "list_models",
    "list_segmentation_models",
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
    "set_backbone",
    "spec_from_data",
    "spec_of",
    "spec_to_data",
]

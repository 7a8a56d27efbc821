"""Networks of installed packages, created from their configurations with random weights; nothing is downloaded."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache
from typing import Any

from torch import Tensor, nn

from tests.collapse.foreign.folding import fold_in_order, kernel_bias, padded
from tests.collapse.foreign.harness import Network, image


@cache
def set_environment() -> None:
    """Make ultralytics write its settings to a temporary folder and ask nothing of a server, before it is imported.

    It reads the variables whenever it needs a setting, so they stay for the life of the process.
    """
    folder = tempfile.mkdtemp(prefix="ultralytics-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.update(YOLO_CONFIG_DIR=folder, YOLO_OFFLINE="True", YOLO_AUTOINSTALL="False", YOLO_VERBOSE="False")


def detection_model(config: str, *, export: bool = False) -> nn.Module:
    """Return a detector of ultralytics; for export, its head returns the predictions alone."""
    set_environment()
    from ultralytics.nn import tasks

    kind = tasks.RTDETRDetectionModel if config.startswith("rtdetr") else tasks.DetectionModel
    model = kind(config, ch=3, nc=20, verbose=False)
    model.model[-1].export = export
    return model


def fuse(model: nn.Module) -> nn.Module:
    return model.fuse(verbose=False)


def fuse_keeping_heads(model: nn.Module) -> nn.Module:
    """Call ``fuse`` but keep the one-to-many head, whose predictions are among the outputs of the network."""
    for part in model.modules():
        if hasattr(part, "one2one_cv2"):
            part.fuse = lambda: None
    return fuse(model)


def rt_detr(frozen: bool) -> nn.Module:
    from transformers import RTDetrConfig, RTDetrForObjectDetection

    return RTDetrForObjectDetection(RTDetrConfig(freeze_backbone_batch_norms=frozen))


def deploy_rt_detr(model: nn.Module) -> nn.Module:
    """Merge the RepVGG blocks, as ``convert_to_deploy`` of the authors' RT-DETR does, and fold all other norms."""
    for part in model.modules():
        if type(part).__name__ == "RTDetrRepVggBlock":
            (k3, b3), (k1, b1) = (_conv_norm(layer) for layer in (part.conv1, part.conv2))
            conv = nn.Conv2d(k3.shape[1], k3.shape[0], 3, padding=1)
            conv.weight.data, conv.bias.data = k3 + padded(k1, (3, 3)), b3 + b1
            part.conv1, part.conv2 = conv, _Zero()
    return fold_in_order(model)


def _conv_norm(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return kernel_bias(nn.Sequential(layer.conv, layer.norm))


class _Zero(nn.Module):
    def forward(self, x: Tensor) -> float:
        return 0.0


def levit(teacher: bool) -> nn.Module:
    from transformers import LevitConfig, LevitForImageClassification, LevitForImageClassificationWithTeacher

    kind = LevitForImageClassificationWithTeacher if teacher else LevitForImageClassification
    return kind(LevitConfig(image_size=96))


def fuse_levit(model: nn.Module) -> nn.Module:
    """Fold all norms, as ``replace_batchnorm`` of the authors' LeViT does; in the heads they precede a linear layer."""
    for part in model.modules():
        if type(part).__name__ == "LevitClassificationLayer":
            norm, linear = part.batch_norm, part.linear
            factor = norm.weight / (norm.running_var + norm.eps).sqrt()
            linear.bias.data += linear.weight.data @ (norm.bias - norm.running_mean * factor)
            linear.weight.data *= factor
            part.batch_norm = nn.Identity()
    return fold_in_order(model)


def faster_rcnn(name: str, **options: Any) -> nn.Module:
    from torchvision.models import detection

    few = {"rpn_post_nms_top_n_test": 50, "box_score_thresh": 0.005, "min_size": 96, "max_size": 128}
    return getattr(detection, name)(weights=None, weights_backbone=None, num_classes=21, **few, **options)


def frozen_faster_rcnn() -> nn.Module:
    """Return Faster R-CNN with the frozen norms that torchvision creates where it loads weights."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d

    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d)
    return FasterRCNN(backbone, 21, rpn_post_nms_top_n_test=50, box_score_thresh=0.005, min_size=96, max_size=128)


def ssdlite() -> nn.Module:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21)


def unet_mobileone() -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.Unet("mobileone_s0", encoder_weights=None)


def reparameterize_mobileone(model: nn.Module) -> nn.Module:
    from segmentation_models_pytorch.encoders.mobileone import reparameterize_model

    return reparameterize_model(model)


def pspnet_repvgg() -> nn.Module:
    """Return a PSPNet whose backbone is dilated by timm's rule; fewer stages would leave out most of it."""
    import segmentation_models_pytorch as smp

    return smp.PSPNet("tu-repvgg_a0", encoder_weights=None, encoder_depth=5, output_stride=8, classes=5)


def reparameterize_timm(model: nn.Module) -> nn.Module:
    from timm.utils.model import reparameterize_model

    return fold_in_order(reparameterize_model(model))


def images() -> tuple[list[Tensor]]:
    """Return a list of two images of different sizes, with values in [0, 1]."""
    return ([image(3, 90, 120).sigmoid(), image(3, 96, 80, seed=2).sigmoid()],)


_NONE = "none; every convolution with its norm"


def _yolo(name: str, config: str) -> Network:
    return Network(
        name, lambda: detection_model(config), lambda: (image(2, 3, 96, 128),), fuse, "fuse()", "PyPI ultralytics",
        "ultralytics",
    )  # fmt: skip


NETWORKS = [
    _yolo("YOLOv8n", "yolov8n.yaml"),
    _yolo("YOLOv9t", "yolov9t.yaml"),
    _yolo("YOLO11n", "yolo11n.yaml"),
    Network(
        "YOLOv10n",
        lambda: detection_model("yolov10n.yaml"),
        lambda: (image(2, 3, 160, 128),),
        fuse_keeping_heads,
        "fuse(), both heads kept, for both are outputs",
        "PyPI ultralytics",
        "ultralytics",
    ),
    Network(
        "YOLOv10n, export=True",
        lambda: detection_model("yolov10n.yaml", export=True),
        lambda: (image(2, 3, 160, 128),),
        fuse,
        "fuse()",
        "PyPI ultralytics",
        "ultralytics",
    ),
    Network(
        "rtdetr-l",
        lambda: detection_model("rtdetr-l.yaml"),
        lambda: (image(1, 3, 160, 128),),
        fuse,
        "fuse()",
        "PyPI ultralytics",
        "ultralytics",
    ),
    Network(
        "RT-DETR r50, frozen norms",
        lambda: rt_detr(True),
        lambda: (image(1, 3, 160, 128),),
        deploy_rt_detr,
        "the authors' convert_to_deploy and folded norms",
        "PyPI transformers",
        "transformers",
    ),
    Network(
        "RT-DETR r50",
        lambda: rt_detr(False),
        lambda: (image(1, 3, 160, 128),),
        deploy_rt_detr,
        "the authors' convert_to_deploy and folded norms",
        "PyPI transformers",
        "transformers",
    ),
    Network(
        "LeViT-128",
        lambda: levit(False),
        lambda: (image(4, 3, 96, 96),),
        fuse_levit,
        "the authors' replace_batchnorm",
        "PyPI transformers",
        "transformers",
    ),
    Network(
        "LeViT-128 with teacher",
        lambda: levit(True),
        lambda: (image(4, 3, 96, 96),),
        fuse_levit,
        "the authors' replace_batchnorm",
        "PyPI transformers",
        "transformers",
    ),
    Network("ssdlite320", ssdlite, images, fold_in_order, _NONE, "PyPI torchvision", "torchvision"),
    Network(
        "Faster R-CNN mobilenet",
        lambda: faster_rcnn("fasterrcnn_mobilenet_v3_large_320_fpn"),
        images,
        fold_in_order,
        _NONE,
        "PyPI torchvision",
        "torchvision",
    ),
    Network(
        "Faster R-CNN resnet50",
        lambda: faster_rcnn("fasterrcnn_resnet50_fpn"),
        images,
        fold_in_order,
        _NONE,
        "PyPI torchvision",
        "torchvision",
    ),
    Network(
        "Faster R-CNN resnet50, frozen norms",
        frozen_faster_rcnn,
        images,
        fold_in_order,
        _NONE,
        "PyPI torchvision",
        "torchvision",
    ),
    Network(
        "Unet over mobileone_s0",
        unet_mobileone,
        lambda: (image(2, 3, 64, 96),),
        reparameterize_mobileone,
        "reparameterize_model",
        "PyPI segmentation-models-pytorch",
        "segmentation_models_pytorch",
    ),
    Network(
        "PSPNet over timm's repvgg_a0",
        pspnet_repvgg,
        lambda: (image(2, 3, 64, 96),),
        reparameterize_timm,
        "timm's reparameterize_model and folded norms",
        "PyPI segmentation-models-pytorch",
        "segmentation_models_pytorch",
    ),
]

"""Numbers of a segmentation, beside a reference that counts pixel by pixel, and torchmetrics."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchmetrics.functional.classification import multiclass_jaccard_index

from repvgg.data.segmentation_metrics import confusion_matrix
from repvgg.errors import CheckpointError, DataError
from repvgg.training import MaskAgreement, SegmentationEvaluation, compare_segmentations, evaluate_segmentation

K, IGNORED = 5, 255


def masks(seed=0, classes=(0, 1, 3)):
    """Truth with ignored pixels, and a prediction that is right in part; class 4 is predicted but never true."""
    draw = torch.Generator().manual_seed(seed)
    truth = torch.tensor(classes)[torch.randint(len(classes), (3, 7, 9), generator=draw)]
    random = torch.tensor([*classes, 4])[torch.randint(len(classes) + 1, truth.shape, generator=draw)]
    prediction = torch.where(torch.rand(truth.shape, generator=draw) < 0.6, truth, random)
    truth[:, 0] = IGNORED
    return truth.to(torch.uint8), prediction


def reference(truth, prediction):
    """IoU and accuracy of each class by sets of pixels."""
    pixels = [
        (index, int(true), int(guess))
        for index, (true, guess) in enumerate(zip(truth.flatten(), prediction.flatten(), strict=True))
        if true != IGNORED
    ]
    iou, accuracy = [], []
    for label in range(K):
        is_true = {index for index, true, _ in pixels if true == label}
        guessed = {index for index, _, guess in pixels if guess == label}
        union = is_true | guessed
        iou.append(len(is_true & guessed) / len(union) if union else math.nan)
        accuracy.append(len(is_true & guessed) / len(is_true) if is_true else math.nan)
    return iou, accuracy, sum(true == guess for _, true, guess in pixels) / len(pixels)


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_reference_by_sets(seed):
    truth, prediction = masks(seed)
    result = SegmentationEvaluation(confusion_matrix(prediction, truth, K), 3)
    iou, accuracy, right = reference(truth, prediction)
    assert result.iou.tolist() == pytest.approx(iou, nan_ok=True)
    assert result.per_class.tolist() == pytest.approx(accuracy, nan_ok=True)
    assert math.isnan(iou[2])
    assert iou[4] == 0  # predicted, never true: counts as 0 in both means
    known = [value for value in iou if not math.isnan(value)]
    assert result.miou == pytest.approx(sum(known) / 4)
    assert result.mean_accuracy == pytest.approx(sum(value for value in accuracy if not math.isnan(value)) / 3)
    assert result.pixel_accuracy == pytest.approx(right)
    zero = SegmentationEvaluation(result.confusion, 3, "zero")
    assert zero.miou == pytest.approx(sum(known) / K)
    assert result.confusion.dtype == torch.int64
    assert result.pixels == int((truth != IGNORED).sum())


def test_equals_torchmetrics():
    truth, prediction = masks()
    theirs = multiclass_jaccard_index(prediction, truth.long(), K, ignore_index=IGNORED, average="none")
    ours = SegmentationEvaluation(confusion_matrix(prediction, truth, K), 3)
    assert_close(ours.iou.nan_to_num(0).float(), theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the package
@pytest.mark.parametrize("seed", range(3))
def test_equals_segmentation_models_pytorch(seed):
    metrics = pytest.importorskip("segmentation_models_pytorch.metrics", exc_type=ImportError)
    truth, prediction = masks(seed)
    counts = metrics.get_stats(prediction, truth.long(), mode="multiclass", num_classes=K, ignore_index=IGNORED)
    hits, false_alarms, misses, _ = (count.sum(0).double() for count in counts)
    ours = SegmentationEvaluation(confusion_matrix(prediction, truth, K), 3)
    assert_close(ours.iou, hits / (hits + false_alarms + misses), rtol=1e-12, atol=0, equal_nan=True)


def test_the_rule_for_absent_classes_is_told():
    truth, prediction = masks()
    matrix = confusion_matrix(prediction, truth, K)
    assert SegmentationEvaluation(matrix, 3).rule == "1 class in neither truth nor prediction, left out of the means"
    assert SegmentationEvaluation(matrix, 3, "zero").rule.endswith("counted as 0")
    assert SegmentationEvaluation(torch.ones(2, 2, dtype=torch.int64), 1).rule == "every class occurs"


def test_as_plain_data():
    truth, prediction = masks()
    data = SegmentationEvaluation(confusion_matrix(prediction, truth, K), 3).to_dict()
    assert data["iou"][2] is None
    assert data["images"] == 3
    nothing = SegmentationEvaluation(torch.zeros(2, 2, dtype=torch.int64), 0)
    assert nothing.to_dict()["miou"] is None
    assert nothing.metrics == {}


def test_labels_out_of_range_are_refused():
    truth, prediction = masks()
    truth[0, 3, 3] = 7
    with pytest.raises(DataError, match="has the label 7, but there are 5 classes and 255 is ignored"):
        confusion_matrix(prediction, truth, K)


class PerPixel(nn.Module):
    """Logits of each pixel by a 1x1 convolution."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, K, 1)

    def forward(self, x):
        assert not self.training
        return self.conv(x)


def batches():
    draw = torch.Generator().manual_seed(1)
    for size in ((1, 6, 8), (2, 5, 7)):  # images of various sizes
        images = torch.randint(0, 256, (size[0], 3, *size[1:]), generator=draw, dtype=torch.uint8)
        yield images, torch.randint(0, K, size, generator=draw, dtype=torch.uint8)


def prepare(images):
    return images.float() / 255 - 0.5


def test_evaluates_images_of_any_size():
    model = PerPixel().train()
    result = evaluate_segmentation(model, batches(), prepare, num_classes=K)
    expected = torch.zeros(K, K, dtype=torch.int64)
    for images, truth in batches():
        for true, guess in zip(truth.flatten(), model.eval()(prepare(images)).argmax(1).flatten(), strict=True):
            expected[int(true), int(guess)] += 1
    assert torch.equal(result.confusion, expected)
    assert result.images == 3


def test_flags_are_restored():
    model = PerPixel().train()
    evaluate_segmentation(model, batches(), prepare, num_classes=K)
    assert model.training


def test_counts_the_pixels_where_models_agree():
    first, second = PerPixel(), PerPixel(seed=1)
    seen = []
    results, agreement = compare_segmentations(
        [first, second, first], batches(), prepare, num_classes=K, on_batch=seen.append
    )
    same = sum(
        int((first.eval()(prepare(x)).argmax(1) == second.eval()(prepare(x)).argmax(1)).sum()) for x, _ in batches()
    )
    assert agreement == MaskAgreement(same, 48 + 70, different_in_float64=118 - same)
    assert str(agreement) == f"another class in {118 - same} of 118 pixels, in float64 in {118 - same}"
    assert str(MaskAgreement(1234, 1234)) == "the same class in all 1,234 pixels"
    assert [len(batch.predictions) for batch in seen] == [3, 3]
    assert torch.equal(results[0].confusion, results[2].confusion)


class AlmostTied(nn.Module):
    """Two classes, the second ahead by 1e-9 and by ``roundings`` roundings of the arithmetic."""

    def __init__(self, roundings):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.roundings = roundings

    def forward(self, x):
        first = self.scale * x[:, :1].sigmoid() / 2 + 0.5  # 1e-9 is below half a rounding of float32
        return torch.cat([first, first + 1e-9 + self.roundings * torch.finfo(x.dtype).eps], 1)


def test_ties_within_rounding_are_told_from_differences():
    models = [AlmostTied(0), AlmostTied(1)]
    _, agreement = compare_segmentations(models, batches(), prepare, num_classes=K)
    assert agreement == MaskAgreement(0, 118, different_in_float64=0)
    assert str(agreement) == "another class in 118 of 118 pixels, in float64 in 0"
    assert models[0].scale.dtype == torch.float32


def test_classifiers_and_broken_networks_are_refused():
    with pytest.raises(CheckpointError, match="take a segmentation network"):
        evaluate_segmentation(lambda x: x.mean((2, 3)), batches(), prepare, num_classes=K)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        evaluate_segmentation(lambda x: x * float("nan"), batches(), prepare, num_classes=3)

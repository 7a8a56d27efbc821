"""The loss of masks, and training on them: deterministic, resumable, with one image at a time."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from repvgg.data import open_data
from repvgg.errors import UsageError
from repvgg.models import TrainingOutput, create_model
from repvgg.training import SegmentationEvaluation, fit, perform_dry_run, segmentation_loss
from repvgg.training.distributed import ProcessLayout
from repvgg.training.loop import TrainingJob
from tests.training.helpers import fingerprint
from tests.training.masks import config_of, make_masks, opened, tiny


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return make_masks(tmp_path_factory.mktemp("masks"), train=24)


def logits_and_masks():
    draw = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 4, (2, 5, 6), generator=draw)
    masks[0, :2] = 255
    return torch.randn(2, 4, 5, 6, generator=draw), masks


def test_loss_is_the_mean_over_pixels_that_count():
    logits, masks = logits_and_masks()
    log = logits.log_softmax(1)
    terms = [
        -log[n, masks[n, y, x], y, x] for n in range(2) for y in range(5) for x in range(6) if masks[n, y, x] != 255
    ]
    mean = torch.stack(terms).mean()
    assert len(terms) == 48
    assert_close(segmentation_loss(logits, masks), mean)
    assert_close(segmentation_loss(logits, masks.to(torch.uint8)), mean)
    output = TrainingOutput(logits, (2 * logits, logits))
    second = segmentation_loss(2 * logits, masks)
    assert_close(segmentation_loss(output, masks, auxiliary_weight=0.4), mean + 0.4 * (second + mean))
    smooth = F.cross_entropy(logits, masks, ignore_index=255, label_smoothing=0.1)
    assert_close(segmentation_loss(logits, masks, label_smoothing=0.1), smooth)


def test_a_batch_that_is_ignored_entirely_has_loss_0():
    logits, masks = logits_and_masks()
    logits.requires_grad_()
    loss = segmentation_loss(logits, torch.full_like(masks, 255))
    loss.backward()
    assert float(loss.detach()) == 0
    assert_close(logits.grad, torch.zeros_like(logits))


def test_training_learns_and_repeats(uri):
    config = config_of(uri, epochs=3, batch_size=2)
    first, second = tiny(), tiny()
    result = fit(first, opened(uri), config, progress=False)
    fit(second, opened(uri), config, progress=False)
    assert fingerprint(first) == fingerprint(second)
    assert isinstance(result.validation, SegmentationEvaluation)
    last = result.history[-1]
    assert last.loss < 0.6 * result.history[0].loss
    assert last.held_out_miou > 0.6  # one class alone: 0.24
    assert last.held_out_miou == pytest.approx(result.validation.miou, abs=1e-3)
    assert last.held_out_pixel_accuracy == pytest.approx(result.validation.pixel_accuracy, abs=1e-3)
    assert result.validation.images == 3


class Interruption(Exception):  # noqa: N818
    """Raised by a test to interrupt a run."""


def test_an_interrupted_run_ends_with_the_same_bits(uri, tmp_path):
    config = config_of(uri, epochs=2, batch_size=6, save_steps=1, ema=0.9)
    whole = tiny()
    expected = fit(whole, opened(uri), config, progress=False)

    def stop(*_):
        raise Interruption

    with pytest.raises(Interruption):
        fit(tiny(), opened(uri), config, folder=tmp_path, progress=False, on_epoch=stop)
    resumed = tiny(seed=1)
    found = fit(resumed, opened(uri), config, folder=tmp_path, resume=True, progress=False)
    assert fingerprint(resumed) == fingerprint(whole)
    times = {"seconds": 0.0, "images_per_second": 0.0}
    assert [replace(one, **times) for one in found.history] == [replace(one, **times) for one in expected.history]


def test_a_batch_of_one_image_trains(uri):
    model = tiny()
    before = fingerprint(model)
    result = fit(model, opened(uri), config_of(uri, epochs=1, batch_size=1, sync_bn=True), progress=False)
    assert fingerprint(model) != before
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    assert len(result.history) == 1


def test_a_dry_run_collapses_the_trained_network(uri):
    result = perform_dry_run(tiny(), opened(uri), config_of(uri))
    assert result.evidence is not None
    assert result.evidence.passed
    assert result.loss > 0


def test_crops_are_on_the_grid(uri):
    config = config_of(uri)
    config = replace(config, data=replace(config.data, train_size=32))
    with pytest.raises(UsageError, match=r"A training crop has a side of 8k \+ 1 pixels, not 32: take 25 or 33"):
        TrainingJob(tiny(), open_data(config.data), config, ProcessLayout())


def test_a_network_for_other_classes_is_refused(uri):
    with pytest.raises(UsageError, match="has 3 classes, but the model returns"):
        fit(tiny(num_classes=5), opened(uri), config_of(uri), progress=False)
    with pytest.raises(UsageError, match="has 3 classes, but the model returns"):
        fit(create_model("repvgg_t0", 3), opened(uri), config_of(uri), progress=False)

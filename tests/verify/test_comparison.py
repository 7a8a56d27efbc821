import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.errors import EquivalenceError, UsageError
from repvgg.verify import border_inputs, verify
from tests.verify.models import conv_bn_relu, folded, net, trained_like

IMAGES = border_inputs((3, 3, 12, 12), batches=2)


# Correct candidates


def test_correct_fold_passes_in_float32():
    model = net()
    evidence = verify(model, folded(model), IMAGES).raise_if_failed()
    assert evidence.passed
    assert 0.0 < evidence.relative < 2e-6
    assert 0.0 < evidence.fold_error < 2e-7
    assert 0.0 < evidence.reference_error < 2e-6
    assert (evidence.dtype, evidence.batches, evidence.samples) == ("float32", 2, 6)


def test_correct_fold_passes_in_float64_and_float32_weights_do_not():
    model = net().double()
    evidence = verify(model, folded(model), IMAGES)
    assert evidence.passed
    assert evidence.relative < 1e-14
    assert evidence.tolerance == pytest.approx(1e-12)
    assert evidence.tolerance_origin == "9007 float64 roundings"
    assert evidence.reference_error is None
    assert evidence.fold_error is None
    rounded = folded(model).float()
    assert not verify(model, copy.deepcopy(rounded).double(), IMAGES).passed
    assert verify(model, rounded, IMAGES).passed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_correct_fold_passes_in_half_precision(dtype):
    model = net()
    evidence = verify(model, folded(model).to(dtype), IMAGES)
    assert evidence.passed
    assert evidence.relative < 4 * evidence.reference_error
    assert evidence.dtype == str(dtype).removeprefix("torch.")


def test_rounding_of_the_inputs_is_not_an_error():
    reference = nn.Conv2d(1, 1, 1)
    nn.init.ones_(reference.weight)
    nn.init.zeros_(reference.bias)
    x = torch.full((1, 1, 2, 2), 0.1)
    assert float(x.half()[0, 0, 0, 0]) != float(x[0, 0, 0, 0])
    evidence = verify(reference, copy.deepcopy(reference).half(), x)
    assert evidence.absolute == 0.0
    assert evidence.relative == 0.0


# Errors that are detected


def test_perturbed_weight_fails_and_names_the_layer():
    model = net()
    candidate = folded(model)
    with torch.no_grad():
        candidate.second[0].weight[3, 2, 1, 1] += 1e-3
    evidence = verify(model, candidate, IMAGES)
    assert not evidence.passed
    assert evidence.fold_error == pytest.approx(evidence.relative, rel=1e-2)
    assert evidence.worst_layers(1)[0].name == "second"
    with pytest.raises(
        EquivalenceError, match=r"more than the .* allowed .*layer that adds the largest error is second"
    ):
        evidence.raise_if_failed()


def test_missing_bias_fails():
    model = net()
    candidate = folded(model)
    nn.init.zeros_(candidate.first[0].bias)
    assert not verify(model, candidate, IMAGES).passed


@pytest.mark.parametrize("mode", ["replicate", "circular"])
def test_other_padding_mode_fails(mode):
    reference = conv_bn_relu(3, 4)
    trained_like(reference)

    def candidate(x: Tensor) -> Tensor:
        edged = F.pad(x, (1, 1, 1, 1), mode=mode)
        return reference[2](reference[1](F.conv2d(edged, reference[0].weight)))

    evidence = verify(reference, candidate, IMAGES)
    assert not evidence.passed
    assert evidence.relative > 1e-2


def test_a_candidate_that_changes_the_reference_does_not_widen_the_tolerance():
    reference = conv_bn_relu(3, 4)
    trained_like(reference)

    def candidate(x: Tensor) -> Tensor:
        reference[1].running_mean.add_(1.0)  # as a batch norm in training mode changes it, but more
        return 1.5 * reference[2](reference[1](F.conv2d(x, reference[0].weight, padding=1)))

    evidence = verify(reference, candidate, IMAGES)
    assert not evidence.passed
    assert evidence.reference_error < 1e-5


def test_zero_padding_before_a_batch_norm_fails():
    bn, conv = trained_like(nn.BatchNorm2d(2)).eval(), nn.Conv2d(2, 2, 3, padding=1, bias=False)
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    shift = bn.bias - scale * bn.running_mean
    weight = conv.weight * scale[None, :, None, None]
    bias = (conv.weight.sum((2, 3)) * shift).sum(1)
    inside = [x[:, :2] for x in IMAGES]
    merged = verify(nn.Sequential(bn, conv), lambda x: F.conv2d(x, weight, bias, padding=1), inside)
    assert not merged.passed, "padding with 0 after the batch norm is padding with -shift / scale before it"
    cropped = verify(
        lambda x: conv(bn(x))[..., 1:-1, 1:-1], lambda x: F.conv2d(x, weight, bias), inside, tolerance=1e-5
    )
    assert cropped.passed


def test_normalization_with_batch_statistics_fails():
    model = net().train()
    frozen = copy.deepcopy(model)

    def candidate(x: Tensor) -> Tensor:
        return frozen.head(F.relu(frozen.second[:2](F.relu(frozen.first[:2](x)))).mean((2, 3)))

    as_module = verify(model, folded(model), IMAGES)
    assert as_module.passed, "a module runs in eval mode, whatever its mode is"
    assert all(module.training for module in model.modules())
    as_callable = verify(lambda x: model(x), candidate, IMAGES)
    assert as_callable.passed, "both normalize with the statistics of the batch"
    assert not verify(lambda x: model(x), folded(model), IMAGES).passed
    assert not verify(folded(model), candidate, IMAGES).passed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_non_finite_outputs_fail(value, side):
    def non_finite(x: Tensor) -> Tensor:
        y = 2.0 * x
        y[0, 0, 0, 0] = value
        return y

    def finite(x: Tensor) -> Tensor:
        return 2.0 * x

    pair = (non_finite, finite) if side == "reference" else (finite, non_finite)
    evidence = verify(*pair, IMAGES, tolerance=1e9)
    assert not evidence.passed
    assert any(side in problem and "NaN" in problem for problem in evidence.problems)
    assert evidence.relative == float("inf")


def test_equal_infinities_fail():
    evidence = verify(lambda x: x / 0.0, lambda x: x / 0.0, IMAGES)
    assert len(evidence.problems) == 2


def test_arithmetic_in_a_coarser_dtype_fails():
    model = net()
    half = copy.deepcopy(model).half().eval()
    evidence = verify(model, lambda x: half(x.half()).float(), IMAGES)
    assert evidence.dtype == "float32"
    assert not evidence.passed
    assert verify(model, half, IMAGES).passed, "as a float16 model it passes"


class Positions(nn.Module):
    """Adds positions that are computed in float32, whatever the dtype of the model is."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        step = 1.0 / (10000.0 ** torch.arange(3, dtype=torch.float32, device=x.device) + x.new_zeros(1).float())
        return y + step.sin().view(3, 1, 1)


def test_float32_constants_of_a_float64_model_are_part_of_it():
    model = Positions().double().eval()
    assert verify(model, copy.deepcopy(model), IMAGES).passed
    other = copy.deepcopy(model)
    other.conv.weight.data[0, 0, 0, 0] += 1e-10
    assert not verify(model, other, IMAGES).passed


def test_other_output_shape_fails():
    evidence = verify(lambda x: x, lambda x: x[..., 1:], IMAGES)
    assert not evidence.passed
    assert "(3, 3, 12, 12)" in evidence.problems[0]
    assert "(3, 3, 12, 11)" in evidence.problems[0]
    with pytest.raises(EquivalenceError, match="shape"):
        evidence.raise_if_failed()


def test_broadcastable_output_shape_fails():
    assert not verify(lambda x: x.mean((2, 3), keepdim=True), lambda x: x.mean((2, 3)), IMAGES).passed


def test_error_in_the_last_batch_fails():
    def candidate(x: Tensor) -> Tensor:
        return x if x.shape[-1] == 12 else x + 1e-3

    assert verify(lambda x: x, candidate, IMAGES[:1]).passed
    assert not verify(lambda x: x, candidate, IMAGES).passed


def test_empty_outputs_fail():
    evidence = verify(lambda x: x[:, :0], lambda x: x[:, :0], IMAGES)
    assert evidence.problems == ("the reference returned no values",)


# Numbers


def test_errors_over_two_batches_equal_those_by_hand():
    batches = [torch.tensor([[1.0, -2.0]]), torch.tensor([[8.0, 4.0]])]

    def candidate(x: Tensor) -> Tensor:
        return 2.0 * x + torch.tensor([[0.5, 0.0]])

    evidence = verify(lambda x: 2.0 * x, candidate, batches, tolerance=0.03125)
    assert evidence.absolute == 0.5
    assert evidence.relative == 0.5 / 16.0
    assert evidence.passed
    assert evidence.tolerance_origin == "given by the caller"
    assert not verify(lambda x: 2.0 * x, candidate, batches, tolerance=0.0312).passed


def test_reference_of_zeros():
    x = torch.ones(2, 3)
    assert verify(torch.zeros_like, torch.zeros_like, x).relative == 0.0
    evidence = verify(torch.zeros_like, lambda x: 1e-30 * x, x)
    assert evidence.relative == float("inf")
    assert evidence.absolute == pytest.approx(1e-30)
    assert not evidence.passed


def test_tolerance_is_four_times_the_error_of_the_reference():
    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset = nn.Parameter(torch.tensor(1e4))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.offset) - self.offset

    evidence = verify(Cancelling(), Cancelling(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    assert evidence.passed
    assert evidence.relative == evidence.reference_error > 1e-5
    assert evidence.tolerance == 4 * evidence.reference_error
    assert evidence.tolerance_origin.startswith("4 x the ")
    assert evidence.fold_error < 1e-11


def test_callable_reference_runs_as_given():
    model = net().eval()
    evidence = verify(lambda x: model(x), folded(model), IMAGES)
    assert evidence.passed
    assert evidence.reference_error is None
    assert evidence.fold_error is not None
    assert evidence.layers == ()
    assert "as given" in evidence.reference_run
    assert "float32" in evidence.reference_run
    assert "run in float64" in verify(model, folded(model), IMAGES).reference_run


def test_callable_reference_gets_inputs_of_their_dtype():
    seen = []

    def reference(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x.float()

    verify(reference, nn.Conv2d(1, 1, 1).half(), torch.ones(1, 1, 2, 2), tolerance=1e9)
    assert seen == [torch.float32]


def test_agreement_and_its_margin():
    logits = torch.tensor([[3.0, 1.0], [1.0, 1.0 + 1e-7], [0.0, 2.0]])

    def candidate(x: Tensor) -> Tensor:
        return x + torch.tensor([[0.0, 0.0], [2e-7, 0.0], [0.0, 0.0]])

    evidence = verify(lambda x: x, candidate, logits)
    assert (evidence.agreement.agreed, evidence.agreement.total) == (2, 3)
    assert 0.0 < evidence.agreement.widest_margin <= 2 * evidence.absolute
    assert evidence.passed, "a disagreement within the error does not fail"


@pytest.mark.parametrize("shape", [(4, 1), (4,), (4, 3, 2)])
def test_no_agreement_without_classes(shape):
    assert verify(lambda x: x, lambda x: x, torch.ones(shape)).agreement is None


def test_inputs_are_not_modified():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(1, 1, 1))
    x = torch.full((2, 1, 3, 3), -1.0)
    verify(model, copy.deepcopy(model), x)
    torch.testing.assert_close(x, torch.full((2, 1, 3, 3), -1.0), rtol=0, atol=0)


def test_integer_inputs_stay_integers():
    reference = nn.Embedding(5, 3)
    assert verify(reference, copy.deepcopy(reference), torch.tensor([[0, 4, 2]])).passed


# Invalid arguments


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ([], "no inputs to verify on"),
        (torch.zeros(0, 3), "must hold at least one sample"),
        (torch.tensor(1.0), "must hold at least one sample"),
        ([torch.ones(1), "x"], "got a str"),
        (torch.tensor([float("nan")]), "rounded to float32"),
    ],
)
def test_invalid_inputs_are_rejected(inputs, text):
    with pytest.raises(UsageError, match=text):
        verify(lambda x: x, lambda x: x, inputs)


def test_inputs_that_overflow_are_rejected():
    conv = nn.Conv2d(1, 1, 1)
    with pytest.raises(UsageError, match="rounded to float16"):
        verify(conv, copy.deepcopy(conv).half(), torch.full((1, 1, 2, 2), 1e6))


@pytest.mark.parametrize("tolerance", [-1e-9, float("nan"), float("inf")])
def test_invalid_tolerances_are_rejected(tolerance):
    with pytest.raises(UsageError, match="tolerance"):
        verify(lambda x: x, lambda x: x, torch.ones(1), tolerance=tolerance)


@pytest.mark.parametrize("output", [None, torch.ones(1, dtype=torch.int64), {"a": "text"}])
def test_incomparable_outputs_fail(output):
    evidence = verify(lambda x: x, lambda x: output, torch.ones(1))
    assert not evidence.passed
    assert any("the candidate" in problem for problem in evidence.problems)


@pytest.mark.parametrize("output", [None, "text", [], {"a": None}])
def test_reference_without_a_number_is_rejected(output):
    with pytest.raises(UsageError, match=r"The reference returned .*: there are no numbers to compare"):
        verify(lambda x: output, lambda x: x, torch.ones(1))


def test_dtype_without_a_tolerance_is_rejected():
    candidate = nn.Module()
    candidate.weight = nn.Parameter(torch.zeros(1).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UsageError, match="float8_e4m3fn"):
        verify(lambda x: x, candidate, torch.ones(1))


def test_reference_that_cannot_run_in_float64_is_rejected():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.ones(2, 2)  # not a buffer, so .double() does not convert it

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype is not torch.float32:
                raise ValueError("float32 only")
            return x @ self.weight

    reference = Fixed()
    with pytest.raises(UsageError, match="cannot run in float64"):
        verify(reference, lambda x: x @ reference.weight, torch.ones(1, 2))
    assert verify(lambda x: reference(x), lambda x: x @ reference.weight, torch.ones(1, 2)).passed


def test_candidate_that_cannot_run_in_float64_is_noted():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype is not torch.float32:
                raise RuntimeError("float32 only.")
            return x * self.scale

    evidence = verify(lambda x: x, Fixed(), torch.ones(1, 2))
    assert evidence.passed
    assert evidence.fold_error is None
    assert evidence.notes == ("the candidate cannot be run in float64 (float32 only)",)

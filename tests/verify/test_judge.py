import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.errors import EquivalenceError, UsageError
from repvgg.verify import border_inputs, verify
from tests.verify.models import conv_bn_relu, folded, net, trained_like

IMAGES = border_inputs((3, 3, 12, 12), batches=2)


# What passes


def test_a_right_fold_passes_in_float32():
    model = net()
    evidence = verify(model, folded(model), IMAGES).raise_if_failed()
    assert evidence.passed
    assert 0.0 < evidence.relative < 2e-6
    assert 0.0 < evidence.fold_error < 2e-7
    assert 0.0 < evidence.reference_error < 2e-6
    assert (evidence.dtype, evidence.batches, evidence.samples) == ("float32", 2, 6)


def test_a_right_fold_passes_in_float64_with_a_tolerance_that_float32_weights_do_not_meet():
    model = net().double()
    evidence = verify(model, folded(model), IMAGES)
    assert evidence.passed
    assert evidence.relative < 1e-14
    assert evidence.tolerance == pytest.approx(1e-12)
    assert "floor of float64" in evidence.tolerance_origin
    assert evidence.reference_error is None
    assert evidence.fold_error is None
    rounded = folded(model).float()
    assert not verify(model, copy.deepcopy(rounded).double(), IMAGES).passed
    assert verify(model, rounded, IMAGES).passed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_right_fold_passes_in_half_precision_and_errs_as_much_as_the_reference_does(dtype):
    model = net()
    evidence = verify(model, folded(model).to(dtype), IMAGES)
    assert evidence.passed
    assert evidence.relative < 4 * evidence.reference_error
    assert evidence.dtype == str(dtype).removeprefix("torch.")


def test_the_rounding_of_the_inputs_is_no_error():
    reference = nn.Conv2d(1, 1, 1)
    nn.init.ones_(reference.weight)
    nn.init.zeros_(reference.bias)
    x = torch.full((1, 1, 2, 2), 0.1)
    assert float(x.half()[0, 0, 0, 0]) != float(x[0, 0, 0, 0])
    evidence = verify(reference, copy.deepcopy(reference).half(), x)
    assert evidence.absolute == 0.0
    assert evidence.relative == 0.0


# What is caught


def test_catches_a_perturbed_weight_and_names_the_layer():
    model = net()
    candidate = folded(model)
    with torch.no_grad():
        candidate.second[0].weight[3, 2, 1, 1] += 1e-3
    evidence = verify(model, candidate, IMAGES)
    assert not evidence.passed
    assert evidence.fold_error == pytest.approx(evidence.relative, rel=1e-2)
    assert evidence.worst_layers(1)[0].name == "second"
    with pytest.raises(EquivalenceError, match=r"over the tolerance .*made in second"):
        evidence.raise_if_failed()


def test_catches_a_bias_that_was_not_folded():
    model = net()
    candidate = folded(model)
    nn.init.zeros_(candidate.first[0].bias)
    assert not verify(model, candidate, IMAGES).passed


@pytest.mark.parametrize("mode", ["replicate", "circular"])
def test_catches_another_border(mode):
    reference = conv_bn_relu(3, 4)
    trained_like(reference)

    def candidate(x: Tensor) -> Tensor:
        edged = F.pad(x, (1, 1, 1, 1), mode=mode)
        return reference[2](reference[1](F.conv2d(edged, reference[0].weight)))

    evidence = verify(reference, candidate, IMAGES)
    assert not evidence.passed
    assert evidence.relative > 1e-2


def test_catches_a_padding_that_skips_the_shift_of_an_earlier_batch_norm():
    bn, conv = trained_like(nn.BatchNorm2d(2)).eval(), nn.Conv2d(2, 2, 3, padding=1, bias=False)
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    shift = bn.bias - scale * bn.running_mean
    weight = conv.weight * scale[None, :, None, None]
    bias = (conv.weight.sum((2, 3)) * shift).sum(1)
    inside = [x[:, :2] for x in IMAGES]
    merged = verify(nn.Sequential(bn, conv), lambda x: F.conv2d(x, weight, bias, padding=1), inside)
    assert not merged.passed, "beyond the border lies 0 after the batch norm, and so -shift / scale before it"
    cropped = verify(
        lambda x: conv(bn(x))[..., 1:-1, 1:-1], lambda x: F.conv2d(x, weight, bias), inside, tolerance=1e-5
    )
    assert cropped.passed


def test_catches_a_reference_that_normalizes_with_the_batch():
    model = net().train()
    frozen = copy.deepcopy(model)

    def candidate(x: Tensor) -> Tensor:
        return frozen.head(F.relu(frozen.second[:2](F.relu(frozen.first[:2](x)))).mean((2, 3)))

    as_module = verify(model, folded(model), IMAGES)
    assert as_module.passed, "a module is judged in eval mode, whatever mode it is in"
    assert all(module.training for module in model.modules())
    as_callable = verify(lambda x: model(x), candidate, IMAGES)
    assert as_callable.passed, "both normalize with the batch"
    assert not verify(lambda x: model(x), folded(model), IMAGES).passed
    assert not verify(folded(model), candidate, IMAGES).passed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_catches_values_that_are_not_finite(value, side):
    def spoiled(x: Tensor) -> Tensor:
        y = 2.0 * x
        y[0, 0, 0, 0] = value
        return y

    def whole(x: Tensor) -> Tensor:
        return 2.0 * x

    pair = (spoiled, whole) if side == "reference" else (whole, spoiled)
    evidence = verify(*pair, IMAGES, tolerance=1e9)
    assert not evidence.passed
    assert any(side in problem and "NaN" in problem for problem in evidence.problems)
    assert evidence.relative == float("inf")


def test_the_same_infinity_on_both_sides_fails_too():
    evidence = verify(lambda x: x / 0.0, lambda x: x / 0.0, IMAGES)
    assert len(evidence.problems) == 2


def test_catches_arithmetic_in_a_coarser_dtype():
    model = net()
    half = copy.deepcopy(model).half().eval()
    evidence = verify(model, lambda x: half(x.half()).float(), IMAGES)
    assert evidence.dtype == "float32"
    assert not evidence.passed
    assert verify(model, half, IMAGES).passed, "as a float16 model the same arithmetic is all right"


def test_catches_another_shape():
    evidence = verify(lambda x: x, lambda x: x[..., 1:], IMAGES)
    assert not evidence.passed
    assert "(3, 3, 12, 12)" in evidence.problems[0]
    assert "(3, 3, 12, 11)" in evidence.problems[0]
    with pytest.raises(EquivalenceError, match="shape"):
        evidence.raise_if_failed()


def test_shapes_that_would_broadcast_are_other_shapes():
    assert not verify(lambda x: x.mean((2, 3), keepdim=True), lambda x: x.mean((2, 3)), IMAGES).passed


def test_catches_a_mistake_in_the_last_batch_only():
    def candidate(x: Tensor) -> Tensor:
        return x if x.shape[-1] == 12 else x + 1e-3

    assert verify(lambda x: x, candidate, IMAGES[:1]).passed
    assert not verify(lambda x: x, candidate, IMAGES).passed


def test_nothing_returned_is_nothing_proved():
    evidence = verify(lambda x: x[:, :0], lambda x: x[:, :0], IMAGES)
    assert evidence.problems == ("the reference returned no values",)


# The figures


def test_errors_by_hand_over_two_batches():
    batches = [torch.tensor([[1.0, -2.0]]), torch.tensor([[8.0, 4.0]])]

    def candidate(x: Tensor) -> Tensor:
        return 2.0 * x + torch.tensor([[0.5, 0.0]])

    evidence = verify(lambda x: 2.0 * x, candidate, batches, tolerance=0.03125)
    assert evidence.absolute == 0.5
    assert evidence.relative == 0.5 / 16.0
    assert evidence.passed
    assert evidence.tolerance_origin == "given by the caller"
    assert not verify(lambda x: 2.0 * x, candidate, batches, tolerance=0.0312).passed


def test_a_reference_of_zeros():
    x = torch.ones(2, 3)
    assert verify(torch.zeros_like, torch.zeros_like, x).relative == 0.0
    evidence = verify(torch.zeros_like, lambda x: 1e-30 * x, x)
    assert evidence.relative == float("inf")
    assert evidence.absolute == pytest.approx(1e-30)
    assert not evidence.passed


def test_the_tolerance_follows_the_error_of_the_reference():
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


def test_a_callable_reference_runs_as_given_and_the_evidence_says_so():
    model = net().eval()
    evidence = verify(lambda x: model(x), folded(model), IMAGES)
    assert evidence.passed
    assert evidence.reference_error is None
    assert evidence.fold_error is not None
    assert evidence.layers == ()
    assert "as given" in evidence.reference_run
    assert "float32" in evidence.reference_run
    assert "deep copy" in verify(model, folded(model), IMAGES).reference_run


def test_a_callable_gets_the_dtype_that_the_caller_passed():
    seen = []

    def reference(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x.float()

    verify(reference, nn.Conv2d(1, 1, 1).half(), torch.ones(1, 1, 2, 2), tolerance=1e9)
    assert seen == [torch.float32]


def test_agreement_counts_and_shows_how_near_a_tie_was():
    logits = torch.tensor([[3.0, 1.0], [1.0, 1.0 + 1e-7], [0.0, 2.0]])

    def candidate(x: Tensor) -> Tensor:
        return x + torch.tensor([[0.0, 0.0], [2e-7, 0.0], [0.0, 0.0]])

    evidence = verify(lambda x: x, candidate, logits)
    assert (evidence.agreement.agreed, evidence.agreement.total) == (2, 3)
    assert 0.0 < evidence.agreement.widest_margin <= 2 * evidence.absolute
    assert evidence.passed, "a tie within the error decides nothing"


@pytest.mark.parametrize("shape", [(4, 1), (4,), (4, 3, 2)])
def test_no_agreement_without_classes(shape):
    assert verify(lambda x: x, lambda x: x, torch.ones(shape)).agreement is None


def test_inputs_are_not_written_to():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(1, 1, 1))
    x = torch.full((2, 1, 3, 3), -1.0)
    verify(model, copy.deepcopy(model), x)
    torch.testing.assert_close(x, torch.full((2, 1, 3, 3), -1.0), rtol=0, atol=0)


def test_integer_inputs_stay_integers():
    reference = nn.Embedding(5, 3)
    assert verify(reference, copy.deepcopy(reference), torch.tensor([[0, 4, 2]])).passed


# What cannot be judged


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ([], "nothing to verify on"),
        (torch.zeros(0, 3), "holds no sample"),
        (torch.tensor(1.0), "holds no sample"),
        ([torch.ones(1), "x"], "not a str"),
        (torch.tensor([float("nan")]), "rounded to float32"),
    ],
)
def test_inputs_that_make_no_sense(inputs, text):
    with pytest.raises(UsageError, match=text):
        verify(lambda x: x, lambda x: x, inputs)


def test_inputs_that_overflow_in_the_dtype_of_the_candidate():
    conv = nn.Conv2d(1, 1, 1)
    with pytest.raises(UsageError, match="rounded to float16"):
        verify(conv, copy.deepcopy(conv).half(), torch.full((1, 1, 2, 2), 1e6))


@pytest.mark.parametrize("tolerance", [-1e-9, float("nan"), float("inf")])
def test_tolerances_that_make_no_sense(tolerance):
    with pytest.raises(UsageError, match="tolerance"):
        verify(lambda x: x, lambda x: x, torch.ones(1), tolerance=tolerance)


@pytest.mark.parametrize("output", [(torch.ones(1),), None, torch.ones(1, dtype=torch.int64)])
def test_outputs_that_cannot_be_compared(output):
    with pytest.raises(UsageError, match="the candidate returned"):
        verify(lambda x: x, lambda x: output, torch.ones(1))
    with pytest.raises(UsageError, match="the reference returned"):
        verify(lambda x: output, lambda x: x, torch.ones(1))


def test_a_dtype_without_a_tolerance():
    candidate = nn.Module()
    candidate.weight = nn.Parameter(torch.zeros(1).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UsageError, match="float8_e4m3fn"):
        verify(lambda x: x, candidate, torch.ones(1))


def test_a_reference_that_cannot_run_in_float64():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.ones(2, 2)  # no buffer: a cast does not reach it

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    reference = Fixed()
    with pytest.raises(UsageError, match="cannot run in float64"):
        verify(reference, lambda x: x @ reference.weight, torch.ones(1, 2))
    assert verify(lambda x: reference(x), lambda x: x @ reference.weight, torch.ones(1, 2)).passed


def test_a_candidate_that_cannot_run_in_float64_is_judged_and_the_gap_is_noted():
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

import ast
import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.errors import UsageError
from repvgg.measure import Counts, count, ops, walk
from repvgg.measure.ops import RULES, ZERO_MAC_OPS, _output_on_meta
from tests.measure.networks import Call


def macs_and_muls(model: nn.Module, *shapes: tuple[int, ...], device: str = "meta") -> tuple[int, int]:
    done = walk(model.to(device), [torch.ones(shape, device=device) for shape in shapes])
    assert done.unknown == ()
    return done.macs, done.muls()


# Convolutions: (module, input shape, multiply-adds as a product, whether Winograd applies)
CONVOLUTIONS = {
    "3x3": (nn.Conv2d(4, 6, 3, padding=1), (1, 4, 8, 8), 6 * 64 * 4 * 9, True),
    "3x3 without padding": (nn.Conv2d(4, 6, 3), (1, 4, 8, 8), 6 * 36 * 4 * 9, True),
    "3x3 on three images": (nn.Conv2d(4, 6, 3, padding=1), (3, 4, 8, 8), 3 * 6 * 64 * 4 * 9, True),
    "3x3 grouped": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (1, 4, 8, 8), 6 * 64 * 2 * 9, True),
    "3x3 depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (1, 4, 8, 8), 4 * 64 * 9, True),
    "3x3 of stride 2": (nn.Conv2d(4, 6, 3, 2, 1), (1, 4, 8, 8), 6 * 16 * 4 * 9, False),
    "3x3 of stride 1, 2": (nn.Conv2d(4, 6, 3, (1, 2), 1), (1, 4, 8, 8), 6 * 32 * 4 * 9, False),
    "3x3 dilated": (nn.Conv2d(4, 6, 3, padding=2, dilation=2), (1, 4, 8, 8), 6 * 64 * 4 * 9, False),
    "3x3 'same'": (nn.Conv2d(4, 6, 3, padding="same"), (1, 4, 8, 8), 6 * 64 * 4 * 9, True),
    "3x3 reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (1, 4, 8, 8), 6 * 64 * 4 * 9, True),
    "1x1": (nn.Conv2d(4, 6, 1), (1, 4, 8, 8), 6 * 64 * 4, False),
    "1x3": (nn.Conv2d(4, 6, (1, 3), padding=(0, 1)), (1, 4, 8, 8), 6 * 64 * 4 * 3, False),
    "5x5": (nn.Conv2d(4, 6, 5, padding=2), (1, 4, 8, 8), 6 * 64 * 4 * 25, False),
    "1-D": (nn.Conv1d(4, 6, 3, padding=1), (1, 4, 8), 6 * 8 * 4 * 3, False),
    "3-D": (nn.Conv3d(4, 6, 3, padding=1), (1, 4, 4, 4, 4), 6 * 64 * 4 * 27, False),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), (1, 4, 8, 8), 4 * 64 * 6 * 9, False),
    "transposed, grouped, stride 2": (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (1, 4, 8, 8), 4 * 64 * 3 * 9, False),
}


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_by_hand(name, device):
    module, shape, macs, winograd = CONVOLUTIONS[name]
    assert macs_and_muls(copy.deepcopy(module), shape, device=device) == (macs, macs * 4 // 9 if winograd else macs)


PRODUCTS = {
    "linear": (nn.Linear(5, 7), [(3, 5)], 3 * 5 * 7),
    "linear without bias": (nn.Linear(5, 7, bias=False), [(3, 5)], 3 * 5 * 7),
    "linear on a sequence": (nn.Linear(5, 7), [(2, 3, 5)], 2 * 3 * 5 * 7),
    "mm": (Call(torch.mm), [(2, 3), (3, 4)], 24),
    "addmm": (Call(torch.addmm), [(4,), (2, 3), (3, 4)], 24),
    "bmm": (Call(torch.bmm), [(5, 2, 3), (5, 3, 4)], 120),
    "baddbmm": (Call(torch.baddbmm), [(5, 2, 4), (5, 2, 3), (5, 3, 4)], 120),
    "addbmm": (Call(torch.addbmm), [(2, 4), (5, 2, 3), (5, 3, 4)], 120),
    "matmul": (Call(torch.matmul), [(5, 2, 3), (3, 4)], 120),
    "einsum": (Call(lambda a, b: torch.einsum("bij,bkj->bik", a, b)), [(5, 2, 3), (5, 4, 3)], 120),
    "mv": (Call(torch.mv), [(2, 3), (3,)], 6),
    "addmv": (Call(torch.addmv), [(2,), (2, 3), (3,)], 6),
    "dot": (Call(torch.dot), [(7,), (7,)], 7),
    "attention": (
        Call(F.scaled_dot_product_attention),
        [(2, 4, 8, 16), (2, 4, 9, 16), (2, 4, 9, 16)],
        2 * 8 * 8 * 9 * 16,
    ),
}


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_matrix_products_by_hand(name, device):
    module, shapes, macs = PRODUCTS[name]
    assert macs_and_muls(copy.deepcopy(module), *shapes, device=device) == (macs, macs)


def test_layers_without_products_are_known_and_count_nothing():
    layers = nn.Sequential(
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Hardswish(),
        nn.PReLU(),
        nn.Dropout(0.5),
        nn.ReflectionPad2d(1),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.PixelShuffle(2),
        nn.AdaptiveAvgPool2d(3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(1),
        nn.Softmax(1),
    )
    for device in ("cpu", "meta"):
        assert macs_and_muls(layers, (1, 4, 8, 8), device=device) == (0, 0)


def test_op_without_a_rule_is_unknown_and_not_zero():
    done = walk(Call(lambda x: torch.cdist(x, x) @ x), torch.ones(3, 3))
    assert done.unknown == ("aten._cdist_forward",)
    assert done.macs == 27
    assert [op.work for op in done.ops if op.name == "aten._cdist_forward"] == [None]
    assert walk(Call(torch.fft.fft2), torch.ones(4, 4)).unknown != ()


def test_ops_have_their_shapes_in_order():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    ops = walk(model, torch.ones(1, 3, 8, 8)).ops
    assert [op.name for op in ops] == ["aten.convolution", "aten.relu"]
    assert ops[0].inputs == ((1, 3, 8, 8), (4, 3, 3, 3), (4,))
    assert ops[0].outputs == ((1, 4, 6, 6),)
    assert ops[1].macs == ops[1].muls() == 0


def test_layer_called_twice_counts_twice():
    conv = nn.Conv2d(4, 4, 1)
    assert macs_and_muls(nn.Sequential(conv, conv), (1, 4, 2, 2)) == (2 * 64, 2 * 64)


def test_counts_are_the_same_in_inference_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Flatten(), nn.Linear(4 * 64, 5))
    x = torch.ones(1, 3, 8, 8)
    outside = walk(model, x)
    with torch.inference_mode():
        inside = walk(model, x)
    assert (inside.macs, inside.muls(), inside.unknown) == (outside.macs, outside.muls(), ())
    assert inside.macs == 4 * 64 * 27 + 4 * 64 * 5


def test_model_runs_in_eval_mode_and_is_restored_after_an_error():
    def failing(x: Tensor) -> Tensor:
        seen.append(([module.training for module in model.modules()], torch.is_grad_enabled()))
        raise ZeroDivisionError

    seen = []
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3)), Call(failing))
    model[0].eval()
    before = [module.training for module in model.modules()]
    assert before == [True, False, False, True]
    with pytest.raises(ZeroDivisionError):
        walk(model, torch.ones(1, 3, 2, 2))
    assert seen == [([False] * 4, False)]
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_count_leaves_a_model_on_the_cpu_unchanged():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Dropout()).half()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    counts = count(model, (8, 3, 16, 16))
    assert counts == Counts(params=4 * 27 + 8, macs=4 * 256 * 27, winograd_muls=4 * 256 * 12)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)
    assert model.training
    assert counts == count(copy.deepcopy(model).to("meta"), (1, 3, 16, 16))


def test_shared_parameters_count_once_and_buffers_do_not():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert count(model, (1, 4)).params == 16 + 4 + 8 + 4


def test_counts_as_text_and_json():
    counts = Counts(8309384, 1361000000, 747000000, ("aten._cdist_forward",))
    assert str(counts).startswith("8,309,384 parameters, 1.361 GMACs, 0.747 Wino GMULs")
    assert "not counted: aten._cdist_forward" in str(counts)
    assert counts.to_dict()["unknown"] == ["aten._cdist_forward"]


@pytest.mark.parametrize("shape", [(3,), (), (1, 0, 4), (1, 3, -1, 4)])
def test_invalid_shapes_are_refused(shape):
    with pytest.raises(UsageError):
        count(nn.ReLU(), shape)


@pytest.mark.parametrize("inputs", [[], [3]])
def test_invalid_inputs_are_refused(inputs):
    with pytest.raises(UsageError):
        walk(nn.ReLU(), inputs)


def test_rules_are_disjoint_and_name_existing_ops():
    assert not ZERO_MAC_OPS & RULES.keys()
    for name in ZERO_MAC_OPS | RULES.keys():
        assert hasattr(torch.ops.aten, name.removeprefix("aten.")), name


def test_package_imports_only_torch_and_the_standard_library():
    for path in sorted(Path(ops.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                allowed = name.startswith(("repvgg.measure", "repvgg.errors", "repvgg._"))
                assert allowed or name.partition(".")[0] in {"torch", *sys.stdlib_module_names}, f"{path.name}: {name}"


META = torch.zeros(2, 8, 7, 9, device="meta")
STATISTICS = [torch.ones(8, device="meta") for _ in range(4)]
ATEN = torch.ops.aten


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("op", "args"),
    [
        *((getattr(ATEN, name).default, ()) for name in ("relu", "silu", "gelu", "hardswish", "hardsigmoid")),
        *((getattr(ATEN, name).default, ()) for name in ("relu_", "silu_", "hardswish_", "hardsigmoid_", "hardtanh_")),
        (ATEN.hardtanh.default, (0.0, 6.0)),
        (ATEN.upsample_bilinear2d.default, ([13, 20], True)),
        (ATEN.native_batch_norm.default, (*STATISTICS, False, 0.1, 1e-5)),
    ],
    ids=lambda value: str(value) if isinstance(value, torch._ops.OpOverload) else "",
)
def test_outputs_on_meta_are_those_of_pytorch(op, args, dtype):
    """Shapes, strides and dtypes, for both orders of the channels in memory; and in place where the op is."""
    for x in (META.to(dtype), META.to(dtype).to(memory_format=torch.channels_last)):
        given = [one.to(dtype) if isinstance(one, torch.Tensor) else one for one in args]
        found = _output_on_meta(op, (x, *given))
        if not x.is_contiguous():
            assert found is None
            continue
        wanted = op(x, *given)
        found, wanted = ([one] if isinstance(one, torch.Tensor) else one for one in (found, wanted))
        assert [(y.shape, y.stride(), y.dtype) for y in found] == [(y.shape, y.stride(), y.dtype) for y in wanted]
        assert (found[0] is x) == (wanted[0] is x)


def test_wrong_statistics_and_training_on_meta_are_left_to_pytorch():
    right = (*STATISTICS, False, 0.1, 1e-5)
    assert _output_on_meta(ATEN.native_batch_norm.default, (META, *right)) is not None
    assert _output_on_meta(ATEN.native_batch_norm.default, (META[:, :7].contiguous(), *right)) is None
    assert _output_on_meta(ATEN.native_batch_norm.default, (META, *STATISTICS, True, 0.1, 1e-5)) is None

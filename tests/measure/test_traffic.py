"""Memory traffic of each kind of op against values computed manually; unknown ops are listed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repvgg.measure import profile, traffic, walk
from tests.measure.networks import Call

X = (2, 4, 6, 6)
N = 2 * 4 * 6 * 6  # values of X

# name: (function, input shapes, bytes read, bytes written), in float32
TRAFFIC = {
    "views": (lambda x: x.view(2, -1).t()[1:].unsqueeze(0).expand(3, -1, -1), [X], 0, 0),
    "relu": (torch.relu, [X], 4 * N, 4 * N),
    "relu in place": (torch.relu_, [X], 4 * N, 4 * N),
    "add": (torch.add, [X, X], 8 * N, 4 * N),
    "a tensor and itself": (lambda x: x * x, [X], 4 * N, 4 * N),
    "a number": (lambda x: x * 2, [X], 4 * N, 4 * N),
    "an expanded tensor": (lambda x, y: x + y.expand(X), [X, (4, 1, 1)], 4 * N + 16, 4 * N),
    "a slice": (lambda x: x[:, :1].relu(), [X], N, N),
    "cat": (lambda x, y: torch.cat([x, y], 1), [X, X], 8 * N, 8 * N),
    "a copy": (lambda x: x.clone(), [X], 4 * N, 4 * N),
    "another dtype": (lambda x: x.double(), [X], 4 * N, 8 * N),
    "contiguous already": (lambda x: x.contiguous(), [X], 0, 0),
    "contiguous of a transposed tensor": (lambda x: x.transpose(1, 2).contiguous(), [X], 4 * N, 4 * N),
    "zeros": (torch.zeros_like, [X], 0, 4 * N),
    "empty": (torch.empty_like, [X], 0, 0),
    "fill": (lambda x: x.fill_(1.0), [X], 0, 4 * N),
    "copy into": (lambda x, y: x.copy_(y), [X, (1, 1, 6, 6)], 4 * 36, 4 * N),
    "out argument": (lambda x, y: torch.add(x, 1.0, out=y), [X, X], 4 * N, 4 * N),
    "mean": (lambda x: x.mean((2, 3)), [X], 4 * N, 4 * 8),
    "average pool": (lambda x: F.avg_pool2d(x, 2), [X], 4 * N, N),
    "max pool, with its indices": (lambda x: F.max_pool2d(x, 2), [X], 4 * N, N + 2 * N),
    "upsample": (lambda x: F.interpolate(x, scale_factor=2), [X], 4 * N, 16 * N),
    "pad": (lambda x: F.pad(x, (1, 1, 1, 1)), [X], 4 * N, 4 * 2 * 4 * 64),
    "softmax": (lambda x: x.softmax(1), [X], 4 * N, 4 * N),
    "rows of a table": (lambda t, i: F.embedding(i.long(), t), [(100, 8), (3,)], 12 + 24 + 96, 24 + 96),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", TRAFFIC)
def test_traffic_by_hand(name, device):
    function, shapes, read, written = TRAFFIC[name]
    total = profile(Call(function), [torch.ones(shape, device=device) for shape in shapes]).total
    assert total.unknown_traffic == ()
    assert (total.bytes_read, total.bytes_written) == (read, written)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_read_their_weights(device):
    layers = {
        nn.BatchNorm2d(4): 4 * N + 4 * 4 * 4,
        nn.Conv2d(4, 4, 1, bias=False): 4 * N + 4 * 16,
        nn.PReLU(4): 4 * N + 16,
    }
    for layer, read in layers.items():
        total = profile(layer.to(device), torch.ones(X, device=device)).total
        assert (total.bytes_read, total.bytes_written) == (read, 4 * N)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 2), (torch.bfloat16, 2), (torch.float64, 8)])
def test_bytes_follow_the_dtype(dtype, size):
    model = nn.Conv2d(4, 4, 1, device="meta", dtype=dtype)
    total = profile(model, torch.empty(X, device="meta", dtype=dtype)).total
    assert (total.bytes_read, total.bytes_written) == (size * (N + 20), size * N)
    assert total.peak_bytes == 2 * size * N


def test_op_with_data_dependent_traffic_is_unknown_in_traffic_only():
    def scattered(x):
        x = x.clone()
        x[torch.tensor([0, 1])] = torch.ones(4)
        return x

    done = walk(Call(scattered), torch.ones(4, 4))
    assert done.unknown == ()
    assert done.unknown_traffic == ("aten.index_put_",)
    assert [op.traffic for op in done.ops if op.name == "aten.index_put_"] == [None]
    total = profile(Call(scattered), torch.ones(4, 4)).total
    assert total.bytes_moved >= 2 * 64
    assert total.intensity is None


def test_op_without_a_rule_is_unknown_in_both():
    done = walk(Call(lambda x: torch.cdist(x, x)), torch.ones(3, 3))
    assert done.unknown == done.unknown_traffic == ("aten._cdist_forward",)


def test_traffic_of_sparse_tensors_is_unknown():
    done = walk(Call(lambda x: x.to_sparse() * 2), torch.eye(3))
    assert done.unknown_traffic


def test_lists_are_disjoint_and_name_existing_ops():
    lists = [
        traffic._MOVES_NOTHING,
        traffic._WRITES_ONLY,
        traffic._OVERWRITES_FIRST,
        traffic._GATHERS,
        traffic._DATA_DEPENDENT,
    ]
    names = [name for group in lists for name in group]
    assert len(names) == len(set(names))
    for name in names:
        assert hasattr(torch.ops.aten, name.removeprefix("aten.")), name

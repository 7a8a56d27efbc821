"""Blocks run as written wherever the steps inside them can be observed; and the switch for the compiled passes."""

import copy
import logging
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from repvgg import create_model, is_plain, reparameterize
from repvgg.blocks import BranchSum, RepVGGBlock, fused, rep_conv, training_kernels
from repvgg.blocks._cpu import build as build_module
from repvgg.blocks._cpu.build import build
from repvgg.errors import MissingDependencyError, UsageError
from tests.blocks.helpers import images, is_fused, randomize_norms, training_step

X = images(6, dtype=torch.float32)


def block():
    torch.manual_seed(0)
    return randomize_norms(RepVGGBlock(rep_conv(6, 6), nn.ReLU()))


@pytest.mark.usefixtures("compiled")
def test_block_in_training_mode_is_fused():
    assert is_fused(block()(X))
    assert "are loaded" in fused.status()


@pytest.mark.parametrize(
    "path", ["conv.dense", "conv.dense.bn", "conv.identity", "act", "conv", "conv.pointwise.conv", "conv.dense.conv"]
)
def test_hooks_see_the_same_outputs(path):
    def hook_outputs(module, kernels):
        outputs = []
        module.get_submodule(path).register_forward_hook(lambda _, inputs, out: outputs.append(out.detach()))
        with training_kernels(kernels):
            module(X)
        return outputs

    for got, wanted in zip(hook_outputs(block(), "auto"), hook_outputs(block(), "eager"), strict=True):
        assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert len(hook_outputs(block(), "auto")) == 1


def test_global_hooks_are_called():
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(type(module)))
    try:
        block()(X)
    finally:
        handle.remove()
    assert called.count(nn.BatchNorm2d) == 3
    assert nn.ReLU in called


def test_unsupported_branches_run_as_written():
    class Norm(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    for norm in (Norm(6), nn.InstanceNorm2d(6), nn.BatchNorm2d(6).eval(), nn.Identity()):
        module = BranchSum({"a": nn.BatchNorm2d(6), "b": norm})
        assert not is_fused(module(X))
        assert_close(module(X), module["a"](X) + norm(X))


def test_synchronized_norms_run_as_written():
    module = nn.SyncBatchNorm.convert_sync_batchnorm(block())
    assert isinstance(module.conv["identity"], nn.SyncBatchNorm)
    assert_close(module(X), block()(X), rtol=1e-4, atol=1e-4)
    assert not is_fused(module(X))


@pytest.mark.usefixtures("compiled")
def test_parametrized_kernels_get_their_gradients():
    module = block().double()
    parametrizations.weight_norm(module.conv["dense"].conv)
    x = X.double()
    fused, plain = training_step(module, x), training_step(module, x, "eager")
    assert any("original0" in name for name in fused)
    for name, value in plain.items():
        assert_close(fused[name], value, rtol=1e-9, atol=1e-10)


def test_eval_mode_and_collapse_are_unaffected():
    module = block()
    module(X)
    out = module.eval()(X)
    assert not is_fused(out)
    plain, _ = reparameterize(module)
    assert is_plain(plain)
    assert_close(plain(X), out, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:FutureWarning"
)  # raised inside torch's forward-mode AD
def test_tracers_and_function_transforms_see_the_definition():
    module = block()
    graph = fx.symbolic_trace(module.train())
    assert_close(graph(X), copy.deepcopy(module)(X), rtol=1e-5, atol=1e-5)
    parts = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert [str(node.target) for node in parts][-2:] == ["conv.identity", "act"]
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.track_running_stats, part.running_mean, part.running_var, part.num_batches_tracked = (
                False,
                *[None] * 3,
            )
    weights = dict(module.named_parameters())
    got = torch.func.grad(lambda w: torch.func.functional_call(module, w, (X,)).square().sum())(weights)
    module(X).square().sum().backward()
    for name, value in weights.items():
        assert_close(got[name], value.grad, rtol=1e-3, atol=1e-3)
    module, x = module.double(), X.double()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x).index_fill_(3, torch.tensor([0]), 0.0))
        out, tangent = torch.autograd.forward_ad.unpack_dual(module(dual))
    moved = 1e-6 * torch.ones_like(x).index_fill_(3, torch.tensor([0]), 0.0)
    assert_close(tangent.detach(), (module(x + moved) - out).detach() / 1e-6, rtol=1e-2, atol=1e-4)


def test_float16_and_mixed_dtypes_run_as_written():
    assert not is_fused(randomize_norms(RepVGGBlock(rep_conv(6, 6), nn.ReLU())).half()(X.half()))
    module = block()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(X)  # float32 identity, bfloat16 convolutions
    assert not is_fused(out)
    assert out.dtype == torch.float32


def test_one_value_per_channel_raises_the_usual_error():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block()(torch.randn(1, 6, 1, 1))


def test_wrong_channels_raise_the_usual_error():
    with pytest.raises(RuntimeError, match="channels"):
        block()(torch.randn(2, 5, 4, 4))


@pytest.mark.usefixtures("compiled")
def test_activation_checkpointing_gives_the_same_gradients():
    module = block().double()
    module.conv["identity"].momentum = 0.0
    x = X.double().requires_grad_()
    (first,) = torch.autograd.grad(module(x).square().sum(), x)
    (second,) = torch.autograd.grad(checkpoint(module, x, use_reentrant=False).square().sum(), x)
    assert_close(first, second, rtol=0, atol=0)


@pytest.mark.usefixtures("compiled")
def test_copies_and_pickles_train_equally():
    module = block()
    wanted = training_step(module, X)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for name, value in training_step(other, X).items():
            assert_close(value, wanted[name], rtol=0, atol=0)
    assert list(module.state_dict()) == list(new_block().state_dict())


def new_block():
    return RepVGGBlock(rep_conv(6, 6), nn.ReLU())


def test_training_kernels_switch():
    with training_kernels("eager"):
        assert not is_fused(block()(X))
    with pytest.raises(UsageError, match="auto, eager, compiled, not 'fast'"), training_kernels("fast"):
        pass


def test_without_a_compiler(monkeypatch, tmp_path, caplog):
    """PyTorch's own functions are used, and one log message says so."""
    monkeypatch.setenv("REPVGG_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    build.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "repvgg"):
            first, second = block()(X), block()(X)
        assert not is_fused(first)
        assert_close(first, second)
        assert [record.message for record in caplog.records] == [fused.status()]
        assert "could not be built" in fused.status()
        with pytest.raises(MissingDependencyError, match="could not be built"), training_kernels("compiled"):
            pass
        assert list((tmp_path / "training").iterdir()) == []
    finally:
        monkeypatch.undo()
        build.cache_clear()


PLANTED = {
    "a bare library": lambda path: path.write_bytes(b"\x7fELF of a stranger"),
    "cut in the middle": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link": lambda path: (path.rename(path.with_suffix(".old")), path.symlink_to(path.with_suffix(".old"))),
    "writable by others": lambda path: path.chmod(0o666),
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.timeout(30)
def test_libraries_that_others_could_have_planted_are_compiled_again(name, monkeypatch, tmp_path):
    monkeypatch.setenv("REPVGG_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "c++")
    compiled = []
    monkeypatch.setattr(build_module, "_compile", lambda compiler: compiled.append(compiler) or b"\x7fELF a library")
    assert build_module._library() == build_module._library() == b"\x7fELF a library"
    assert len(compiled) == 1
    (path,) = (tmp_path / "training").glob("*.so")
    PLANTED[name](path)
    compiled.clear()
    assert build_module._library() == build_module._library() == b"\x7fELF a library"
    assert compiled == ["c++"]


def test_without_a_folder_for_programs(monkeypatch, tmp_path):
    """Where the folder for temporary files is mounted noexec, the library is loaded from the cache folder."""
    monkeypatch.setenv("REPVGG_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setattr(build_module, "_compile", lambda compiler: b"\x7fELF a library")
    content = build_module._library()
    tried = []

    def noexec(path):
        tried.append(Path(path))
        if tmp_path not in tried[-1].parents:
            raise OSError("failed to map segment from shared object")
        return tried[-1].read_bytes()

    monkeypatch.setattr(build_module.ctypes, "CDLL", noexec)
    assert build_module._load(content) == content
    assert len(tried) == 2
    assert [path.suffix for path in (tmp_path / "training").iterdir()] == [".so"]


@pytest.mark.slow
def test_torch_compile_trains_the_same():
    model = randomize_norms(create_model("repvgg_t0", num_classes=5))
    other = copy.deepcopy(model)
    x = images(3, (32, 32), count=4, dtype=torch.float32)
    torch.compile(model)(x).square().sum().backward()
    other(x).square().sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(one.grad, two.grad, rtol=2e-2, atol=2e-2)

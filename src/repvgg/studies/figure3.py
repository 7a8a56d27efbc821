"""Figure 3 of the paper: the feature maps that a residual block and a plain one hold at their peak.

    repvgg study figure3

While a layer runs, its input and its output are there: in a plain chain nothing else. A residual block keeps its input
until the addition, so that while its second layer runs there are three maps. Beside the map that is being written that
is 1 and 2 times the input, which is what the paper draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from repvgg.blocks import rep_conv
from repvgg.errors import first_line
from repvgg.measure import RunSettings, catch_out_of_memory, held_memory
from repvgg.measure.memory import gpu_peak_bytes
from repvgg.studies.candidates import deployed
from repvgg.studies.cells import Cell, Cells
from repvgg.studies.networks import check_counts, title_of
from repvgg.studies.report.charts import Bar, Chart, draw_bars
from repvgg.studies.report.formatting import quantity
from repvgg.studies.speeds import OUT_OF_MEMORY
from repvgg.studies.study import OnProgress, Outcome, Study
from repvgg.studies.tables import Column, Table, Value

_BATCH = {"cpu": 8, "cuda": 128}
_LAYOUTS = ("channels_last", "contiguous")
_NETWORKS = ("repvgg_a0", "resnet18", "repvgg_a2", "resnet50")


@dataclass(frozen=True)
class MemorySettings:
    """What may be chosen.

    Attributes:
        setting: where, and in which numbers.
        batch: images; without it 8 on a CPU and 128 on a GPU.
        channels: of the feature maps of a block.
        size: height and width of these.
        input_size: height and width of the images of whole networks.

    Raises:
        UsageError: a number below 1.
    """

    setting: RunSettings = field(default_factory=RunSettings)
    batch: int | None = None
    channels: int = 64
    size: int = 56
    input_size: int = 224

    def __post_init__(self) -> None:
        check_counts(batch=self.batch, channels=self.channels, size=self.size, input_size=self.input_size)


class _Chain(nn.Module):
    """Layers one after the other, each input let go of as soon as the layer is done with it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, shape: torch.Size, like: Tensor, layout: torch.memory_format) -> Tensor:
        x = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout).fill_(1.0)
        for layer in self.layers:
            x = layer(x)
        return x


class _Residual(nn.Module):
    """``y = x + f(x)`` with two convolutions, as in ResNet-18."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = _conv(channels), _conv(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu_(self.first(x)))
        out += x
        return out


def _conv(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1)


def _plain(channels: int) -> nn.Module:
    return _Chain(_conv(channels), nn.ReLU(inplace=True), _conv(channels))


def _residual(channels: int) -> nn.Module:
    return _Chain(_Residual(channels))


def _train_form(channels: int) -> nn.Module:
    return _Chain(rep_conv(channels, channels))


@dataclass(frozen=True)
class _Block:
    """A row: how it is built, and how many maps like its input it holds beside the one that is being written."""

    name: str
    title: str
    build: Callable[[int], nn.Module]
    extra: int | None


_BLOCKS = (
    _Block("residual", "residual block", _residual, 2),
    _Block("plain", "plain chain of two", _plain, 1),
    _Block("train-form", "RepVGG block, train form", _train_form, None),
)


def _resolve(settings: MemorySettings) -> MemorySettings:
    return replace(settings, batch=settings.batch or _BATCH[settings.setting.device])


def _measure(settings: MemorySettings, cells: Cells, on_progress: OnProgress) -> None:
    blocks = [(block, layout) for block in _BLOCKS for layout in _LAYOUTS]
    jobs = {_key(block, layout): partial(_peak_of_block, block, layout, settings) for block, layout in blocks}
    jobs |= {f"network-{name}": partial(_peak_of_network, name, settings) for name in _NETWORKS}
    for index, (key, job) in enumerate(jobs.items(), start=1):
        if key not in cells:
            cells.put(key, _peak(job))
        on_progress(index, len(jobs))


def _key(block: _Block, layout: str) -> str:
    return f"block-{block.name}-{layout}"


def _peak(job: Callable[[], int]) -> Cell:
    cell: dict[str, int | str] = {}
    with catch_out_of_memory("", lambda _, error: cell.update(reason=first_line(error))):
        cell["bytes"] = job()
    return cell


def _peak_of_block(block: _Block, layout: str, settings: MemorySettings) -> int:
    setting = replace(settings.setting, channels_last=layout == "channels_last")
    model = setting.place(block.build(settings.channels))
    shape = torch.Size((settings.batch or 1, settings.channels, settings.size, settings.size))
    return _peak_of(partial(model, shape, next(model.parameters()), setting.memory_format), settings)


def _peak_of_network(name: str, settings: MemorySettings) -> int:
    setting = settings.setting
    images = setting.images(settings.batch or 1, (3, settings.input_size, settings.input_size))
    return _peak_of(partial(setting.place(deployed(name)), images), settings)


def _peak_of(call: Callable[[], object], settings: MemorySettings) -> int:
    with torch.inference_mode():
        call()
    if settings.setting.device == "cuda":
        return gpu_peak_bytes(call)
    return max((step.held for step in held_memory(call)), default=0)


def _map_bytes(settings: MemorySettings) -> int:
    batch = settings.batch or 1
    return batch * settings.channels * settings.size**2 * settings.setting.torch_dtype.itemsize


def _outcome(settings: MemorySettings, values: Mapping[str, Cell]) -> Outcome:
    tables = (_block_table(settings, values), _network_table(settings, values))
    return Outcome(_lead(settings, values), tables, (_picture(settings, values),))


def _lead(settings: MemorySettings, values: Mapping[str, Cell]) -> str:
    residual, plain = (_extra(block, "channels_last", settings, values) for block in _BLOCKS[:2])
    if residual is None or plain is None:
        return "The two blocks were not both measured."
    return (
        f"Beside the map that it writes, a residual block held {residual:.2f} times its input here (channels_last), "
        f"and a plain chain {plain:.2f} times; the paper draws 2 and 1."
    )


def _extra(block: _Block, layout: str, settings: MemorySettings, values: Mapping[str, Cell]) -> float | None:
    """Maps beside the one that is being written, in multiples of the input."""
    cell = values.get(_key(block, layout), {})
    return cell["bytes"] / _map_bytes(settings) - 1 if "bytes" in cell else None


def _megabytes(cell: Cell) -> Value:
    return cell["bytes"] / 1e6 if "bytes" in cell else OUT_OF_MEMORY if "reason" in cell else None


def _block_table(settings: MemorySettings, values: Mapping[str, Cell]) -> Table:
    columns = (
        Column("block", "Block"),
        Column("paper_extra", "Beside the map being written, paper (× input)", 0),
        *(Column(f"extra_{layout}", f"here, {layout} (× input)", 2) for layout in _LAYOUTS),
        *(Column(f"peak_megabytes_{layout}", f"peak here, {layout} (MB)", 2) for layout in _LAYOUTS),
        Column("input_megabytes", "Input (MB)", 2),
    )
    rows = tuple(
        (
            block.title,
            block.extra,
            *(_extra(block, layout, settings, values) for layout in _LAYOUTS),
            *(_megabytes(values.get(_key(block, layout), {})) for layout in _LAYOUTS),
            _map_bytes(settings) / 1e6,
        )
        for block in _BLOCKS
    )
    shape = f"{settings.batch} x {settings.channels} x {settings.size} x {settings.size}"
    notes = (
        f"Input {shape}. Convolutions 3x3, ReLU and addition in place. The peak is what PyTorch's allocator held: the "
        "weights in another order and, where maps are contiguous on a CPU, the input in another layout, which the "
        "library makes for itself, are in it; the paper leaves them out.",
    )
    return Table("figure3", "Blocks", columns, rows, notes)


def _network_table(settings: MemorySettings, values: Mapping[str, Cell]) -> Table:
    columns = (Column("model", "Model"), Column("peak_megabytes", "Peak beside weights and images (MB)", 1))
    rows = tuple((title_of(name), _megabytes(values.get(f"network-{name}", {}))) for name in _NETWORKS)
    images = quantity(settings.batch or 1, "image")
    notes = (f"{images}, {settings.input_size} x {settings.input_size}, in eager PyTorch as deployed.",)
    return Table("figure3-networks", "Whole networks", columns, rows, notes)


def _picture(settings: MemorySettings, values: Mapping[str, Cell]) -> Chart:
    bars = [Bar(block.title, _extra(block, "channels_last", settings, values), block.extra) for block in _BLOCKS]
    title = "Memory beside the map being written"
    draw = partial(draw_bars, title=title, unit="times the input of the block", bars=bars)
    return Chart("figure3", "Feature maps that each block holds at its peak, in multiples of its input", draw)


STUDY = Study(
    name="figure3",
    title="Figure 3: peak memory of residual and plain blocks",
    about=(
        "Each block runs once to warm up and once under PyTorch's memory profiler (CPU) or with the statistics of "
        "CUDA's allocator; the highest sum of what was allocated and not yet given back is its peak. While a layer "
        "runs, its input and output are there; a residual block keeps its input as well, until the addition. Blocks "
        "run in both layouts, whole networks in that of the setting."
    ),
    settings=MemorySettings,
    resolve=_resolve,
    measure=_measure,
    outcome=_outcome,
)

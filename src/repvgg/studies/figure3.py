"""Figure 3 of the paper: peak memory of the feature maps of a residual block and of a plain one.

    repvgg study figure3

While a layer runs, its input and its output are live; in a plain chain nothing else is. A residual block keeps its
input until the addition, so that three maps are live while its second layer runs. Without the map being written, that
is 1 and 2 times the input, as the paper draws it.
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
from repvgg.studies.base import OnProgress, Outcome, Study, check_positive
from repvgg.studies.candidates import deployed
from repvgg.studies.counts import title_of
from repvgg.studies.report.charts import Bar, Chart, draw_bars
from repvgg.studies.report.formatting import quantity
from repvgg.studies.store import Cell, CellStore
from repvgg.studies.tables import Column, Table, Value
from repvgg.studies.timing import OUT_OF_MEMORY

_BATCH = {"cpu": 8, "cuda": 128}
_LAYOUTS = ("channels_last", "contiguous")  # contiguous convolutions on a CPU copy their input to a blocked layout
_NETWORKS = ("repvgg_a0", "resnet18", "repvgg_a2", "resnet50")


@dataclass(frozen=True)
class MemorySettings:
    """Settings of Figure 3.

    Attributes:
        run: device, dtype, memory format and threads.
        batch: images; default: 8 on a CPU and 128 on a GPU.
        channels: of the feature maps of a block.
        size: height and width of the feature maps.
        input_size: height and width of the images of whole networks.

    Raises:
        UsageError: a number is below 1.
    """

    run: RunSettings = field(default_factory=RunSettings)
    batch: int | None = None
    channels: int = 64
    size: int = 56
    input_size: int = 224

    def __post_init__(self) -> None:
        check_positive(batch=self.batch, channels=self.channels, size=self.size, input_size=self.input_size)

    @property
    def map_bytes(self) -> int:
        """Memory of one feature map, N · C · H · W values."""
        return (self.batch or 1) * self.channels * self.size**2 * self.run.torch_dtype.itemsize


class _Chain(nn.Module):
    """A sequence of layers that creates its own input, so that no caller keeps it alive."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, shape: torch.Size, like: Tensor, memory_format: torch.memory_format) -> Tensor:
        x = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format).fill_(1.0)
        for layer in self.layers:
            x = layer(x)  # rebinding x drops the last reference to the input of the layer
        return x


class _Residual(nn.Module):
    """``y = x + f(x)`` with two convolutions, as in ResNet-18."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = _conv(channels), _conv(channels)

    def forward(self, x: Tensor) -> Tensor:
        # In place, as in a deployed block: otherwise ReLU and addition would each allocate a map.
        out: Tensor = self.second(torch.relu_(self.first(x)))
        out += x
        return out


def _conv(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1)


@dataclass(frozen=True)
class _Block:
    """A row: a name, how to build it for C channels, and the paper's number of maps without the one being written."""

    name: str
    title: str
    build: Callable[[int], nn.Module]
    extra: int | None


_BLOCKS = (
    _Block("residual", "residual block", lambda c: _Chain(_Residual(c)), 2),
    _Block("plain", "plain chain of two", lambda c: _Chain(_conv(c), nn.ReLU(inplace=True), _conv(c)), 1),
    # Not in the figure: why a network is converted before it is deployed.
    _Block("train-form", "RepVGG block, train form", lambda c: _Chain(rep_conv(c, c)), None),
)


def _resolve(settings: MemorySettings) -> MemorySettings:
    return replace(settings, batch=settings.batch or _BATCH[settings.run.device])


def _measure(settings: MemorySettings, store: CellStore, on_progress: OnProgress) -> None:
    jobs: dict[str, Callable[[], int]] = {
        _key(block, layout): partial(_peak_of_block, block, layout, settings)
        for block in _BLOCKS
        for layout in _LAYOUTS
    }
    jobs |= {f"network-{name}": partial(_peak_of_network, name, settings) for name in _NETWORKS}
    for index, (key, job) in enumerate(jobs.items(), start=1):
        if key not in store:
            cell: dict[str, int | str] = {}

            def record_failure(_: str, error: Exception, cell: dict[str, int | str] = cell) -> None:
                cell["reason"] = first_line(error)

            with catch_out_of_memory(key, record_failure):
                cell["bytes"] = job()
            store.put(key, cell)
        on_progress(index, len(jobs))


def _key(block: _Block, layout: str) -> str:
    return f"block-{block.name}-{layout}"


def _peak_of_block(block: _Block, layout: str, settings: MemorySettings) -> int:
    run = replace(settings.run, channels_last=layout == "channels_last")
    model = run.place(block.build(settings.channels))
    shape = torch.Size((settings.batch or 1, settings.channels, settings.size, settings.size))
    return _peak_bytes(partial(model, shape, next(model.parameters()), run.memory_format), settings)


def _peak_of_network(name: str, settings: MemorySettings) -> int:
    images = settings.run.images(settings.batch or 1, (3, settings.input_size, settings.input_size))
    return _peak_bytes(partial(settings.run.place(deployed(name)), images), settings)


def _peak_bytes(call: Callable[[], object], settings: MemorySettings) -> int:
    with torch.inference_mode():
        call()  # first, so that one-time allocations are not counted
    if settings.run.device == "cuda":
        return gpu_peak_bytes(call)
    return max((step.held for step in held_memory(call)), default=0)


def _outcome(settings: MemorySettings, values: Mapping[str, Cell]) -> Outcome:
    residual, plain = (_extra_maps(block, "channels_last", settings, values) for block in _BLOCKS[:2])
    lead = (
        "The two blocks were not both measured."
        if residual is None or plain is None
        else f"Besides the map being written, a residual block held {residual:.2f} times its input here "
        f"(channels_last), and a plain chain {plain:.2f} times; the paper draws 2 and 1."
    )
    bars = [Bar(block.title, _extra_maps(block, "channels_last", settings, values), block.extra) for block in _BLOCKS]
    title = "Memory besides the map being written"
    draw = partial(draw_bars, title=title, unit="times the input of the block", bars=bars)
    chart = Chart("figure3", "Feature maps that each block holds at its peak, in multiples of its input", draw)
    return Outcome(lead, (_block_table(settings, values), _network_table(settings, values)), (chart,))


def _extra_maps(block: _Block, layout: str, settings: MemorySettings, values: Mapping[str, Cell]) -> float | None:
    """Return the memory without the map being written, in multiples of the input."""
    cell = values.get(_key(block, layout), {})
    return cell["bytes"] / settings.map_bytes - 1 if "bytes" in cell else None


def _megabytes(cell: Cell) -> Value:
    return cell["bytes"] / 1e6 if "bytes" in cell else OUT_OF_MEMORY if "reason" in cell else None


def _block_table(settings: MemorySettings, values: Mapping[str, Cell]) -> Table:
    columns = (
        Column("block", "Block"),
        Column("paper_extra", "Besides the map being written, paper (× input)", 0),
        *(Column(f"extra_{layout}", f"here, {layout} (× input)", 2) for layout in _LAYOUTS),
        *(Column(f"peak_megabytes_{layout}", f"peak here, {layout} (MB)", 2) for layout in _LAYOUTS),
        Column("input_megabytes", "Input (MB)", 2),
    )
    rows = tuple(
        (
            block.title,
            block.extra,
            *(_extra_maps(block, layout, settings, values) for layout in _LAYOUTS),
            *(_megabytes(values.get(_key(block, layout), {})) for layout in _LAYOUTS),
            settings.map_bytes / 1e6,
        )
        for block in _BLOCKS
    )
    shape = f"{settings.batch} x {settings.channels} x {settings.size} x {settings.size}"
    notes = (
        f"Input {shape}. Convolutions 3x3, ReLU and addition in place. The peak is that of PyTorch's allocator. It "
        "includes reordered weights and, where maps are contiguous on a CPU, a copy of the input in the library's own "
        "layout; the paper leaves them out.",
    )
    return Table("figure3", "Blocks", columns, rows, notes)


def _network_table(settings: MemorySettings, values: Mapping[str, Cell]) -> Table:
    columns = (Column("model", "Model"), Column("peak_megabytes", "Peak without weights and images (MB)", 1))
    rows = tuple((title_of(name), _megabytes(values.get(f"network-{name}", {}))) for name in _NETWORKS)
    images = quantity(settings.batch or 1, "image")
    notes = (f"{images}, {settings.input_size} x {settings.input_size}, in eager PyTorch as deployed.",)
    return Table("figure3-networks", "Whole networks", columns, rows, notes)


STUDIES = (
    Study(
        name="figure3",
        title="Figure 3: peak memory of residual and plain blocks",
        about=(
            "Each block runs once to warm up and once under PyTorch's memory profiler (CPU) or with the statistics of "
            "CUDA's allocator; its peak is the highest sum of memory that is allocated and not yet released. While a "
            "layer runs, its input and output are live; a residual block also keeps its input until the addition. "
            "Blocks run in both memory formats, whole networks in that of the settings."
        ),
        settings=MemorySettings,
        resolve=_resolve,
        measure=_measure,
        outcome=_outcome,
    ),
)

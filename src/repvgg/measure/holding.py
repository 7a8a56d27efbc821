"""Which memory an eager run holds after each op: the storages that something still refers to."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


class Holding:
    """Watches the storages of a run, without keeping one of them alive.

    A storage is held from the op that makes it until nothing refers to it any more, as an allocator sees it; a view
    holds the whole of what it is a view of. The parameters and buffers of the model are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._apart = {_key(tensor) for tensor in state_of(model)}

    def held(self, more: Iterable[Tensor]) -> int:
        """Bytes that are held now, with what ``more`` refers to; tensors without a storage (sparse ones) hold none."""
        for tensor in more:
            if tensor.layout is torch.strided and (key := _key(tensor)) not in self._apart:
                storage = tensor.untyped_storage()
                self._live[key] = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
        gone = [key for key, (reference, _) in self._live.items() if reference.expired()]  # type: ignore[no-untyped-call]
        for key in gone:
            del self._live[key]
        return sum(size for _, size in self._live.values())


def state_of(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a model that have a storage."""
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.layout is torch.strided]


def weight_bytes(model: nn.Module) -> int:
    """Memory of the parameters and buffers of a model; what shares a storage counts once."""
    return sum({_key(tensor): tensor.untyped_storage().nbytes() for tensor in state_of(model)}.values())


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key

"""Several devices: how Lightning runs them."""

from __future__ import annotations

from typing import Any, final

from lightning.pytorch.strategies import DDPStrategy


@final
class Several(DDPStrategy):
    """Data parallelism whose processes judge their shares of the images alone.

    PyTorch's wrapper exchanges the buffers at every forward, in eval mode too, and waits forever where one process has
    a batch more than another. The task exchanges them once, before it judges.
    """

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """One step, past the wrapper."""
        assert self.lightning_module is not None
        return self.lightning_module.validation_step(*args, **kwargs)

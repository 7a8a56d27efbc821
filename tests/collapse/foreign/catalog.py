"""All networks of other code bases: those of installed packages, and those rebuilt from papers."""

from tests.collapse.foreign import (
    dense_prediction,
    diverse_branch,
    large_kernel,
    packages,
    super_resolution,
    yolo,
)

REBUILT = (yolo, dense_prediction, diverse_branch, super_resolution, large_kernel)
NETWORKS = [network for module in (packages, *REBUILT) for network in module.NETWORKS]
SMALL = [network for module in REBUILT for network in module.SMALL]

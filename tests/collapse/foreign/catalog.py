"""All networks of other code bases: those of installed packages, and those rebuilt from papers."""

from tests.collapse.foreign import (
    conv_module,
    diverse_branch,
    hrnet,
    large_kernel,
    modnet,
    packages,
    super_resolution,
    yolo,
)

REBUILT = (yolo, conv_module, hrnet, modnet, diverse_branch, super_resolution, large_kernel)
NETWORKS = [network for module in (packages, *REBUILT) for network in module.NETWORKS]
SMALL = [network for module in REBUILT for network in module.SMALL]

_SLOWER = ("gelan-c", "YOLO-NAS", "OREPA", "SPAN", "UniRepLKNet")  # a second or more each
FAST = [network for network in SMALL if not network.name.startswith(_SLOWER)]
SLOW = NETWORKS + [network for network in SMALL if network.name.startswith(_SLOWER)]

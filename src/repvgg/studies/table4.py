"""Table 4 of the paper: RepVGG beside the classics, trained for 120 epochs.

    repvgg study table4

Expected on 2 cores: under 20 minutes with the networks up to 12 GMACs.
"""

from repvgg.studies.network_tables import network_study
from repvgg.studies.paper import TABLE_4

STUDY = network_study(
    "table4", "Table 4: speed beside ResNet, ResNeXt, EfficientNet, RegNet", TABLE_4, "resnet50", gmacs_on_cpu=12.0
)

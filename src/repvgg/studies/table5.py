"""Table 5 of the paper: the largest networks, trained for 200 epochs.

repvgg study table5
"""

from repvgg.studies.network_tables import network_study
from repvgg.studies.networks import ALL_GMACS
from repvgg.studies.paper import TABLE_5

STUDY = network_study(
    "table5", "Table 5: speed of the largest networks", TABLE_5, "regnetx_12gf", gmacs_on_cpu=ALL_GMACS
)

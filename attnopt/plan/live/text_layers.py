"""The layers of a live model that read their text, which `akvq-vl` keeps in more bits than those that rest on their first tokens.

    attention of each layer on the texts, as traced   ->   [0, 1]: more than a tenth of it on tokens that would be rounded

The pass says which these are; it is asked about the prompt that the model was traced on, because that is where its attention is seen.
"""

from __future__ import annotations

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.hosts.module.host import ModuleHost
from attnopt.passes.kvcache.akvq_vl import AkvqVl
from attnopt.patterns import recognise
from attnopt.plan.live.coding import OfText


def text_layers(host: ModuleHost, data: Calibration, seed: int) -> OfText:
    """By their index in the model, on the half of the data that chooses; nothing is run before it is asked for."""

    def found(given: AkvqVl) -> list[int]:
        sites = recognise(host.graph).sites
        evidence = Evidence(host, data.split(seed)[0], sites=sites)
        reading = [site.source.module for site in sites if given.reads_text(site, evidence)]
        return sorted(host.model.get_submodule(path).layer_idx for path in reading)

    return found

"""Live models of transformers, from a model and what is asked for it to one that generates, and from a folder.

optimizing   trace, fold, plan, modules, caches, report        caches   which policy, codes or pages        comparing   is it the same
records      with report and plan, in a folder and back        telling   lines of a report
"""

from attnopt.live.optimizing import optimize_live
from attnopt.live.records import load_live

__all__ = ["load_live", "optimize_live"]

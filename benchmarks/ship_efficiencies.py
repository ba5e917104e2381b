"""What `attnopt calibrate` measured on this machine becomes the defaults that are shipped for CPUs nobody has measured.

    OMP_NUM_THREADS=1 attnopt calibrate            # on a quiet machine; keeps ~/.config/attnopt/cpu-….toml
    OMP_NUM_THREADS=1 python benchmarks/ship_efficiencies.py [FILE]

Each family in the measured file takes the place of its table in attnopt/cost/efficiencies.toml, with a source that names processor,
threads and versions. Families that were not measured stay, and so do those of GPUs. Shares alone are taken: rates are each machine's own.
They hold for machines with the instructions of the one that was measured, all or none, because shares of one fit belong together: one with
AMX fills `cpu-amx`, one with VNNI `cpu-vnni`, and one with neither `cpu`, which stands for all that were not measured. What
`cost_model.py --target h200` fitted on a GPU (its .toml) goes to `gpu` in the same way.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from attnopt.cost.efficiency import efficiencies
from attnopt.cost.target_file import as_toml, measured_path

SHIPPED = Path(__file__).parents[1] / "attnopt" / "cost" / "efficiencies.toml"
PACKAGES = ("torch", "onnxruntime", "apache-tvm")


def source(measured: Mapping[str, Any]) -> str:
    return f"fitted on {measured['description']}, {', '.join(installed())}, measured on {measured['measured']}"


def installed() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found


def merged(text: str, measured: Mapping[str, Any]) -> str:
    """The text of the shipped file with the families that were measured. Raises ValueError for a file without them, or of no share."""
    fitted = measured.get("efficiencies", {})
    if not fitted:
        raise ValueError("the measured file holds no efficiencies: run `attnopt calibrate` first")
    efficiencies(fitted)
    tables = tomllib.loads(text)
    said = source(measured)
    kind = measured.get("kind", "cpu")
    of_machine = "-".join([kind, *measured.get("features", ())[-1:]]) if kind == "cpu" else kind
    for family, shares in fitted.items():
        tables.setdefault(of_machine, {})[family] = {
            "source": said,
            **{name: float(f"{value:.3g}") for name, value in shares.items()},
        }
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    kinds = [f"[{kind}]\n{as_toml(families, f'{kind}.').lstrip()}" for kind, families in tables.items()]
    return f"{head}\n\n" + "\n\n".join(kinds) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=measured_path(), help="what `attnopt calibrate` wrote")
    given = parser.parse_args()
    try:
        made = merged(SHIPPED.read_text(encoding="utf-8"), tomllib.loads(given.file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as failure:
        sys.exit(f"nothing was changed: {failure}")
    SHIPPED.write_text(made, encoding="utf-8")
    print(
        f"{SHIPPED.name} holds what {given.file.name} measured; run the tests of tests/cost and read the difference before keeping it"
    )


if __name__ == "__main__":
    main()

"""`sit models`: lists the named models with their costs."""

from collections.abc import Sequence

from sit_jax.analysis.flops import count_cost
from sit_jax.analysis.table import print_table
from sit_jax.config import JsonObject
from sit_jax.models.variants import VARIANTS


def list_costs() -> list[JsonObject]:
    """Returns JSON values of all named models: parameters, GMAC (`macs` by kind of module), tokens, image size."""
    return [
        {
            "name": name,
            "params": cost.params,
            "rtsm_params": cost.rtsm_params,
            "gmac": round(cost.gmac, 4),
            "tokens": list(arch.token_counts),
            "image_size": arch.image_size,
            "macs": {**cost.macs, "rtsm": cost.rtsm_macs},
        }
        for name, arch in VARIANTS.items()
        for cost in [count_cost(arch)]
    ]


def print_costs(rows: Sequence[JsonObject], verbose: bool) -> None:
    """Prints the rows as a table; `verbose` adds the GMAC of each kind of module."""
    parts = {"stem": "stem", "attention": "attention", "mlp": "MLP", "slimming": "TSM", "head": "head", "rtsm": "RTSM"}
    shown = parts if verbose else {}
    cells = [
        (
            row["name"],
            f"{row['params']:,}",
            f"{row['params'] + row['rtsm_params']:,}",
            f"{row['gmac']:.3f}",
            *(f"{row['macs'][part] / 1e9:.4f}" for part in shown),
            "/".join(map(str, row["tokens"])),
            str(row["image_size"]),
        )
        for row in rows
    ]
    headings = ("model", "parameters", "with RTSM", "GMAC", *shown.values(), "tokens", "px")
    print_table(headings, cells, left=("model", "tokens"))
    if verbose:
        print("GMAC of one image's forward pass; RTSMs, which only training has, are not included in it.")

"""`sit models`: lists the named models with their costs."""

from collections.abc import Sequence
from typing import Any

from sit_jax.analysis.flops import count_cost
from sit_jax.models.variants import VARIANTS


def list_costs() -> list[dict[str, Any]]:
    """Returns JSON values of all named models: parameters, GMAC (`macs` by kind of module), tokens, image size."""
    rows: list[dict[str, Any]] = []
    for name, arch in VARIANTS.items():
        cost = count_cost(arch)
        row = {"name": name, "params": cost.params, "rtsm_params": cost.reverse_params, "gmac": round(cost.gmac, 4)}
        row |= {"tokens": list(arch.token_counts), "image_size": arch.image_size}
        rows.append({**row, "macs": {**cost.macs, "rtsm": cost.reverse_macs}})
    return rows


def print_costs(rows: Sequence[dict[str, Any]], verbose: bool) -> None:
    """Prints the rows as a table; `verbose` adds the GMAC of each kind of module."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    parts = {"stem": "stem", "attention": "attention", "mlp": "MLP", "slimming": "TSM", "head": "head", "rtsm": "RTSM"}
    headings = ["model", "parameters", "with RTSM", "GMAC", *(parts.values() if verbose else ()), "tokens", "px"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("model", "tokens") else "right", no_wrap=True)
    for row in rows:
        both, tokens = row["params"] + row["rtsm_params"], "/".join(str(count) for count in row["tokens"])
        shares = [f"{row['macs'][part] / 1e9:.4f}" for part in parts] if verbose else []
        cells = [row["name"], f"{row['params']:,}", f"{both:,}", f"{row['gmac']:.3f}"]
        table.add_row(*cells, *shares, tokens, str(row["image_size"]))
    console = Console()
    if verbose and not console.is_terminal:
        console = Console(width=140)
    console.print(table)
    if verbose:
        console.print("GMAC of one image's forward pass; RTSM, which only training has, comes on top of it.")

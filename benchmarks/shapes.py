"""The models that are timed, and weights for them that both frameworks read."""

import pathlib
from typing import Any

TINY: dict[str, Any] = {"image_size": 64, "dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}


def architecture(name: str, tiny: bool) -> Any:
    """A named model; in the tiny form four blocks of it, narrow and on small images."""
    from sit_jax.models.variants import VARIANTS, get_architecture

    if not tiny:
        return get_architecture(name)
    stages = (1, 1, 1, 1) if VARIANTS[name].is_slimmed else ()
    return get_architecture(name, **TINY, stage_blocks=stages)


def write_folder(folder: pathlib.Path, name: str, tiny: bool, rtsm: bool, seed: int = 0) -> None:
    """Writes a model folder with weights as after a training: nothing is zero or one, statistics least of all."""
    import jax
    import numpy as np

    from sit_jax.io.convert.load_params import expected_shapes
    from sit_jax.io.model import Model

    rng = np.random.default_rng(seed)
    arch = architecture(name, tiny)

    def leaf(path: tuple[Any, ...], x: Any) -> Any:
        kind, shape = path[-1].key, x.shape
        if kind in ("var", "scale"):
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        values = rng.standard_normal(shape, np.float32)
        return values / np.sqrt(np.prod(shape[:-1]), dtype=np.float32) if kind == "kernel" else 0.1 * values

    tree = jax.tree_util.tree_map_with_path(leaf, expected_shapes(arch, rtsm))
    Model(arch, tree, rtsm=tree.pop("rtsm")).save(folder, with_rtsm=rtsm)


def images(shape: tuple[int, ...], buffer: int) -> Any:
    """The normalised images of an input buffer, channels last."""
    import numpy as np

    return np.random.default_rng(buffer).standard_normal(shape, np.float32)


def labels(count: int, classes: int, buffer: int) -> Any:
    """Distributions over the classes, for the images of an input buffer."""
    import numpy as np

    return np.random.default_rng(1000 + buffer).dirichlet(np.ones(classes), count).astype(np.float32)

"""Elastic training: one student for several token schedules, `model.kept_tokens_choices`.

A model with fewer tokens is the first part of the model with all of them (`sit_jax.models.cut`), as in slimmable
networks (Yu et al., ICLR 2019) and Matryoshka representations (Kusupati et al., NeurIPS 2022). The sandwich rule is of
Yu and Huang, *Universally Slimmable Networks*, ICCV 2019.
"""

import zlib
from collections.abc import Sequence

import flax.linen as nn
import numpy as np

from sit_jax.config import Config
from sit_jax.errors import require
from sit_jax.models import abstract_variables
from sit_jax.models.architecture import Architecture
from sit_jax.models.cut import can_cut
from sit_jax.models.vit import ViT

Schedule = tuple[int, ...]


def choices(config: Config) -> tuple[Schedule, ...]:
    """Returns the token schedules that a run trains; empty for a model with one schedule."""
    arch = config.model.architecture
    return arch.kept_tokens_choices if isinstance(arch, Architecture) else ()


def check_elastic(config: Config, model: nn.Module | None) -> None:
    """Raises a ConfigError if a run for several token schedules cannot cut its model, the given one or its own."""
    key, arch = "model.kept_tokens_choices", config.model.architecture
    if not choices(config):
        return
    require(model is None or isinstance(model, ViT), key, "needs sit_jax.ViT, not a module of another class")
    assert isinstance(arch, Architecture)
    is_cuttable = can_cut(arch, abstract_variables(arch)["params"])
    require(is_cuttable, key, f"the reducer {arch.reducer} has parameters and no `first_tokens`, so it cannot be cut")


def drawn_schedules(config: Config, step: int) -> tuple[Schedule, ...]:
    """Returns the token schedules that one step trains, a function of the seed and the step.

    Args:
        config: The configuration.
        step: Index of the step, from 0.

    Returns:
        One of the choices; with `elastic_rule=sandwich` the largest, the smallest and one between. Empty for a model
        with one schedule.
    """
    known = choices(config)
    if not known or (len(known) == 2 and config.elastic_rule == "sandwich"):
        return known
    candidates = known[1:-1] if config.elastic_rule == "sandwich" else known
    entropy = (config.seed, zlib.crc32(b"kept_tokens"), step)
    index = int(np.random.SeedSequence(entropy).generate_state(1)[0]) % len(candidates)
    return (known[0], candidates[index], known[-1]) if config.elastic_rule == "sandwich" else (candidates[index],)


def largest_step(config: Config) -> tuple[Schedule, ...]:
    """Returns the schedules of a step that needs most memory and time, for planning."""
    known = choices(config)
    if not known or config.elastic_rule == "random":
        return known[:1]
    return tuple(dict.fromkeys((*known[:2], known[-1])))


def metric_key(metric: str, trained: Schedule, kept: Schedule) -> str:
    """Returns the name of a metric of a model that is cut to a schedule: `top1/98-49-24`; `top1` for the whole model.

    Args:
        metric: The metric.
        trained: The schedule of the whole model.
        kept: The schedule that it is cut to.
    """
    return metric if kept == trained else f"{metric}/{schedule_name(kept)}"


def schedule_name(schedule: Schedule) -> str:
    """Returns the name of a schedule in metrics, `98-49-24`: the tokens that the reducers keep."""
    return "-".join(map(str, schedule[1:]))


def schedule_text(kept: Sequence[int]) -> str:
    """Returns a schedule as the options take it: `196,98,49,24`."""
    return ",".join(map(str, kept))

"""The registered reducers and the forward pass of a small ViT in NumPy, in loops and float64, from the papers."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sit_jax.models.architecture import Architecture

Values = np.ndarray[Any, np.dtype[Any]]


class Result(NamedTuple):
    """Of one image: kept tokens, their masses, and the weight of each token in each of them."""

    tokens: Values
    mass: Values
    assignment: Values


def tome(x: Values, keys: Values, mass: Values, kept: int) -> Result:
    """Merges the most similar pairs of the first, third, ... tokens and the others, until `kept` are left."""
    groups = [[index] for index in range(len(x))]
    while len(groups) > kept:
        count = max(kept, len(groups) // 2)
        means = [mean(keys, mass, group) for group in groups]
        means = [key / np.sqrt((key**2).sum()) for key in means]
        pairs = []
        for first in range(0, len(groups), 2):
            similar, second = max((means[first] @ means[j], -j) for j in range(1, len(groups), 2))
            pairs.append((-similar, first, -second))
        for _, first, second in sorted(pairs)[: len(groups) - count]:
            groups[second] = groups[second] + groups[first]
            groups[first] = []
        groups = [group for group in groups if group]
    return Result(
        np.array([mean(x, mass, group) for group in groups]),
        np.array([sum(mass[i] for i in group) for group in groups]),
        np.array([[mass[i] / sum(mass[j] for j in group) * (i in group) for group in groups] for i in range(len(x))]),
    )


def mean(x: Values, mass: Values, group: list[int]) -> Values:
    total: Values = sum(mass[i] * x[i] for i in group) / sum(mass[i] for i in group)
    return total


def most_attended(attention: Values, count: int) -> list[int]:
    """Indices of the largest values, the first of equal ones, in order."""
    return sorted(sorted(range(len(attention)), key=lambda i: (-attention[i], i))[:count])


def topk(x: Values, attention: Values, mass: Values, kept: int) -> Result:
    """Keeps the most attended tokens."""
    chosen = most_attended(attention, kept)
    return Result(x[chosen], mass[chosen], np.eye(len(x))[:, chosen])


def evit(x: Values, attention: Values, mass: Values, kept: int) -> Result:
    """Keeps the most attended tokens and the sum of the others, times their attention."""
    if kept == len(x):
        return topk(x, attention, mass, kept)
    chosen = most_attended(attention, kept - 1)
    fused, others = np.zeros_like(x[:1]), np.zeros(len(x))
    for i in range(len(x)):
        if i not in chosen:
            fused = fused + attention[i] * x[i]
            others[i] = attention[i]
    rest = mass.sum() - mass[chosen].sum()
    return Result(
        np.concatenate([x[chosen], fused]),
        np.append(mass[chosen], rest),
        np.concatenate([np.eye(len(x))[:, chosen], others[:, None]], axis=1),
    )


REDUCERS: dict[str, Callable[..., Result]] = {"tome": tome, "topk": topk, "evit": evit}


def norm(x: Values, values: Any, epsilon: float) -> Values:
    centred = x - x.mean(axis=-1, keepdims=True)
    result: Values = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
    return result * values["scale"] + values["bias"]


def linear(x: Values, values: Any) -> Values:
    result: Values = x @ values["kernel"] + values["bias"]
    return result


def logits(arch: Architecture, params: Any, image: Values) -> Values:
    """The logits of one image of a slimmed ViT with patch stem and class token, whose reducers are inside of blocks."""
    side, heads = arch.patch_size, arch.num_heads
    rows, columns = arch.grid
    kernel = params["stem"]["proj"]["kernel"]
    patches = [
        np.einsum("hwc,hwcd->d", image[side * r : side * (r + 1), side * c : side * (c + 1)], kernel)
        for r in range(rows)
        for c in range(columns)
    ]
    x = np.concatenate([params["class_token"][0], np.array(patches) + params["stem"]["proj"]["bias"]])
    x = x + params["positions"][0]
    mass, reduced_before = np.ones(len(patches)), False
    for block in range(arch.depth):
        values = params[f"blocks_{block}"]
        qkv = linear(norm(x, values["norm1"], arch.norm_eps), values["attn"]["qkv"])
        query, key, value = (part.reshape(len(x), heads, -1) for part in np.split(qkv, 3, axis=1))
        mixed, attended = np.zeros_like(query), np.zeros(len(x))
        for head in range(heads):
            scores = query[:, head] @ key[:, head].T / math.sqrt(query.shape[-1])
            if arch.reducer == "tome" and reduced_before:
                scores = scores + np.log(np.append(1, mass))
            weights = np.exp(scores)
            weights = weights / weights.sum(axis=1, keepdims=True)
            mixed[:, head] = weights @ value[:, head]
            attended += weights[0] / heads
        x = x + linear(mixed.reshape(len(x), -1), values["attn"]["proj"])
        if block in arch.slimming:
            cue = key.mean(axis=1)[1:] if arch.reducer == "tome" else attended[1:]
            reduced = REDUCERS[arch.reducer](x[1:], cue, mass, arch.slimming[block])
            x, mass, reduced_before = np.concatenate([x[:1], reduced.tokens]), reduced.mass, True
        hidden = linear(norm(x, values["norm2"], arch.norm_eps), values["mlp"]["fc1"])
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        x = x + linear(hidden, values["mlp"]["fc2"])
    return linear(norm(x, params["norm"], arch.norm_eps)[0], params["head"])

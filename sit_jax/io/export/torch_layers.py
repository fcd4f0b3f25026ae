"""Layers of the models of `torch_model.py`: stem, attention, MLP, block, pools and token reducers; needs only torch."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (its customary name)
from torch import Tensor, nn

# Slimming modules use PyTorch's default epsilon, independent of the blocks' epsilon.
_SLIMMING_NORM_EPS = 1e-5


class Stem(nn.Module):
    """The stem, from an image to a grid of tokens: convolutions with BatchNorm, a patch projection, or both.

    With a projection (LV-ViT), ReLU follows each convolution; without (the paper's models), GELU is between them.
    """

    def __init__(self, shape: Mapping[str, Any]) -> None:
        super().__init__()
        channels, dim, patch, kind = shape["in_channels"], shape["dim"], shape["patch_size"], shape["stem"]
        eighth, width = dim // 8, shape.get("stem_width", 64)
        after_first = [(dim // 4, 3, 2), (dim // 2, 3, 2), (dim, 3, 2)]
        stems = {  # (features, kernel, stride) of each convolution, and the pixels of a projection (0: none).
            "patch": ([], patch),
            "conv4": ([(eighth, 3, 2), *after_first], 0),
            "conv6": ([(eighth, 3, 2), (eighth, 3, 1), (eighth, 3, 1), *after_first], 0),
            "conv7": ([(width, 7, 2), (width, 3, 1), (width, 3, 1)], patch // 2),
        }
        if kind not in stems:
            raise ValueError(f"architecture.stem: {kind!r} is not known here")
        layers, side = stems[kind]
        self.count = len(layers)
        for index, (features, kernel, stride) in enumerate(layers, start=1):
            setattr(self, f"conv{index}", nn.Conv2d(channels, features, kernel, stride, kernel // 2, bias=False))
            setattr(self, f"bn{index}", nn.BatchNorm2d(features))
            channels = features
        self.proj = nn.Conv2d(channels, dim, side, side, bias=shape.get("patch_bias", True)) if side else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, channels, height, width) to (batch, dim, rows, columns)."""
        for index in range(1, self.count + 1):
            x = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(x))
            if self.proj is not None:
                x = F.relu(x)
            elif index < self.count:
                x = F.gelu(x)
        return x if self.proj is None else self.proj(x)


# Cosine and sine, (batch or 1, tokens, head_dim).
Rotation = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Multi-head self-attention, with rotary positions if `forward` gets a rotation."""

    def __init__(self, dim: int, heads: int, bias: bool, key_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias and key_bias)
        if bias and not key_bias:
            self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, rotation: Rotation | None = None, mass: Tensor | None = None, needs: str = ""
    ) -> tuple[Tensor, Tensor | None]:
        """Maps (batch, tokens, dim) to the same shape; adds the logarithm of `mass`, (batch, tokens), to the scores.

        Also returns what a reducer `needs`, mean over the heads: the `keys` (batch, tokens, size), or the
        `class_attention` (batch, tokens), that of the first token, or `attention`, the mean over all tokens.
        """
        x = self.qkv(x)
        if hasattr(self, "q_bias"):
            x = x + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        query, key, value = x.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if rotation is not None:
            query, key = _rotate(query, rotation), _rotate(key, rotation)
        bias = None if mass is None else mass.log()[:, None, None].to(x.dtype)
        mixed = self.proj(F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2).flatten(2))
        if needs == "keys":
            return mixed, key.mean(1)
        if not needs:
            return mixed, None
        query = query[:, :, :1] if needs == "class_attention" else query
        scores = (query @ key.transpose(2, 3)).float() * key.shape[-1] ** -0.5
        return mixed, (scores if bias is None else scores + bias).softmax(-1).mean((1, 2))


def _rotate(x: Tensor, rotation: Rotation) -> Tensor:
    cosine, sine = (part[:, None].to(x.dtype) for part in rotation)
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Mlp(nn.Module):
    """Two linear layers with an activation between them; `swiglu` gates the second half of the hidden units."""

    def __init__(self, dim: int, hidden: int, out: int, activation: str = "gelu", swiglu: bool = False) -> None:
        super().__init__()
        self.activation, self.swiglu = _ACTIVATIONS[activation], swiglu
        self.fc1 = nn.Linear(dim, 2 * hidden if swiglu else hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., dim) to (..., out)."""
        x = self.fc1(x)
        if self.swiglu:
            gate, x = x.chunk(2, -1)
            return self.fc2(F.silu(gate) * x)
        return self.fc2(self.activation(x))


class AttentionPool(nn.Module):
    """Attention of one learned query to all tokens, then an MLP with residual branch (SigLIP)."""

    def __init__(self, shape: Mapping[str, Any]) -> None:
        super().__init__()
        dim, self.heads = shape["dim"], shape["num_heads"]
        self.latent = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, shape["norm_eps"])
        self.mlp = Mlp(dim, int(dim * shape["mlp_ratio"]), dim, shape.get("activation", "gelu"))

    def forward(self, x: Tensor, mass: Tensor) -> Tensor:
        """Maps (batch, tokens, dim) to (batch, dim); `mass` (batch, tokens) is the patches merged into each token."""
        query = self.q(self.latent).unflatten(2, (self.heads, -1)).transpose(1, 2).expand(x.shape[0], -1, -1, -1)
        key, value = self.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, mass.log()[:, None, None].to(x.dtype))
        x = self.proj(mixed.transpose(1, 2).flatten(2))[:, 0]
        return x + self.mlp(self.norm(x))


class Block(nn.Module):
    """A pre-norm transformer block whose residual branches are divided by the residual scale."""

    def __init__(self, shape: Mapping[str, Any], drop_path: float) -> None:
        super().__init__()
        dim = shape["dim"]
        self.residual_scale = shape["residual_scale"]
        self.norm1 = nn.LayerNorm(dim, shape["norm_eps"])
        self.attn = Attention(dim, shape["num_heads"], shape["qkv_bias"], shape.get("key_bias", True))
        self.norm2 = nn.LayerNorm(dim, shape["norm_eps"])
        swiglu = shape.get("mlp", "plain") == "swiglu"
        self.mlp = Mlp(dim, int(dim * shape["mlp_ratio"]), dim, shape.get("activation", "gelu"), swiglu)
        # Layer scale: a learned scale per channel (CaiT, DeiT-III).
        scale = {"gamma": nn.Parameter(torch.full((dim,), 1e-4))} if shape.get("layer_scale") else {}
        self.ls1, self.ls2 = (nn.ParameterDict(copy.deepcopy(scale)) for _ in range(2))
        self.drop_path = drop_path

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None = None,
        mass: Tensor | None = None,
        needs: str = "",
        between: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    ) -> Tensor:
        """Maps (batch, tokens, dim) to the same shape.

        `between` reduces the tokens between attention and MLP; for `mass` and `needs` see `Attention`.
        """
        mixed, cue = self.attn(self.norm1(x), rotation, mass, needs)
        x = x + self._branch(mixed, self.ls1)
        if between is not None:
            x = between(x, cue)
        return x + self._branch(self.mlp(self.norm2(x)), self.ls2)

    def _branch(self, x: Tensor, scale: nn.ParameterDict) -> Tensor:
        """Scales a residual branch; in training, drops it per example (stochastic depth) and rescales the others."""
        x = (x * scale["gamma"] if scale else x) / self.residual_scale
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep) / keep


class Reduced(NamedTuple):
    """Kept tokens (batch, K, dim), the patches in each of them (batch, K), and the assignment (batch, N, K)."""

    tokens: Tensor
    mass: Tensor
    assignment: Tensor


class TokenSlimming(nn.Module):
    """TSM: softly merges N patch tokens into K; each kept token is a convex combination of the input tokens."""

    needs, inside, weighs_attention = "", False, False

    def __init__(self, dim: int, kept: int) -> None:
        super().__init__()
        norm = nn.LayerNorm(dim, _SLIMMING_NORM_EPS)
        self.weight = nn.Sequential(norm, nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, kept))
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def forward(self, x: Tensor, mass: Tensor, cue: Tensor | None = None) -> Reduced:
        """Reduces (batch, N, dim) to K tokens."""
        del cue
        assignment = (self.weight(x) * self.scale).softmax(1)
        return Reduced(assignment.transpose(1, 2) @ x, (assignment * mass[:, :, None]).sum(1), assignment)


class _WithoutParameters(nn.Module):
    def __init__(self, dim: int, kept: int) -> None:
        super().__init__()
        del dim
        self.kept = kept


class TokenMerging(_WithoutParameters):
    """ToMe: merges the pairs of tokens with the most similar keys, in rounds of at most half of the tokens."""

    needs, inside, weighs_attention = "keys", True, True

    def forward(self, x: Tensor, mass: Tensor, cue: Tensor) -> Reduced:
        """Reduces (batch, N, dim) to K tokens; `cue` are the keys."""
        groups, keys, sizes = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]), cue.float(), mass
        while keys.shape[1] > self.kept:
            kept = max(self.kept, keys.shape[1] // 2)
            found = _match(keys, kept)
            groups = found.gather(1, groups)
            keys, sizes, _ = _merge(keys, sizes, found, kept)
        return _merge(x, mass, groups, self.kept)


class TopK(_WithoutParameters):
    """Top-K: keeps the tokens to which the class token attends most, in the order of their indices."""

    needs, inside, weighs_attention = "class_attention", True, False

    def forward(self, x: Tensor, mass: Tensor, cue: Tensor) -> Reduced:
        """Reduces (batch, N, dim) to K tokens; `cue` is the class attention."""
        is_kept = _is_among_largest(cue, self.kept)
        return _merge(x, mass, torch.where(is_kept, is_kept.long().cumsum(1) - 1, -1), self.kept)


class AttentiveFusion(TopK):
    """EViT: keeps the K - 1 tokens to which the class token attends most, and the sum of all others.

    The attention is their weight in the sum. If all tokens are kept, none is fused.
    """

    def forward(self, x: Tensor, mass: Tensor, cue: Tensor) -> Reduced:
        """Reduces (batch, N, dim) to K tokens; `cue` is the class attention."""
        is_kept = _is_among_largest(cue, self.kept if self.kept == x.shape[1] else self.kept - 1)
        groups = torch.where(is_kept, is_kept.long().cumsum(1) - 1, self.kept - 1)
        return _merge(x, mass, groups, self.kept, torch.where(is_kept, 1.0, cue))


REDUCERS = {"slim": TokenSlimming, "tome": TokenMerging, "topk": TopK, "evit": AttentiveFusion}


def _match(keys: Tensor, kept: int) -> Tensor:
    """Returns the index of the kept token that each token is merged into, by bipartite soft matching.

    Each of the first, third, ... token is paired with the most similar of the others; the most similar pairs merge.
    """
    tokens = keys.shape[1]
    unit = F.normalize(keys, dim=-1)
    similarity, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(2)
    is_merged = _interleave(_is_among_largest(similarity, tokens - kept).long(), tokens)
    rank = (1 - is_merged).cumsum(1) - 1
    index = torch.arange(tokens, device=keys.device)
    return rank.gather(1, torch.where(is_merged > 0, _interleave(2 * partner + 1, tokens), index))


def _interleave(x: Tensor, count: int) -> Tensor:
    """Returns a row with zeros between the elements, of `count` elements."""
    return torch.stack([x, torch.zeros_like(x)], 2).flatten(1)[:, :count]


def _merge(x: Tensor, mass: Tensor, groups: Tensor, kept: int, weights: Tensor | None = None) -> Reduced:
    """Merges each group of tokens into one: their sum with the weights, by default their mean weighted by mass."""
    members = (groups[:, :, None] == torch.arange(kept, device=x.device)).to(mass.dtype)
    masses = members * mass[:, :, None]
    total = masses.sum(1)
    assignment = masses / total[:, None] if weights is None else members * weights[:, :, None].to(mass.dtype)
    return Reduced(assignment.transpose(1, 2).to(x.dtype) @ x, total, assignment)


def _is_among_largest(scores: Tensor, count: int) -> Tensor:
    """Returns whether a score is among the `count` largest of its row; of equal scores, the first are."""
    mine, others = scores[:, :, None], scores[:, None]
    position = torch.arange(scores.shape[1], device=scores.device)
    is_first = position[None] < position[:, None]
    return ((others > mine) | ((others == mine) & is_first)).sum(2) < count

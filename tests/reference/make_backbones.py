"""Writes `tests/golden/backbones/`: small models of other libraries with random weights, an input, and their outputs.

The tests read these files; they need none of the libraries. To make them anew, in an environment of its own:

    python -m venv reference
    reference/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors numpy ftfy regex tqdm
    reference/bin/pip install --no-deps timm==1.0.31 torchvision==0.28.0 open-clip-torch==3.3.0
    reference/bin/python tests/reference/make_backbones.py tests/golden/backbones [NAME ...]

A folder per model has `model.safetensors` or `model.npz`, `config.json` where the library writes one, and
`expected.npz`: the `pixels` (batch, channels, height, width; normalized) and what the library computes from them:
`tokens` (after the last norm, prefix tokens first), `pooled`, and `logits` or `embedding` where it has them.
"""

import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

# A torchvision without its compiled operators, whose names timm's import needs.
OPERATORS = torch.library.Library("torchvision", "DEF")
OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402
import transformers as hf  # noqa: E402

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
SMALL: dict[str, Any] = {**SIZES, "intermediate_size": 32, "patch_size": 8}
TO_HEADS = {"kernel": (16, 2, 8), "bias": (2, 8)}
Outputs = dict[str, torch.Tensor]


# Names of parameters that are drawn around 1.
ONES = ("norm.weight", "norm1.weight", "norm2.weight", "lambda1", "gamma")


def randomize(model: torch.nn.Module, spread: float = 0.2, ones: tuple[str, ...] = ONES) -> torch.nn.Module:
    """Draws every weight anew: libraries initialize biases, scales and tokens to zeros or ones, which hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for name, value in sorted(model.named_parameters()):
        noise = torch.randn(value.shape, generator=generator)
        value.data = float(name.endswith(ones)) + spread * noise
    return model.eval()


def hugging_face(model: Any) -> tuple[Any, Callable[[Any, torch.Tensor], Outputs]]:
    def run(model: Any, pixels: torch.Tensor) -> Outputs:
        out = model(pixel_values=pixels, output_hidden_states=True)
        names = {
            "last_hidden_state": "tokens",
            "pooler_output": "pooled",
            "logits": "logits",
            "image_embeds": "embedding",
        }
        found = {ours: out[theirs] for theirs, ours in names.items() if theirs in out and out[theirs] is not None}
        return {"last_hidden": out.hidden_states[-1], **found}

    return model, run


def run_timm(model: Any, pixels: torch.Tensor) -> Outputs:
    tokens = model.forward_features(pixels)
    return {"tokens": tokens, "pooled": model.forward_head(tokens, pre_logits=True), "logits": model(pixels)}


def timm_model(name: str, **changes: Any) -> tuple[Any, Callable[[Any, torch.Tensor], Outputs]]:
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 5}
    model = timm.create_model(name, **{**sizes, **changes})
    model.sit_args = {**sizes, **changes}
    return model, run_timm


def mae() -> tuple[Any, Callable[[Any, torch.Tensor], Outputs]]:
    """The encoder sees all patches, in order: no mask, and noise that sorts them as they are."""
    config = hf.ViTMAEConfig(
        **SMALL,
        mask_ratio=0.0,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )

    def run(model: Any, pixels: torch.Tensor) -> Outputs:
        noise = torch.arange(16.0).expand(len(pixels), -1)
        return {"tokens": model.vit(pixels, noise=noise).last_hidden_state}

    return hf.ViTMAEForPreTraining(config), run


def open_clip() -> tuple[Any, Callable[[Any, torch.Tensor], Outputs]]:
    from open_clip.transformer import VisionTransformer

    model = VisionTransformer(image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp_ratio=2.0, output_dim=12)
    return model, lambda model, pixels: {"embedding": model(pixels)}


def big_vision(name: str, prefix: str, scanned: bool, **others: tuple[int, ...]) -> Any:
    """A `.npz` of Google's big_vision, which timm reads; `others` are tensors outside of the encoder, by name."""
    attention = {f"{x}/{part}": shape for x in ("query", "key", "value") for part, shape in TO_HEADS.items()}
    attention |= {"out/kernel": (2, 8, 16), "out/bias": (16,)}
    mlp: dict[str, tuple[int, ...]] = {
        "Dense_0/kernel": (16, 64),
        "Dense_0/bias": (64,),
        "Dense_1/kernel": (64, 16),
        "Dense_1/bias": (16,),
    }
    norm: dict[str, tuple[int, ...]] = {"scale": (16,), "bias": (16,)}
    parts: dict[str, dict[str, tuple[int, ...]]] = {
        "MultiHeadDotProductAttention_0": attention,
        "LayerNorm_0": norm,
        "LayerNorm_1": norm,
        "MlpBlock_0": mlp,
    }
    inner = {f"{part}/{key}": shape for part, held in parts.items() for key, shape in held.items()}
    shapes: dict[str, tuple[int, ...]] = {"embedding/kernel": (8, 8, 3, 16), "embedding/bias": (16,)}
    shapes |= {"pos_embedding": (1, 16, 16), **{f"Transformer/encoder_norm/{key}": x for key, x in norm.items()}}
    if scanned:
        shapes |= {f"Transformer/encoderblock/{key}": (2, *shape) for key, shape in inner.items()}
    else:
        shapes |= {f"Transformer/encoderblock_{i}/{key}": shape for i in range(2) for key, shape in inner.items()}
    if "siglip" in name:
        shapes |= {f"MAPHead_0/{key}": shape for key, shape in inner.items() if "LayerNorm_1" not in key}
    shapes = {**{prefix + key: shape for key, shape in shapes.items()}, **others}
    random = np.random.default_rng(0)
    arrays = {
        key: (key.endswith("scale") + 0.2 * random.normal(size=shape)).astype(np.float32)
        for key, shape in shapes.items()
    }
    classes = 5 if "params/head/bias" in others else 0
    model, _ = timm_model(name, act_layer="gelu_tanh", num_classes=classes, no_embed_class=True)
    model.sit_arrays = arrays

    def run(model: Any, pixels: torch.Tensor) -> Outputs:
        with tempfile.TemporaryDirectory() as folder:
            np.savez(f"{folder}/x.npz", allow_pickle=False, **model.sit_arrays)
            model.load_pretrained(f"{folder}/x.npz")
        return run_timm(model, pixels)

    return model, run


MODELS: dict[str, Callable[[], tuple[Any, Callable[[Any, torch.Tensor], Outputs]]]] = {
    "hf_vit": lambda: hugging_face(hf.ViTForImageClassification(hf.ViTConfig(**SMALL, num_labels=5))),
    "hf_vit_new_names": lambda: hugging_face(hf.ViTForImageClassification(hf.ViTConfig(**SMALL, num_labels=5))),
    "hf_vit_model": lambda: hugging_face(hf.ViTModel(hf.ViTConfig(**SMALL), add_pooling_layer=False)),
    "hf_deit": lambda: hugging_face(hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**SMALL, num_labels=5))),
    "hf_deit_one_head": lambda: hugging_face(hf.DeiTForImageClassification(hf.DeiTConfig(**SMALL, num_labels=5))),
    "hf_vit_mae": mae,
    "hf_vit_msn": lambda: hugging_face(hf.ViTMSNModel(hf.ViTMSNConfig(**SMALL))),
    "hf_vit_msn_classifier": lambda: hugging_face(
        hf.ViTMSNForImageClassification(hf.ViTMSNConfig(**SMALL, num_labels=5))
    ),
    "hf_dinov2": lambda: hugging_face(hf.Dinov2Model(hf.Dinov2Config(**SIZES, patch_size=8, mlp_ratio=2))),
    "hf_dinov2_classifier": lambda: hugging_face(
        hf.Dinov2ForImageClassification(hf.Dinov2Config(**SIZES, patch_size=8, mlp_ratio=2, num_labels=5))
    ),
    "hf_dinov2_swiglu": lambda: hugging_face(
        hf.Dinov2Model(hf.Dinov2Config(**SIZES, patch_size=8, mlp_ratio=2, use_swiglu_ffn=True))
    ),
    "hf_dinov2_registers": lambda: hugging_face(
        hf.Dinov2WithRegistersModel(
            hf.Dinov2WithRegistersConfig(**SIZES, patch_size=8, mlp_ratio=2, num_register_tokens=3)
        )
    ),
    "hf_clip": lambda: hugging_face(
        hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**SMALL, projection_dim=12, hidden_act="quick_gelu"))
    ),
    "hf_siglip": lambda: hugging_face(hf.SiglipVisionModel(hf.SiglipVisionConfig(**SMALL))),
    "hf_dinov3": lambda: hugging_face(
        hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SMALL, num_register_tokens=4, layerscale_value=1.0))
    ),
    "hf_dinov3_without_registers": lambda: hugging_face(hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SMALL))),
    "hf_dinov3_swiglu": lambda: hugging_face(
        hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SMALL, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"))
    ),
    "timm_registers": lambda: timm_model("vit_small_patch14_reg4_dinov2", mlp_ratio=2),
    "timm_gap": lambda: timm_model("vit_base_patch16_224", mlp_ratio=2, global_pool="avg", class_token=False),
    "timm_gap_registers": lambda: timm_model("vit_little_patch16_reg4_gap_256", mlp_ratio=2, init_values=1e-5),
    "timm_clip": lambda: timm_model("vit_base_patch16_clip_quickgelu_224", mlp_ratio=2, num_classes=12),
    "timm_siglip": lambda: timm_model("vit_base_patch16_siglip_224", mlp_ratio=2, num_classes=0),
    "timm_swiglu": lambda: timm_model("vit_giant_patch14_dinov2", mlp_ratio=4, num_classes=0),
    "timm_dinov3": lambda: timm_model("vit_small_patch16_dinov3", mlp_ratio=2, num_classes=0),
    "open_clip": open_clip,
    "big_vision_siglip": lambda: big_vision(
        "vit_base_patch16_siglip_224",
        "params/img/",
        scanned=True,
        **{"params/img/MAPHead_0/probe": (1, 1, 16), "params/t": (1,), "params/b": (1,)},
        **{"params/txt/Encoder_0/encoderblock_0/LayerNorm_0/scale": (16,)},
    ),
    "big_vision_vit": lambda: big_vision(
        "vit_base_patch16_224",
        "params/",
        scanned=False,
        **{"params/cls": (1, 1, 16), "params/head/kernel": (16, 5), "params/head/bias": (5,)},
    ),
}


def save(name: str, model: Any, place: pathlib.Path) -> None:
    """Saves a model as its library does."""
    if name.startswith("hf_"):
        # transformers 5 has other names in memory than in its files.
        model.save_pretrained(place, save_original_format=not name.endswith("new_names"))
    elif name.startswith("big_vision_"):
        np.savez(place / "model.npz", allow_pickle=False, **model.sit_arrays)
    elif name.startswith("timm_"):
        timm.models.save_for_hf(model, place, model_args=getattr(model, "sit_args", None), safe_serialization=True)
    else:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, place / "model.safetensors")


def write(name: str, model: Any, run: Any, folder: pathlib.Path, image_size: int = 32) -> Outputs:
    """Writes a model and its outputs for random images, which are returned."""
    pixels = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = run(model, pixels)
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    save(name, model, place)
    arrays = {key: value.numpy() for key, value in {"pixels": pixels, **expected}.items()}
    np.savez_compressed(place / "expected.npz", allow_pickle=False, **arrays)
    print(name, {key: value.shape for key, value in arrays.items()}, len(model.state_dict()))
    return {"pixels": pixels, **expected}


if __name__ == "__main__":
    for wanted in sys.argv[2:] or MODELS:
        torch.manual_seed(0)
        made, runner = MODELS[wanted]()
        write(wanted, randomize(made), runner, pathlib.Path(sys.argv[1]))

"""Compares backbones, small and at full size, with the libraries that they come from, there and back.

    reference/bin/python tests/reference/compare_backbones.py PROJECT_PYTHON FOLDER [NAME ...]

The first interpreter has the libraries (see `make_backbones.py`), PROJECT_PYTHON has sit_jax. With random weights,
float32, on the CPU, for every model:

1. The library computes the outputs for two images, and saves the model in its own way.
2. `sit convert` reads it, sit_jax computes the outputs, and `sit export --format source` writes the model back.
3. The library loads that strictly; its outputs must be equal to those of 1 bit for bit.

Prints a line per model: the largest difference of each output between 1 and 2, relative to the largest value. The exit
status is 1 if one is above 1e-4. FOLDER holds one model at a time, 1.5 GB at most.
"""

import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

LIMIT = 1e-4
# Files of OpenCLIP say neither.
OPTIONS = {"open_clip": (2, "gelu"), "open_clip_base": (12, "gelu")}


def convert_and_export(folder: pathlib.Path, name: str) -> None:
    """Reads a model, computes its outputs, and writes it back; runs in the project's environment."""
    import jax
    import jax.numpy as jnp

    import sit_jax
    from sit_jax.cli import app

    source, saved = folder / name, folder / "saved"
    pixels = np.load(source / "expected.npz")["pixels"].transpose(0, 2, 3, 1)
    source = source / "model.npz" if (source / "model.npz").exists() else source
    heads, activation = OPTIONS.get(name, (0, ""))
    options = [f"--model.num_heads={heads}", f"--model.activation={activation}"] if heads else []
    commands = (
        ["convert", str(source), str(saved), *options],
        ["export", str(saved), str(folder / "back"), "--format=source", f"--like={source}"],
    )
    for command in commands:
        if app.main(command):
            raise SystemExit(f"{name}: sit {command[0]} failed")
    model = sit_jax.load(saved)
    logits, found = jax.jit(model.module.apply)(model.variables, pixels)
    tokens = jnp.concatenate([found.prefix_tokens, found.patch_tokens], axis=1)
    values = {"tokens": tokens, "pooled": found.features, "embedding": found.features, "logits": logits}
    np.savez(folder / "outputs.npz", allow_pickle=False, **{key: np.asarray(value) for key, value in values.items()})


def full_size() -> dict[str, tuple[Callable[[], Any], int]]:
    """Returns, by name, what makes a model and the function that runs it, and its image size."""
    import make_backbones
    import open_clip
    import timm
    import transformers as hf

    def timm_model(name: str) -> Any:
        return timm.create_model(name), make_backbones.run_timm

    def clip() -> Any:
        return open_clip.create_model("ViT-B-16"), lambda model, pixels: {"embedding": model.encode_image(pixels)}

    found = make_backbones.hugging_face
    vit_s = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12}
    dinov2 = {**vit_s, "image_size": 518, "patch_size": 14, "num_register_tokens": 4}
    return {
        "hf_dinov2_registers_small": (
            lambda: found(hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**dinov2))),
            518,
        ),
        "timm_registers_small": (lambda: timm_model("vit_small_patch14_reg4_dinov2"), 518),
        "hf_clip_base": (lambda: found(hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(patch_size=16))), 224),
        "timm_clip_base": (lambda: timm_model("vit_base_patch16_clip_224"), 224),
        "hf_siglip_base": (lambda: found(hf.SiglipVisionModel(hf.SiglipVisionConfig())), 224),
        "timm_siglip_base": (lambda: timm_model("vit_base_patch16_siglip_224"), 224),
        "hf_dinov3_small": (lambda: found(hf.DINOv3ViTModel(hf.DINOv3ViTConfig(num_register_tokens=4))), 224),
        "timm_dinov3_small": (lambda: timm_model("vit_small_patch16_dinov3"), 256),
        "open_clip_base": (clip, 224),
    }


def load_back(name: str, model: Any, place: pathlib.Path) -> Iterator[Any]:
    """Yields the models that a library reads from a folder; raises if a tensor is missing, left over or misshapen."""
    import timm
    from safetensors.torch import load_file

    if name.startswith("big_vision_"):
        model.sit_arrays = {key: value.numpy() for key, value in load_file(place / "model.safetensors").items()}
        yield model
        return
    if name.startswith("hf_"):  # Its names in memory are not those of its files.
        options = {"add_pooling_layer": False} if name == "hf_vit_model" else {}
        copy, problems = type(model).from_pretrained(place, output_loading_info=True, **options)
        if any(problems.values()):
            raise SystemExit(f"{name}: {problems}")
        yield copy.eval()
        return
    model.load_state_dict(load_file(place / "model.safetensors"), strict=True)
    yield model
    if name.startswith("timm_"):
        yield timm.create_model(f"local-dir:{place}", pretrained=True).eval()


def main(project: str, folder: pathlib.Path, names: list[str]) -> int:
    import make_backbones
    import torch

    full, status = full_size(), 0
    ones = (*make_backbones.ONES, "norm_pre.weight", "gamma_1", "gamma_2", "ln_1.weight", "ln_2.weight")
    ones += ("ln_pre.weight", "ln_post.weight", "ln_final.weight")
    small = [name for name in make_backbones.MODELS if name != "hf_deit_one_head"]  # Which has no way back.
    for name in names or [*full, *small]:
        build, image_size = full.get(name) or (make_backbones.MODELS[name], 32)
        shutil.rmtree(folder, ignore_errors=True)
        model, run = build()
        if name in full:
            make_backbones.randomize(model, spread=0.03, ones=ones)
        else:
            make_backbones.randomize(model)
        expected = make_backbones.write(name, model, run, folder, image_size)
        subprocess.run([project, __file__, "--read", str(folder), name], check=True)
        mine = np.load(folder / "outputs.npz")
        differences = {
            key: float(np.abs(mine[key] - value.numpy()).max() / value.abs().max())
            for key, value in expected.items()
            if key in mine and mine[key].shape == value.shape and (name[:7], key) != ("hf_clip", "tokens")
        }
        copies = list(load_back(name, make_backbones.randomize(model, spread=1.0), folder / "back"))
        pixels = expected.pop("pixels")
        with torch.no_grad():
            back = [run(copy, pixels) for copy in copies]
        equal = all(torch.equal(again[key], value) for again in back for key, value in expected.items())
        good = equal and differences and max(differences.values()) <= LIMIT
        status |= not good
        text = ", ".join(f"{key} {value:.1e}" for key, value in differences.items())
        print(f"{name}: {text}; the way back is {'equal' if equal else 'NOT EQUAL'}", flush=True)
    return status


if __name__ == "__main__":
    if sys.argv[1] == "--read":
        convert_and_export(pathlib.Path(sys.argv[2]), sys.argv[3])
    else:
        raise SystemExit(main(sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3:]))

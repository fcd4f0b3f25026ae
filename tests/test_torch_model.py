"""The PyTorch module: against the original's numbers, independently of JAX, then against JAX."""

import dataclasses
import functools
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights
import tiny
import torch
from golden_files import TRAINED, Golden

from sit_jax.io.export.torch_distillation import distillation_loss, parameter_groups
from sit_jax.io.export.torch_model import (
    SiT,
    fold_batch_norm,
    load,
)
from sit_jax.io.model_folder import describe
from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture


def close(mine: torch.Tensor, theirs: np.ndarray, relative: float = 1e-4) -> None:
    """Asserts agreement relative to the largest value of the tensor."""
    assert tuple(mine.shape) == theirs.shape
    bound = relative * max(1e-8, np.abs(theirs).max())
    np.testing.assert_allclose(mine.detach().numpy(), theirs, rtol=0, atol=bound)


def module(arch: Architecture, state: dict[str, np.ndarray], reverse: bool = False) -> SiT:
    """The module with the original's state dict, which must fit in every key."""
    model = SiT(describe(arch, {}), reverse)
    model.load_state_dict({key: torch.tensor(value) for key, value in state.items()}, strict=True)
    return model.eval()


@functools.cache
def weights(name: str) -> tuple[Golden, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A golden file, and the state dicts of its teacher and of its student at the start."""
    golden = golden_files.load(name)
    teacher, own = (golden_files.part(golden.data, prefix) for prefix in ("teacher/", "student_own/"))
    return golden, teacher, {**teacher, **own}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("of", ["teacher", "student", "trained student"])
def test_logits_and_tokens(name: str, of: str) -> None:
    golden, teacher, student = weights(name)
    images = torch.tensor(golden.data["images_nchw"])
    if of == "trained student":
        trained = golden_files.part(golden.data, "final/")
        close(module(golden.arch, trained, reverse=True)(images), golden.data["final_eval/student_logits"])
        return
    if of == "teacher":
        model = module(golden.arch.without_slimming(), teacher)
    else:
        model = module(golden.arch, student, reverse=True)
    logits, outputs = model(images, return_outputs=True)
    close(logits, golden.data[f"eval/{of}_logits"])
    for block, tokens in enumerate(outputs.tokens):
        close(tokens, golden.data[f"eval/{of}_tokens/{block}"])
    for assignment in outputs.assignments:
        np.testing.assert_allclose(assignment.detach().sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_of_the_first_step(name: str) -> None:
    golden, teacher, student = weights(name)
    model = module(golden.arch, student, reverse=True).train()
    images, labels = (torch.tensor(golden.data[f"steps/{key}"][0]) for key in ("images_nchw", "soft_labels"))
    _, outputs = model(images, return_outputs=True)
    for block, tokens in enumerate(model.recover(outputs.tokens)):
        close(tokens, golden.data[f"train0/student_tokens/{block}"])
    terms = losses(golden, model, module(golden.arch.without_slimming(), teacher), images, labels)
    terms["loss"].backward()
    theirs = golden_files.part(golden.data, "train0/grad/")
    largest = max(float(np.abs(value).max()) for value in theirs.values())
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert set(gradients) == set(theirs)
    for key, gradient in theirs.items():
        bound = max(1e-3 * np.abs(gradient).max(), 1e-7 * largest)
        np.testing.assert_allclose(gradients[key], gradient, rtol=0, atol=bound, err_msg=key)


def losses(golden: Golden, student: SiT, teacher: SiT, images: Any, labels: Any) -> dict[str, torch.Tensor]:
    kept = golden.meta["distillation"]
    return distillation_loss(student, teacher, images, labels, kept["lambda_token"], kept["lambda_logits"], kept["tau"])


def weighted(golden: Golden, terms: dict[str, torch.Tensor]) -> list[float]:
    """The terms as the original stores them, times their weights."""
    kept = golden.meta["distillation"]
    factors = {"classification": 1.0, "token": kept["lambda_token"], "logits": kept["lambda_logits"]}
    return [terms[name].item() * factor for name, factor in factors.items()]


@pytest.mark.parametrize("name", TRAINED)
def test_losses_of_every_step(name: str) -> None:
    golden, teacher_state, student_state = weights(name)
    optim = golden.meta["optimizer"]
    teacher = module(golden.arch.without_slimming(), teacher_state)
    student = module(golden.arch, student_state, reverse=True).train()
    undecayed = ("cls_token", "pos_embed", "dist_token", "dist_pos_embed")
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for key, parameter in student.named_parameters():
        if key.startswith("aux_head"):
            continue
        reverse = key.startswith("rtsm.")
        # The original decays everything in the reverse modules, and the slimming scale.
        decays = reverse or (parameter.ndim > 1 and key not in undecayed)
        groups.setdefault((reverse, decays), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": members, "weight_decay": optim["weight_decay"] * decays, "reverse": reverse}
            for (reverse, decays), members in groups.items()
        ],
        eps=optim["eps"],
    )
    batches = zip(golden.data["steps/images_nchw"], golden.data["steps/soft_labels"], strict=True)
    for index, (images, labels) in enumerate(batches):
        rates = golden.data[f"steps/{index}/lr_backbone_rtsm"]
        for group in optimizer.param_groups:
            group["lr"] = float(rates[int(group["reverse"])])
        terms = losses(golden, student, teacher, torch.tensor(images), torch.tensor(labels))
        mine = [terms["loss"].item(), *weighted(golden, terms)]
        np.testing.assert_allclose(mine, golden.data[f"steps/{index}/losses"], rtol=1e-4)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()


def test_distillation_token() -> None:
    golden, teacher_state, student_state = weights("dist_token")
    data = golden.data
    images, labels = torch.tensor(data["images_nchw"]), torch.tensor(data["soft_labels"])
    student = module(golden.arch, student_state, reverse=True).train()
    logits, outputs = student(images, return_outputs=True)
    close(logits, data["train0/logits"])
    close(outputs.distillation_logits, data["train0/dist_logits"])
    teacher = module(golden.arch.without_slimming(), teacher_state)
    terms = losses(golden, student, teacher, images, labels)
    np.testing.assert_allclose(weighted(golden, terms), data["losses"][1:4], rtol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("torch") / "model"
    random_weights.draw(rtsm=True).save(path, with_rtsm=True)
    return path


def test_the_folders_copy_needs_torch_alone(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(folder)!r})
import torch, torch_model
model = torch_model.load({str(folder)!r})
pixels = torch.arange(2 * 32 * 32, dtype=torch.int64).remainder(256).to(torch.uint8).reshape(2, 32, 32, 1)
torch.save(model(model.normalize(pixels)), {str(tmp_path / "logits.pt")!r})
assert not {{"sit_jax", "jax", "safetensors"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-I", "-c", program], check=True, cwd=tmp_path)
    logits = torch.load(tmp_path / "logits.pt")
    pixels = (np.arange(2 * 32 * 32) % 256).reshape(2, 32, 32, 1)
    weights = random_weights.draw()
    expected, _ = jax.jit(build_model(weights.arch).apply)(
        random_weights.variables(weights), jnp.asarray((pixels / 255 - 0.4) / 0.2, jnp.float32)
    )
    close(logits, np.asarray(expected))


def test_the_files_may_be_part_of_a_package(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(folder, tmp_path / "mine")
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from mine import torch_model
assert torch_model.load({str(folder)!r}).rtsm is not None
assert not {{"sit_jax", "jax", "torch_layers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-I", "-c", program], check=True, cwd=tmp_path)


@pytest.mark.parametrize("kept", [slice(0), slice(200), slice(-4)], ids=["empty", "header", "data"])
def test_truncated_weights(kept: slice, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[kept])
    with pytest.raises(ValueError, match=r"model.safetensors"):
        load(tmp_path)


def test_compile_and_export_for_any_batch(folder: pathlib.Path) -> None:
    model = load(folder)
    images = torch.tensor(random_weights.images(tiny.STUDENT, 5)).permute(0, 3, 1, 2)
    expected = model(images).detach().numpy()
    # Tracing by torch.compile is what could fail; the code generator behind it is torch's own affair.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(compiled(images), expected)
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for count in (1, 3, 5):
        close(program.module()(images[:count]), expected[:count])


def test_batch_norm_folds_and_drop_path_drops(folder: pathlib.Path) -> None:
    images = torch.tensor(random_weights.images(tiny.STUDENT, 64)).permute(0, 3, 1, 2)
    model = load(folder, drop_path=0.9)
    expected = model(images)
    folded = fold_batch_norm(load(folder))
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in folded.modules())
    close(folded(images), expected.detach().numpy())
    torch.manual_seed(0)
    blocks: list[Any] = list(model.blocks)
    assert [round(block.drop_path, 6) for block in blocks] == [0.0, 0.3, 0.6, 0.9]
    last = blocks[3].train()
    tokens = torch.randn(2000, 3, 16)
    moved = ((last(tokens) - tokens).abs().amax((1, 2)) > 0).float().mean().item()
    assert moved == pytest.approx(1 - 0.9**2, abs=0.03)
    with torch.no_grad():  # One branch alone is dropped, or rescaled by 1 / (1 - 0.9).
        for parameter in last.mlp.fc2.parameters():
            parameter.zero_()
        dropped = (last(tokens) - tokens).abs().amax((1, 2))
        whole = (last.eval()(tokens) - tokens).abs().amax((1, 2))
    assert sorted({round(x, 2) for x in (dropped / whole).tolist()}) == [0.0, 10.0]


def test_an_unknown_stem() -> None:
    values = describe(tiny.STUDENT, {})
    values["architecture"]["stem"] = "conv9"
    with pytest.raises(ValueError, match="'conv9' is not known"):
        SiT(values)


def test_fine_tuning_groups() -> None:
    model = SiT(describe(dataclasses.replace(tiny.STUDENT, aux_head=True), {}), reverse=True)
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.05, rtsm_lr_scale=5.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {(g["lr"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}
    assert set(found) == {(1e-3, 0.05), (1e-3, 0.0), (5e-3, 0.05), (5e-3, 0.0)}
    assert {"cls_token", "pos_embed", "tsm.0.scale", "norm.weight", "head.bias"} <= found[1e-3, 0.0]
    assert all(name.startswith("rtsm.") for name in found[5e-3, 0.05] | found[5e-3, 0.0])
    assert not any(name.startswith("aux_head") for members in found.values() for name in members)
    assert {"head.weight", "patch_embed.conv1.weight"} <= found[1e-3, 0.05]

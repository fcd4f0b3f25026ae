"""The Python interface: models by name, from files, and slimmed."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights

import sit_jax
from sit_jax.errors import ConfigError
from sit_jax.models import build_model
from sit_jax.models.variants import VARIANTS

SMALL = {"image_size": 32, "dim": 16, "num_heads": 2, "num_classes": 7}


def test_importing_loads_nothing() -> None:
    program = (
        "import sys, sit_jax; assert not {'jax', 'flax', 'numpy'} & set(sys.modules); "
        "assert {'create_model', 'load', 'list_models', 'slim', 'Model'} <= set(dir(sit_jax)); "
        "assert not hasattr(sit_jax, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_models_by_name() -> None:
    assert sit_jax.list_models() == list(VARIANTS)
    model, other = (sit_jax.create_model("deit_tiny", seed=seed, depth=1, **SMALL) for seed in (0, 1))
    assert model.arch.num_classes == 7
    images = random_weights.images(model.vit, 2)
    logits = model(images)
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    expected = jax.jit(build_model(model.arch).apply)(model.variables, jnp.asarray(images))[0]
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert not np.allclose(other.variables["params"]["class_token"], model.variables["params"]["class_token"])
    with pytest.raises(ConfigError, match="sit_small"):  # What may be meant.
        sit_jax.create_model("sit_smal")
    with pytest.raises(ConfigError, match="colour"):
        sit_jax.create_model("sit_small", colour="red")


def test_slimming_a_teacher() -> None:
    teacher = sit_jax.create_model("deit_tiny", seed=3, depth=4, **SMALL)
    student = sit_jax.slim(teacher, keep_ratio=0.7, after=(1, 2, 3))
    assert student.vit.stage_blocks == (1, 1, 1, 1)
    assert student.vit.token_counts == (4, 2, 1, 1)
    own = {"slimming_0", "slimming_1", "slimming_2"}
    assert set(student.variables["params"]) == set(teacher.variables["params"]) | own
    for name, value in teacher.variables["params"].items():
        jax.tree.map(np.testing.assert_array_equal, student.variables["params"][name], value)
    assert student(random_weights.images(teacher.vit, 2)).shape == (2, 7)
    with pytest.raises(ConfigError) as raised:
        sit_jax.slim(student)
    assert raised.value.key == "teacher"
    for after in ((), (0, 3), (2, 1), (3, 4)):
        with pytest.raises(ConfigError) as raised:
            sit_jax.slim(teacher, after=after)
        assert raised.value.key == "after"
    with pytest.raises(ConfigError, match="keep_ratio"):
        sit_jax.slim(teacher, keep_ratio=1.5, after=(1,))


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_the_papers_student_is_its_teacher_slimmed(name: str) -> None:
    # As narrow as the stem allows, to save time.
    arch, student = (
        dataclasses.replace(x, dim=8 * x.num_heads) for x in (VARIANTS[f"lvvit_{name}"], VARIANTS[f"sit_{name}"])
    )
    after = tuple(block + 1 for block in student.slimming)
    teacher = sit_jax.Model(arch, random_weights.variables(random_weights.draw(arch)))
    assert sit_jax.slim(teacher, 0.5, after).arch == student


def test_pixels_of_another_type() -> None:
    model = random_weights.draw()
    with pytest.raises(ValueError, match=r"int64.*uint8"):
        model(random_weights.pixels(model.vit, 2).astype(np.int64))

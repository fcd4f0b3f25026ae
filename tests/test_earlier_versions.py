"""What an earlier version wrote opens and gives the same numbers (tests/earlier/README.md)."""

import pathlib
import tarfile

import jax
import numpy as np
import optax
import pytest

import sit_jax
from sit_jax.cli import app as cli
from sit_jax.io.load import load
from sit_jax.io.runs import read_config
from sit_jax.parallel import sharding
from sit_jax.training.checkpoint import Checkpoints
from sit_jax.training.step import abstract_state, make_train_spec

ARCHIVES = sorted(pathlib.Path(__file__).with_name("earlier").glob("*.tar.xz"))


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name, scope="module")
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(request.param) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize(
    ("name", "place", "ema"),
    [
        ("run", "run", False),
        ("ema", "run", True),
        ("teacher", "run/teacher", False),
        ("model", "model", False),
        ("stablehlo", "model.stablehlo", False),
    ],
)
def test_models_give_the_same_logits(written: pathlib.Path, name: str, place: str, ema: bool) -> None:
    with np.load(written / "logits.npz") as known:
        pixels, expected = known["pixels"], known[name]
    np.testing.assert_allclose(load(written / place, ema=ema).logits(pixels), expected, rtol=0, atol=1e-5)
    if place != "model.stablehlo":
        model = sit_jax.load(written / place, ema=ema)
        np.testing.assert_allclose(model(pixels), expected, rtol=0, atol=1e-5)


def test_configs_and_checkpoints(written: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = read_config(written / "run")
    # Their keys had other names.
    for data in (config.data, load(written / "model").data):
        assert (data.on_decode_error, data.val_fraction) == ("skip", 0.25)
    assert config.optim.decay_like_original
    assert capsys.readouterr().err == ""
    assert cli.main(["checkpoint", "verify", "--workdir", str(written / "run")]) == 0


def test_a_training_resumes(written: pathlib.Path) -> None:
    mesh = sharding.make_mesh()
    spec = make_train_spec(read_config(written / "run"), steps_per_epoch=1)
    with Checkpoints(written / "run") as checkpoints:
        state = checkpoints.restore(sharding.place_abstract(mesh, abstract_state(spec)))
    rtsm = load(written / "run", with_rtsm=True).rtsm
    jax.tree.map(np.testing.assert_array_equal, state.params["rtsm"], rtsm)
    moments = optax.tree.get(state.opt_state, "mu")["rtsm"]
    assert jax.tree.map(np.shape, moments) == jax.tree.map(np.shape, rtsm) != {}

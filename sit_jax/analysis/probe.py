"""Probes: how well frozen features tell the classes of images apart."""

from collections.abc import Mapping

import numpy as np

from sit_jax.config import DataConfig
from sit_jax.data.pipeline import check_has_classes
from sit_jax.data.registry import open_source
from sit_jax.errors import require
from sit_jax.io.model import Model
from sit_jax.training.evaluate import model_features
from sit_jax.training.metrics import nearest_neighbours, unit_vectors


def knn_accuracy(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, k: int = 5
) -> float:
    """Returns the accuracy of a vote of the k training images with the most similar features, by cosine similarity.

    Features are (images, width), labels class indices (images,). Among classes with equally many votes, the one with
    the lowest index wins.
    """
    votes = train_labels[nearest_neighbours(unit_vectors(test), unit_vectors(train), min(k, len(train)))]
    counts = (votes[:, :, None] == np.arange(train_labels.max() + 1)).sum(axis=1)
    return float((counts.argmax(axis=1) == test_labels).mean())


def linear_probe(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, c: float = 1.0
) -> float:
    """Returns the accuracy of a logistic regression on standardized features; arguments as `knn_accuracy`.

    `c` is the inverse of the L2 penalty of the weights, as in scikit-learn.
    """
    from sklearn.linear_model import LogisticRegression  # The import takes a second.
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
    return float(probe.fit(train, train_labels).score(test, test_labels))


def probe_models(models: Mapping[str, Model], data: DataConfig) -> dict[str, dict[str, float]]:
    """Returns the accuracies of both probes, `knn` and `linear`, for each model.

    They are fitted on the training split of a data set with classes, and measured on its evaluation split. Raises
    a UserError if the data cannot be read or has no classes, or a model is not a vision transformer.
    """
    source = open_source(data, data.eval_split)
    check_has_classes(data, source, "name a data set with classes, such as --name folder --data_dir IMAGES")
    require(not source.multi_label, "data.name", f"{data.name} has several correct classes per image")
    result = {}
    for name, model in models.items():
        splits = [model_features(model, data, split, labels=True) for split in (data.train_split, data.eval_split)]
        arrays = [x[split.valid] for split in splits for x in (split.values, split.labels)]
        result[name] = {"knn": knn_accuracy(*arrays), "linear": linear_probe(*arrays)}
    return result

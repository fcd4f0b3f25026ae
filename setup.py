"""The configs become a part of the package when it is built; all else about the package is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["sit_jax*"]), "sit_jax.configs"], package_dir={"sit_jax.configs": "configs"})

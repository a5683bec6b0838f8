"""Maps kernels/amp to the package fastamp.kernels; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastamp", "fastamp.*"]), "fastamp.kernels"],
    # The kernels live one level down in a folder without __init__.py: a top-level package named
    # "kernels" would shadow Hugging Face's distribution of that name when the checkout is on sys.path.
    package_dir={"fastamp.kernels": "kernels/amp"},
    package_data={"fastamp": ["py.typed", "paper/published.tsv"]},
)

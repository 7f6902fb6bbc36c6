"""The package mapping, which pyproject.toml cannot express beside automatic discovery; everything else stands there."""

from setuptools import find_packages, setup

inside = ["vlattn_fast", *(f"vlattn_fast.{name}" for name in find_packages("vlattn_fast"))]

setup(
    packages=[*inside, "vlattn_fast.kernels", "vlattn_fast.benchmarks"],
    package_dir={"vlattn_fast": "vlattn_fast", "vlattn_fast.kernels": "kernels", "vlattn_fast.benchmarks": "benchmarks"},
)

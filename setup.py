from setuptools import setup

FOLDERS = ["engine", "engine/backends", "kernels", "training", "training/nnunet_trainers", "benchmarks"]

setup(
    packages=["nnturbo." + folder.replace("/", ".") for folder in FOLDERS],
    package_dir={"nnturbo." + folder.replace("/", "."): folder for folder in FOLDERS},
    package_data={"nnturbo.engine": ["py.typed", "report.html"], "nnturbo.kernels": ["py.typed", "cuda/*", "cpu/*"]},
)

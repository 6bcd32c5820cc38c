from setuptools import find_packages, setup

FOLDERS = ["engine", "kernels", "training", "benchmarks"]
packages = [*FOLDERS, *(f"{folder}.{package}" for folder in FOLDERS for package in find_packages(folder))]
packages.append("training.nnunet_trainers")  # nnU-Net looks into it, and wants no package there

setup(
    packages=[f"nnturbo.{package}" for package in packages],
    package_dir={f"nnturbo.{package}": package.replace(".", "/") for package in packages},
    package_data={
        "nnturbo.engine": ["py.typed"],
        "nnturbo.engine.jobs": ["report.html"],
        "nnturbo.kernels": ["py.typed", "cuda/*", "cpu/*"],
    },
)

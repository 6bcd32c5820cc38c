from setuptools import find_packages, setup

FOLDERS = ["engine", "kernels", "training", "benchmarks"]
packages = [*FOLDERS, *(f"{folder}.{package}" for folder in FOLDERS for package in find_packages(folder))]
packages.append("training.nnunet_trainers")  # nnU-Net looks into it, and wants no package there

setup(
    packages=["nnturbo", *(f"nnturbo.{package}" for package in packages)],
    package_dir={"nnturbo": "nnturbo", **{f"nnturbo.{package}": package.replace(".", "/") for package in packages}},
    package_data={
        "nnturbo": ["py.typed"],
        "nnturbo.engine.jobs": ["report.html"],
        "nnturbo.kernels": ["cuda/*", "cpu/*"],
    },
    # An editable install is a folder of links, which type checkers follow and no folder of the same name hides.
    options={"editable_wheel": {"mode": "strict"}},
)

"""Put the folders of backends/ into the package: backends/torch is installed as polywhiten.torch."""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = {"polywhiten": "polywhiten"}
FOLDERS |= {
    f"polywhiten.{file.parent.name}": f"backends/{file.parent.name}" for file in Path("backends").glob("*/__init__.py")
}

setup(
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in (package, *(f"{package}.{sub}" for sub in find_packages(folder)))
    ],
    package_dir=FOLDERS,
)

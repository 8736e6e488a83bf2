"""What polywhiten says of NumPy; see `polywhiten.cli.about.About`."""

MODULE = "numpy"
TITLE = "NumPy"
EXTRAS = ("numba",)


def devices() -> list[str]:
    return ["cpu"]

"""What polywhiten says of Dask; see `polywhiten.cli.about.About`."""

MODULE = "dask"
TITLE = "Dask"
EXTRAS = ("dask",)


def devices() -> list[str]:
    return ["those of its chunks"]

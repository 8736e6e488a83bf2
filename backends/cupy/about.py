"""What polywhiten says of CuPy; see `polywhiten.cli.about.About`."""

MODULE = "cupy"
TITLE = "CuPy"
EXTRAS = ("cupy13", "cupy12")


def devices() -> list[str]:
    from cupy.cuda import runtime

    try:
        return [f"cuda:{i}" for i in range(runtime.getDeviceCount())]
    except runtime.CUDARuntimeError as error:  # there is no driver, or it doesn't fit
        return [f"none: {str(error).partition(':')[0]}"]

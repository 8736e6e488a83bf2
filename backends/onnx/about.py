"""What polywhiten says of ONNX; see `polywhiten.cli.about.About`."""

MODULE = "onnx"
TITLE = "ONNX"
EXTRAS = ("onnx",)


def devices() -> list[str]:
    return ["those of the runtime"]

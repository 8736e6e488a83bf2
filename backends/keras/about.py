"""What polywhiten says of Keras; see `polywhiten.cli.about.About`."""

MODULE = "keras"
TITLE = "Keras 3"
EXTRAS = ("keras",)


def devices() -> list[str]:
    import keras

    return [f"those of {keras.backend.backend()}"]

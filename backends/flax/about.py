"""What polywhiten says of Flax; see `polywhiten.cli.about.About`."""

MODULE = "flax"
TITLE = "Flax"
EXTRAS = ("flax",)


def devices() -> list[str]:
    return ["those of jax"]

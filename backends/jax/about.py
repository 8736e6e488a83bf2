"""What polywhiten says of JAX; see `polywhiten.cli.about.About`."""

MODULE = "jax"
TITLE = "JAX"
EXTRAS = ("jax",)


def devices() -> list[str]:
    import jax

    return [f"{device.platform}:{device.id}" for device in jax.devices()]

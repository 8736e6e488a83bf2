"""What polywhiten says of TensorFlow; see `polywhiten.cli.about.About`."""

MODULE = "tensorflow"
TITLE = "TensorFlow"
EXTRAS = ("tensorflow",)


def devices() -> list[str]:
    import tensorflow as tf

    found = tf.config.list_physical_devices()  # unlike logical ones, they aren't initialized
    return [device.name.removeprefix("/physical_device:").lower() for device in found]

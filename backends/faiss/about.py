"""What polywhiten says of FAISS; see `polywhiten.cli.about.About`."""

MODULE = "faiss"
TITLE = "FAISS"
EXTRAS = ("faiss",)


def devices() -> list[str]:
    return ["those of its indexes"]

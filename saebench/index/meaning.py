"""What names mean, by a static embedding model that a user has on disk (model2vec): nothing is downloaded."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float


class Meaning:
    """Vectors of some texts, to be searched by others."""

    def __init__(self, folder: Path, texts: Sequence[str]) -> None:
        """Raises ValueError where model2vec is not installed, or the folder has no model of it."""
        try:
            from model2vec import StaticModel
        except ImportError as error:
            raise ValueError("a search by meaning needs model2vec: pip install 'saebench[meaning]'") from error
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; expected a static embedding model, as model2vec saves it")
        try:
            self._model = StaticModel.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder} cannot be read as a static embedding model of model2vec ({error})") from error
        self._named = np.array([bool(text) for text in texts])
        self._vectors_FE = self._unit(list(texts))

    def likeness(self, text: str) -> Float[np.ndarray, " F"]:
        """The cosine of each of the texts with one more; NaN where there is none, or nothing that the model knows."""
        found = self._vectors_FE @ self._unit([text])[0]
        return np.where(self._named, found, np.nan)

    def _unit(self, texts: list[str]) -> Float[np.ndarray, "n E"]:
        vectors = np.asarray(self._model.encode(texts), np.float32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.divide(vectors, norms, out=np.full_like(vectors, np.nan), where=norms > 0)

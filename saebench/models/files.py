"""The files of a language model: where they lie, which hold weights, and its tokenizer."""

from pathlib import Path
from typing import Any

from saebench.files import first_line, read_json

EMBEDDED_MODEL = "embedded"
EMBEDDED_MODEL_PATH = Path(__file__).parent.parent / "demo" / "model"

_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
_WEIGHT_INDEX = "pytorch_model*.bin.index.json"  # may name others
_TOKENIZER_FILES = (
    "tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "spiece", "chat_template",
)  # fmt: skip


def model_path(name: str) -> str:
    """A path or hub id: the name itself, but for the embedded model."""
    return str(EMBEDDED_MODEL_PATH) if name == EMBEDDED_MODEL else name


def path_of(name: str) -> str:
    """The folder or hub id of a model. Raises ValueError for what can only be a folder, and is none."""
    path = Path(model_path(name)).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith((".", "/", "~")):
        raise ValueError(
            f"model {name!r} is not a directory; give a folder made by save_pretrained, 'embedded' or a hub id"
        )
    return model_path(name)


def checkpoint_folder(path: str, revision: str | None) -> Path:
    """Where the files of a loaded model lie: the folder given, or the hub's local snapshot."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(path, revision=revision, allow_patterns=["*.json", "*.txt", "*.model"], local_files_only=True)
    )


def weight_files(folder: Path) -> list[Path]:
    """What holds weights: *.bin may as well be the state of an optimizer, arguments of a training, or a tokenizer."""
    files = {file for pattern in _WEIGHT_PATTERNS for file in folder.glob(pattern)}
    for index in folder.glob(_WEIGHT_INDEX):
        files |= {folder / name for name in read_json(index)["weight_map"].values()}
    return sorted(file for file in files if file.exists())


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model alone. Raises ValueError where it cannot be loaded."""
    return _load_tokenizer(name, path_of(name), {})


def _load_tokenizer(name: str, path: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:
        raise ValueError(f"the tokenizer of model {name!r} cannot be loaded: {first_line(error)}") from error


def tokenizer_of(name: str, path: str, options: dict[str, Any]) -> tuple[Any, tuple[Path, ...]]:
    """(the tokenizer, its files); (None, none) where the model came without."""

    def files() -> tuple[Path, ...]:
        folder = checkpoint_folder(path, options["revision"])
        return tuple(sorted(file for file in folder.iterdir() if file.name.startswith(_TOKENIZER_FILES)))

    if Path(path).is_dir() and not files():
        return None, ()
    try:
        tokenizer = _load_tokenizer(name, path, options)  # from the hub its files are fetched here
    except ValueError:
        if files():
            raise
        return None, ()
    return (tokenizer if files() else None), files()

"""What a graph is traced with, as it lies on disk: the dictionaries of a set, the model that they are of, the names of latents."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from saebench.circuits.export import Named
from saebench.circuits.graph import Graph
from saebench.circuits.replacement import Replacement
from saebench.evaluate.measure import Dictionary
from saebench.evaluate.sets import ends_of_set, set_of
from saebench.index import IndexConfig, open_feature_index
from saebench.index.explanations import read_explanations
from saebench.index.names import Names
from saebench.index.needs import read_needs
from saebench.index.notes import Notes
from saebench.models import LanguageModel, check_hook, choose_device, load_model, widths_of
from saebench.sae import Ends, ends_of, load_sae, read_config
from saebench.sae.formats.circuit_tracer import members as set_files
from saebench.store.source import check_origin, origin_of


def open_set(run: Path, name: str, device: str | None = None) -> list[Dictionary]:
    """The dictionaries of a run's set, or of the folder of one of circuit-tracer's. Raises ValueError where there are none, and as `ends_of_set`."""
    members: dict[Path, Ends] = {}
    sets: set[str] = set()
    for path in sorted((run / "saes").glob("*/cfg.json")):
        settings = read_config(path.parent)
        of, _ = set_of(path.parent, settings)
        sets |= {of} - {""}
        if of == name:
            members[path.parent] = ends_of(path.parent, settings)
    if not members:
        members = {file: ends_of(file, read_config(file)) for file in set_files(Path(name))}
    if not members:
        known = f"it has {', '.join(sorted(sets))}" if sets else "none of its SAEs says metadata.set in its cfg.json"
        raise ValueError(
            f"{run} has no set {name!r}; {known}, and there is no folder of circuit-tracer's of that name. "
            "Train one with `train --kind transcoder` or `--kind clt`"
        )
    ends_of_set(name, members)
    device = choose_device(device)
    return [Dictionary(folder, load_sae(folder, device=device), ends) for folder, ends in members.items()]


def token_of(model: LanguageModel, text: str) -> int:
    """The one token that a text is. Raises ValueError where it is none, or several, or one beyond the model's embedding."""
    ids = model.encoder.encode([text])[0]
    if len(ids) != 1:
        pieces = ", ".join(repr(model.tokenizer.decode([id])) for id in ids)
        raise ValueError(
            f"target {text!r} is {len(ids)} tokens of model {model.id!r}{': ' * bool(ids)}{pieces}; expected one, with the space before it"
        )
    model.check_tokens(list(ids))
    return int(ids[0])


def model_of(
    members: Sequence[Dictionary],
    given: str | None = None,
    device: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """The model that all members are of, in float32, from where it is `given` to be or as their files say. Raises ValueError where they are of several, or do not fit it."""
    origins = {one.folder: origin_of(one.folder) for one in members}
    for folder, origin in origins.items():
        if origin is None:
            raise ValueError(
                f"{folder} does not say which model it is of: add metadata.model_name to its cfg.json, or model_name to circuit-tracer's config.yaml"
            )
        first_folder, first = next(iter(origins.items()))
        assert first is not None
        if (origin.name, origin.weights) != (first.name, first.weights):
            raise ValueError(
                f"{first_folder} is of model {first.name!r}, {folder} of {origin.name!r}; expected a set of one model"
            )
    _, origin = next(iter(origins.items()))
    assert origin is not None
    device = choose_device(device)
    model = load_model(
        given or origin.name,
        device=device,
        dtype="float32",
        revision=origin.revision,
        trust_remote_code=trust_remote_code,
    )
    check_origin(model, origin)
    for one in members:
        for hook in one.ends.hooks:
            check_hook(model, hook)
        read, *written = widths_of(model, one.ends.hooks).values()
        if one.sae.d_in != read or one.sae.parts != tuple(written):
            raise ValueError(
                f"{one.folder} reads {one.sae.d_in} and writes {one.sae.parts}, model {model.id!r} has {read} and {tuple(written)} there; "
                "it is of another model"
            )
    return model


@contextlib.contextmanager
def names_of(replacement: Replacement, graph: Graph) -> Iterator[Named]:
    """What latents are called in the indexes of their dictionaries; nothing where there is none, or none that fits."""
    with contextlib.ExitStack() as stack:
        known: dict[int, Names] = {}
        for number, one in enumerate(replacement.members):
            path = IndexConfig(sae=one.folder).path
            if not path.exists():
                continue
            with contextlib.suppress(ValueError):
                index = stack.enter_context(open_feature_index(path, sae=one.folder, need_store=False))
                notes = Notes(path.with_suffix(".notes.json"), index.identity["sae"], index.d_sae)
                known[number] = Names(index, notes, read_explanations(index), read_needs(index))

        def named(node: int) -> str:
            names = known.get(int(graph.latents.member[node]))
            return "" if names is None else f"‘{names[int(graph.latents.latent[node])].text}’"

        yield named

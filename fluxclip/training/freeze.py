"""What a run trains: patterns over the names of a model's weights."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from fluxclip.model.fluxclip import FluxCLIP

_TEMPERATURE = "log_scale"


def set_trained(model: FluxCLIP, patterns: Sequence[str]) -> None:
    """Freeze what the patterns match; with "!" ahead they train it again; the last match counts.

    patterns: as in a shell, over the names in the saved weights; `*` crosses dots too, so that
    `video.*` is the whole tower. A text tower that is only referred to is frozen from the start.
    Raises ValueError for a pattern that matches nothing, with the nearest names, for one that would
    train a referred text tower, and where nothing is left to train that changes a ranking.
    """
    parameters = dict(model.named_parameters())
    is_trained = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        matches = [name for name in parameters if fnmatchcase(name, wanted)]
        if not matches:
            raise ValueError(f"freeze: no weight is called {wanted!r}; {_nearest(wanted, model)}")
        is_trained.update(dict.fromkeys(matches, pattern.startswith("!")))
        if not model.text_is_stored and any(is_trained[n] for n in matches if _is_text(n)):
            raise ValueError(
                f"freeze: {pattern!r} would train the text tower, whose weights are only referred "
                f'to (text.weights = "reference"): name less, or train a model that stores it '
                f'([text] weights = "stored", without init)'
            )
    if not any(own for name, own in is_trained.items() if name != _TEMPERATURE):
        raise ValueError(
            f"freeze = {list(patterns)} leaves nothing to train, or the temperature alone, which "
            f"changes no ranking"
        )
    for name, parameter in parameters.items():
        parameter.requires_grad_(is_trained[name])


def _is_text(name: str) -> bool:
    return name.startswith("text.")


def _nearest(wanted: str, model: FluxCLIP) -> str:
    """What a pattern that matches nothing may have meant."""
    names = [name for name, _ in model.named_parameters()]
    parts = {
        ".".join(name.split(".")[:n]) + ".*"
        for name in names
        for n in range(1, name.count(".") + 1)
    }
    found = difflib.get_close_matches(wanted, sorted(parts | {*names}), n=3)
    if found:
        return f"the nearest are {', '.join(found)}"
    top = dict.fromkeys(name.partition(".")[0] + ".*" * ("." in name) for name in names)
    return f"the parts are {', '.join(top)}"

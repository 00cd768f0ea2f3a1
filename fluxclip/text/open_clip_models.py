"""Image-text models of open_clip, looked up and loaded in one way by all that use them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def config(name: str) -> dict[str, Any]:
    """The settings of an open_clip configuration; ValueError for an unknown one."""
    import open_clip  # costs seconds to import: only who uses it pays

    found = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if found is None:
        raise ValueError(
            f"unknown open_clip model {name!r}: `python -c 'import open_clip; "
            f"print(open_clip.list_models())'` lists the known ones"
        )
    settings: dict[str, Any] = found
    return settings


def load(name: str, pretrained: str, **options: Any) -> Any:
    """open_clip's model with weights.

    pretrained: one of the tags of `name` (fetched on first use), or a file, which is read without
    running code in it. options: further ones of `open_clip.create_model`. Raises ValueError or
    FileNotFoundError in one line.
    """
    import open_clip

    source, settings = f"open_clip:{name}/{pretrained}", config(name)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained in tags:
        _check_gelu(name, pretrained, settings)
    elif not Path(pretrained).is_file():
        raise FileNotFoundError(
            f"{source}: no such weights file, and no tag of {name}; its tags: "
            f"{', '.join(tags) or 'none'}"
        )
    try:
        return open_clip.create_model(name, pretrained=pretrained, weights_only=True, **options)
    except Exception as error:  # a damaged file can fail in any way
        # which tensors do not fit stands in the lines behind the first
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{source} does not load: {reason[:300]}") from error


def are_cut(tokenizer: Any, texts: Sequence[str], *, limit: int) -> list[bool]:
    """Which texts one of open_clip's tokenizers cuts at `limit` tokens."""
    # whichever it is: what was cut differs when there is room for one token more
    cut_BL = tokenizer(list(texts), context_length=limit)
    longer_BL = tokenizer(list(texts), context_length=limit + 1)
    is_cut_B: list[bool] = (cut_BL != longer_BL[:, :limit]).any(dim=1).tolist()
    return is_cut_B


def _check_gelu(name: str, tag: str, settings: dict[str, Any]) -> None:
    """Raise ValueError if the weights were trained with another GELU than the configuration has.

    open_clip only warns, and computes something else than the weights were trained for.
    """
    import open_clip

    is_quick = settings.get("quick_gelu", False)
    other = name.removesuffix("-quickgelu") if is_quick else f"{name}-quickgelu"
    wants_quick = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
    # where there is only one configuration, the tag just does not say
    if wants_quick != is_quick and other != name and other in open_clip.list_models():
        raise ValueError(
            f"the weights {tag!r} are not for {name}, whose GELU is another: use {other}/{tag}"
        )

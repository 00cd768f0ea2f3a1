"""What can be done to captions before a model reads them."""

_DELETED = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~"), "-": " ", "/": " "})


def clean_up(text: str) -> str:
    """A caption in lower case without punctuation, as VindLU, UMT and InternVideo2 read it.

    `-` and `/` become spaces, `<person>` becomes `person`, runs of white space a single space.
    """
    return " ".join(text.lower().translate(_DELETED).replace("<person>", "person").split())

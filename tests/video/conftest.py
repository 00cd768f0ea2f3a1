"""Every decoder that this machine can load."""

import pytest

from fluxclip import plugins

_FOLDER = "fluxclip.video.decoders"


@pytest.fixture(params=plugins.available(_FOLDER))
def decoder(request: pytest.FixtureRequest) -> str:
    """The name of a decoder; skips those that cannot be loaded here, saying why."""
    return _loaded(request.param)


@pytest.fixture(params=sorted(set(plugins.available(_FOLDER)) - {"pyav"}))
def other_decoder(request: pytest.FixtureRequest) -> str:
    """The name of a decoder besides the one that the others are held to."""
    return _loaded(request.param)


def _loaded(name: str) -> str:
    if name != "pyav":
        try:
            plugins.load(_FOLDER, name)
        except ValueError as error:
            pytest.skip(str(error))
    return name

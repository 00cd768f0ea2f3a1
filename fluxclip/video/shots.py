"""Where a video cuts from one shot to the next, judged by PySceneDetect (extra `shots`).

Frames come from the decoders of FluxCLIP, small, in the order of time, and are not kept.
PySceneDetect's AdaptiveDetector compares how much a picture differs from the one before with how
much its neighbours do, so that a camera that moves is no cut.
"""

from pathlib import Path
from types import ModuleType

import numpy as np

from fluxclip.video.reader import read_on

# Every frame of most videos. Of faster ones some are left out: a cut is found 1/30 s late at most.
FRAMES_PER_S = 30
SIDE = 64  # pixels; at 128 the same cuts are found in nearly twice the time

# By how much, 0 to 255 over hue, saturation and brightness, pictures must differ to be a cut, and
# how many times as much as their two neighbours on each side do. The least change was chosen on 80
# training clips of the animated emoji, joined to 8 videos (scripts/bench_moments.py): from 15 to 24
# all 72 cuts are found and no others; at 12 there is a false one, at 27 two are missed. In the film
# of the assets, any from 10 to 18 finds the same cuts.
LEAST_CHANGE = 18.0
TIMES_THE_NEIGHBOURS = 3.0
NEIGHBOURS = 2


def cut_times_s(path: str | Path) -> list[float]:
    """When each shot but the first begins: presentation times of first frames, ascending.

    In seconds from the first frame of the video, above 0. A still has no cuts. The video is read
    from end to end, in memory that does not grow with it. Raises ValueError where PySceneDetect is
    not installed, and what `read_clip` does.
    """
    detectors, common = _library()
    detector = detectors.AdaptiveDetector(
        adaptive_threshold=TIMES_THE_NEIGHBOURS,
        min_content_val=LEAST_CHANGE,
        window_width=NEIGHBOURS,
        min_scene_len=0,  # `shots` of `segments.py` sees to short ones
    )
    found: list[float] = []
    for clip in read_on(path, step_s=1 / FRAMES_PER_S, side=SIDE):
        frames_THWC = np.ascontiguousarray(clip.frames_THWC[..., ::-1])  # it wants BGR
        for picture_HWC, time_s in zip(frames_THWC, clip.times_s.tolist(), strict=True):
            timecode = common.FrameTimecode(time_s, float(FRAMES_PER_S))
            found += [cut.seconds for cut in detector.process_frame(timecode, picture_HWC)]
    return [time_s for time_s in found if time_s > 0]


def check_installed() -> None:
    """Raise ValueError where PySceneDetect is not installed."""
    _library()


def _library() -> tuple[ModuleType, ModuleType]:
    try:
        from scenedetect import common, detectors
    except ImportError as error:
        raise ValueError(
            f"to cut by shots, install PySceneDetect: pip install 'fluxclip[shots]' ({error})"
        ) from error
    return detectors, common

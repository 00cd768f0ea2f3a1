"""Video files to clips: `read_clip(path, num_frames=8, side=112) -> Clip`.

Importing this loads NumPy only. Decoders are loaded when a file is read; what runs on tensors is in
`fluxclip.video.transforms`.
"""

from fluxclip.video.clip import Clip, VideoError, VideoInfo
from fluxclip.video.framing import Box, Fit
from fluxclip.video.reader import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    is_image,
    is_there,
    probe,
    probe_and_read,
    read_clip,
)
from fluxclip.video.sampling import evenly_spread, random_crop, random_per_part
from fluxclip.video.segments import Cutting, Segment, windows

__all__ = [
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "Box",
    "Clip",
    "Cutting",
    "Fit",
    "Segment",
    "VideoError",
    "VideoInfo",
    "evenly_spread",
    "is_image",
    "is_there",
    "probe",
    "probe_and_read",
    "random_crop",
    "random_per_part",
    "read_clip",
    "windows",
]

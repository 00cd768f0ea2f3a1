"""Filters, one file each: what of a clip's pixels is worth a token, decided before any network.

A file has `Settings`, a class made with `fluxclip.settings.settings`, and
`keep(frames_BTHWC, settings, *, patch, tubelet) -> (mask_BNL, run_length_BNL)`: bool, True where
the token is kept, and int64, how many time steps a kept token stands for (0 where dropped). The
first step of every place is kept, so that each dropped token belongs to a kept one before it.
"""

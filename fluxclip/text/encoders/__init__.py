"""Text encoders, one file each: `load(source, *, max_tokens) -> TextEncoder`.

`example(folder) -> str` is a source that loads without a network, small where there is a choice; it
may write what it needs into `folder`. The contract tests load every encoder from it.
"""

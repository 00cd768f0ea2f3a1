"""Text encoders, one file each: `load(source, *, max_tokens) -> TextEncoder`."""

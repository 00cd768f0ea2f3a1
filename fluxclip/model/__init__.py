"""Both towers, one space: tensors in, tensors out."""

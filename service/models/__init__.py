"""Encoders and projectors: tensors and numbers in, no config objects."""

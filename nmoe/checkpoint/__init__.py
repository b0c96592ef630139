"""Checkpoints: content-addressed slices of logical tensors, manifests that seal them, one HEAD."""

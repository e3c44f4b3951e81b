"""LoRA files: reading their keys, finding what they change, merging it. Torch-free until read."""

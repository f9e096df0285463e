"""Fused forms behind `torch.library` operators; each has a slow twin in `attention`."""

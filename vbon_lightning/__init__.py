"""PyTorch Lightning modules that align language models to Best-of-N."""

__version__ = "0.1.0"

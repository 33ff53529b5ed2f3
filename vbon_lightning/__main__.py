"""Run ``python -m vbon_lightning`` as ``vbon``."""

from vbon_lightning.cli import main

if __name__ == "__main__":
    main()

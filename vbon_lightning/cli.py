"""The ``vbon`` command: a LightningCLI whose data module names the models once, for every module."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from vbon_lightning.checks import ConfigMismatchError
from vbon_lightning.data import AlignmentDataModule
from vbon_lightning.modules import KLRL, SFT, ReferenceSampler, VBoN

__all__ = ["KLRL", "SFT", "ReferenceSampler", "VBoN", "VbonCLI", "main"]


def _whole_seed(seed: Any) -> int:
    return seed if isinstance(seed, int) and not isinstance(seed, bool) else 0


class VbonCLI(LightningCLI):
    """LightningCLI with one shared data module, linked seeds, and a resume that changes nothing behind your back."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the data module's models and the seed into the module."""
        parser.link_arguments("data.actors", "model.init_args.actors", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=_whole_seed)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_whole_seed)

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as it was given.

        LightningCLI would overwrite it with the checkpoint's hyper-parameters, silently. Here the module and the
        data module compare the two when the checkpoint is loaded, and refuse to go on where they differ.
        """

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; predictions are written to the table, not kept in memory."""
        return super().instantiate_trainer(**kwargs)

    def before_instantiate_classes(self) -> None:
        """Keep predictions out of memory: the reference table has them."""
        if self.subcommand == "predict":
            self.config.predict.return_predictions = False


def run(args: ArgsType = None) -> VbonCLI:
    """Parse arguments and run ``fit``, ``validate``, ``test`` or ``predict``."""
    return VbonCLI(
        LightningModule,
        AlignmentDataModule,
        subclass_mode_model=True,
        subclass_mode_data=False,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "vbon", "description": "Align language models to Best-of-N."},
        args=args,
    )


def main() -> None:
    """Run the command line: LightningCLI's subcommands, and ``compare``."""
    # These speak of Lightning's internals or of choices made on purpose here.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    if sys.argv[1:2] == ["compare"]:
        from vbon_lightning.evaluation.command import main as compare

        compare(sys.argv[2:])
        return
    try:
        run()
    except (ValueError, ConfigMismatchError) as problem:
        if "--traceback" in sys.argv:
            raise
        sys.exit(f"vbon: {type(problem).__name__}: {problem}")

"""The ``vbon`` command: a LightningCLI whose data module names the models once, for every module."""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers.utils import logging as transformers_logging

from vbon_lightning import callbacks  # noqa: F401 (so that a configuration may name them without their module)
from vbon_lightning.data import AlignmentDataModule
from vbon_lightning.loggers import RunLogger
from vbon_lightning.modules import (
    DPO,
    KLRL,
    SFT,
    BoNDistillation,
    BoNSFT,
    ReferenceSampler,
    RewardModelling,
    ValueModelling,
    VBoN,
)
from vbon_lightning.reference_table import ReferenceTableError

__all__ = [
    "DPO",
    "KLRL",
    "SFT",
    "BoNDistillation",
    "BoNSFT",
    "ReferenceSampler",
    "RewardModelling",
    "VBoN",
    "ValueModelling",
    "VbonCLI",
    "main",
    "run",
]

TRACEBACK = "VBON_TRACEBACK"
"""Environment variable: set it to 1 to see where an error comes from."""

_USER_ERRORS = (ValueError, OSError, MisconfigurationException, ReferenceTableError)


def _whole_seed(seed: int | bool) -> int:
    # seed_everything knows True (choose one) and False (none), but noise and data order always need a number.
    return int(seed)


class _Parser(LightningArgumentParser):
    """A parser that says in one line what is wrong, without a page of usage before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error or _wants_traceback():
            super().error(message, ex)
        self.exit(2, f"vbon: {_brief(message)}\n")


def _brief(message: str) -> str:
    """Leave out what jsonargparse says about types and values around the reason."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith(_PADDING)]
    return " ".join(kept) or message


_PADDING = (
    "Does not validate against any of the Union",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a <class 'NoneType'>",
)


def _wants_traceback() -> bool:
    return os.environ.get(TRACEBACK, "0") not in ("", "0")


class _SaveConfig(SaveConfigCallback):
    """Save the configuration beside the logs; without a logger there is no such place."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class VbonCLI(LightningCLI):
    """LightningCLI with one shared data module, linked seeds, and a resume that changes no setting."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the data module's models and the seed into the module."""
        parser.link_arguments("data.actors", "model.init_args.actors", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=_whole_seed)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_whole_seed)

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as it was given.

        LightningCLI would overwrite it with the checkpoint's hyper-parameters, silently. Here the module and
        the data module compare the two when the checkpoint is loaded, and refuse to go on where they differ.
        """

    def before_instantiate_classes(self) -> None:
        """Keep predictions out of memory: the reference table has them."""
        if self.subcommand == "predict":
            self.config.predict.return_predictions = False

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to TensorBoard under a short name of the run, unless a logger was given, or none."""
        trainer = self._get(self.config_init, "trainer")
        if kwargs.get("logger", trainer["logger"]) in (None, True):
            root = trainer["default_root_dir"]
            directory = Path("lightning_logs", type(self.model).__name__.lower()) if root is None else Path(root)
            resumed = self._get(self.config_init, "ckpt_path") if self.subcommand == "fit" else None
            kwargs["logger"] = RunLogger(directory, resumed_from=resumed, method=type(self.model).__name__)
        return super().instantiate_trainer(**kwargs)


def run(args: ArgsType = None) -> VbonCLI:
    """Parse arguments and run ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        args: The arguments, those of the command line by default.
    """
    return VbonCLI(
        LightningModule,
        AlignmentDataModule,
        save_config_callback=_SaveConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        parser_class=_Parser,
        parser_kwargs={
            "prog": "vbon",
            "description": "Align language models to Best-of-N. There are also `vbon compare` (policies and decoders "
            "with Best-of-N), `vbon sample` (responses to take away), `vbon table` (what a reference table holds) and "
            "`vbon dial` (a tilted policy at another N); each has a --help of its own.",
        },
        args=args,
        subclass_mode_model=True,
        subclass_mode_data=False,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )


def quiet() -> None:
    """Silence what speaks of Lightning's internals, of other products, or of choices made on purpose here."""
    for message in (
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*Total length of .list. across ranks is zero.*",  # no validation split was asked for
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    transformers_logging.disable_progress_bar()


def main() -> None:
    """Run the command line: LightningCLI's subcommands, ``compare``, ``sample``, ``table`` and ``dial``."""
    quiet()
    try:
        if sys.argv[1:2] == ["compare"]:
            from vbon_lightning.evaluation.command import main as compare

            compare(sys.argv[2:])
        elif sys.argv[1:2] == ["sample"]:
            from vbon_lightning.commands.sample import main as sample

            sample(sys.argv[2:])
        elif sys.argv[1:2] == ["table"]:
            from vbon_lightning.commands.table import main as table

            table(sys.argv[2:])
        elif sys.argv[1:2] == ["dial"]:
            from vbon_lightning.dialling import main as dial

            dial(sys.argv[2:])
        else:
            run()
    except _USER_ERRORS as problem:
        if _wants_traceback():
            raise
        # jsonargparse wraps what a constructor raises.
        while isinstance(problem.__cause__, _USER_ERRORS) and str(problem).startswith(_PADDING):
            problem = problem.__cause__
        sys.exit(f"vbon: {problem}{_where(problem)}")


def _where(problem: BaseException) -> str:
    """Say where an error comes from if that is somebody's own code, which its text may not tell."""
    if str(problem).endswith(f"{TRACEBACK}=1 shows the way there"):
        return ""
    ours = str(Path(__file__).parent)
    for frame in reversed(traceback.extract_tb(problem.__traceback__)):
        if frame.filename.startswith(ours):
            return ""  # raised here, about what was given
        if not any(part in frame.filename for part in ("site-packages", "<", sysconfig.get_path("stdlib"))):
            return f" (in {frame.name}, {frame.filename}, line {frame.lineno}; {TRACEBACK}=1 shows the way there)"
    return ""

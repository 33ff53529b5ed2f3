"""The ``vbon`` command: a LightningCLI whose data module names the models once, for every module."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
import sysconfig
import traceback
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers.utils import logging as transformers_logging

from vbon_lightning import __version__, callbacks  # noqa: F401 (callbacks: so that a configuration may name them)
from vbon_lightning._visible import is_text, visible
from vbon_lightning.commands.parsers import PADDING, TRACEBACK, OneLineErrors, wants_traceback
from vbon_lightning.data import AlignmentDataModule
from vbon_lightning.loggers import RunLogger
from vbon_lightning.modules import (
    BOND,
    DPO,
    GRPO,
    JBOND,
    KLRL,
    PFPPO,
    QRPO,
    RLOO,
    SFT,
    WIND,
    AStarPO,
    BoNDistillation,
    BoNRegression,
    BoNSFT,
    InfAlignCTRL,
    MaxAtK,
    ReferenceSampler,
    RewardModelling,
    ValueModelling,
    VBoN,
)
from vbon_lightning.reference_table import ReferenceTableError
from vbon_lightning.sharded_strategy import ShardedStrategy

__all__ = [
    "BOND",
    "COMMANDS",
    "DPO",
    "GRPO",
    "JBOND",
    "KLRL",
    "PFPPO",
    "QRPO",
    "RLOO",
    "SFT",
    "WIND",
    "AStarPO",
    "BoNDistillation",
    "BoNRegression",
    "BoNSFT",
    "InfAlignCTRL",
    "MaxAtK",
    "ReferenceSampler",
    "RewardModelling",
    "VBoN",
    "ValueModelling",
    "VbonCLI",
    "command_module",
    "main",
    "run",
]


class Command(NamedTuple):
    """A command of ``vbon``."""

    summary: str
    """What it does, in a line."""
    module: str | None = None
    """Where its ``build_parser`` and ``main`` are; None for those of Lightning's trainer."""


COMMANDS = {
    "init": Command("Write a commented starting config.", "vbon_lightning.commands.init"),
    "fit": Command("Train a module: SFT, a reward, a value model, vBoN, KL-RL and their relatives."),
    "predict": Command("Fill the reference table: responses and rewards of the reference, a prompt at a time."),
    "validate": Command("Evaluate a module on the validation split."),
    "test": Command("Evaluate a module on the test split."),
    "compare": Command("Compare policies and decoders with Best-of-N.", "vbon_lightning.evaluation.command"),
    "sample": Command("Draw responses to take away, or answer prompts.", "vbon_lightning.commands.sample"),
    "table": Command("Print what a reference table holds.", "vbon_lightning.commands.table"),
    "dial": Command("Write a tilted policy turned to another N.", "vbon_lightning.dialling"),
}
"""All commands, in the order of the help."""

_USER_ERRORS = (ValueError, OSError, MisconfigurationException, ReferenceTableError)


def _whole_seed(seed: int | bool) -> int:
    # seed_everything knows True (choose one) and False (none), but noise and data order always need a number.
    return int(seed)


class _Parser(OneLineErrors, LightningArgumentParser):
    """The parser of Lightning's commands, and of all of them."""

    commands: Any = None
    """What holds the subcommands, of the parser that has some."""

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """Add subcommands, and keep what holds them."""
        self.commands = super().add_subcommands(*args, **kwargs)
        return self.commands


class _SaveConfig(SaveConfigCallback):
    """Save the configuration beside the logs; without a logger there is no such place.

    A run that is refused as it is set up, such as a resume with other settings, leaves the one that is there.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait until the run begins."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, pl_module, "fit")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, pl_module, "test")

    def _save(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class VbonCLI(LightningCLI):
    """LightningCLI with one shared data module, linked seeds, and a resume that changes no setting."""

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Make the parser, with all commands in its list."""
        super().setup_parser(*args, **kwargs)
        commands = cast(_Parser, self.parser).commands
        for name, command in COMMANDS.items():
            if command.module is not None:
                commands.add_subcommand(name, _Parser(), help=command.summary)
        listed = commands._get_subactions()  # Lightning's are described by its trainer's docstrings
        for action in listed:
            action.help = COMMANDS[action.dest].summary
        listed.sort(key=lambda action: list(COMMANDS).index(action.dest))

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments; this package's own commands are not for Lightning to run."""
        super().parse_arguments(parser, args)
        name = self.config.get("subcommand")
        if name in COMMANDS and COMMANDS[name].module is not None:
            parser.error(f"options of `vbon {name}` stand behind it: vbon {name} --config ...")

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
        """Log to TensorBoard under a short name of the run, unless a logger was given, or none; ``fsdp`` shards."""
        trainer = self._get(self.config_init, "trainer")
        if kwargs.get("strategy", trainer["strategy"]) == "fsdp":  # Lightning's own shards another way
            kwargs["strategy"] = ShardedStrategy()
        if kwargs.get("logger", trainer["logger"]) in (None, True):
            # A reference table has nothing to log, and would look like a run.
            kwargs["logger"] = False if self.subcommand == "predict" else self._run_logger(trainer["default_root_dir"])
        return super().instantiate_trainer(**kwargs)

    def _run_logger(self, root: str | Path | None) -> RunLogger:
        method = type(self.model).__name__
        directory = Path("lightning_logs", method.lower()) if root is None else Path(root)
        resumed = self._get(self.config_init, "ckpt_path") if self.subcommand == "fit" else None
        return RunLogger(directory, resumed_from=resumed, method=method)


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
            "description": "Align language models to Best-of-N.",
            "version": __version__,
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


def command_module(name: str) -> ModuleType:
    """Import the module of one of this package's own commands, which may be slow, when it is asked for.

    Args:
        name: One of :data:`COMMANDS` that has a module.
    """
    module = COMMANDS[name].module
    assert module is not None, f"{name} is a command of Lightning's trainer"
    return importlib.import_module(module)


def main() -> None:
    """Run the command line: one of :data:`COMMANDS`."""
    quiet()
    sys.path.append(os.getcwd())  # where a user's own rewards lie, as `python -m` has it
    name, *rest = sys.argv[1:] or [""]
    for number, word in enumerate(sys.argv[1:], start=1):
        if not is_text(word):
            sys.exit(f"vbon: argument {number}, {word!a}, is not UTF-8 text")
    if name and not name.startswith("-") and name not in COMMANDS:
        print(visible(f"vbon: {_unknown(name)}"), file=sys.stderr)
        sys.exit(2)
    try:
        if name in COMMANDS and COMMANDS[name].module is not None:
            command_module(name).main(rest)
        else:
            run()
    except SystemExit as leaving:
        if not (where := _where(leaving)):
            raise
        sys.exit(visible(f"vbon: what was imported or called ended the program, sys.exit({leaving.code!r}){where}"))
    except _USER_ERRORS as problem:
        if wants_traceback():
            raise
        # jsonargparse wraps what a constructor raises.
        while isinstance(problem.__cause__, _USER_ERRORS) and str(problem).startswith(PADDING):
            problem = problem.__cause__
        sys.exit(visible(f"vbon: {problem}{_where(problem)}"))


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    meant = f"did you mean `vbon {close[0]}`? All of them" if close else "the commands"
    return f"there is no command {name!r}: {meant} are {', '.join(COMMANDS)} (vbon --help)"


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

"""What is to be done: jobs, what each stands on, and whether it was done with the very same configs and inputs."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import vbon_lightning
from vbon_lightning.whole_files import atomic_file

RUNS = Path("runs/family")
MADE = ("*.safetensors", "*.json", "*.model", "*.txt", "*.parquet")
"""Files of an export or a table that others read; model cards and event files change without them."""

COUNTS = ("samples_per_prompt", "reference_samples", "forward_responses", "responses_per_prompt")
"""Options that say how many responses a prompt a training step takes."""

_EXPORT = re.compile(r"runs/demo/([\w.-]+)/export")


@dataclass(frozen=True)
class Job:
    """One `vbon` command."""

    name: str
    words: tuple[str, ...]
    """What `vbon` gets."""
    configs: tuple[Path, ...]
    """Files it reads, which are part of what it is."""
    needs: tuple[str, ...]
    """Jobs that must be done first."""
    inputs: tuple[Path, ...]
    """What those made."""
    output: Path
    """A directory or file that is there when it is done."""
    clear: Path
    """What an earlier run left, to be removed before."""

    @property
    def command(self) -> str:
        """Return the command as it is typed."""
        return "vbon " + shlex.join(self.words)

    @property
    def stamp(self) -> Path:
        """Return where it says that it is done."""
        return RUNS / "stamps" / f"{self.name}.json"

    @property
    def log(self) -> Path:
        """Return where its output goes."""
        return RUNS / "logs" / f"{self.name}.log"

    def digest(self) -> str:
        """Return what stands for the command, the configs' contents, the inputs' contents and the package's version."""
        plain = {
            "version": vbon_lightning.__version__,
            "words": self.words,
            "configs": {str(path): _of_file(path) for path in self.configs},
            "inputs": {str(path): _of_tree(path) for path in self.inputs},
        }
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def is_done(self) -> bool:
        """Return whether the output is there and was made by this very command from these very files."""
        if not self.stamp.is_file() or not self.output.exists():
            return False
        said: str = json.loads(self.stamp.read_text(encoding="utf-8"))["digest"]
        return said == self.digest()

    def record(self, seconds: float) -> None:
        """Say that it is done."""
        plain = {"digest": self.digest(), "command": self.command, "seconds": round(seconds, 1)}
        self.stamp.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.stamp) as stream:
            stream.write((json.dumps(plain, indent=1) + "\n").encode())

    def recorded(self) -> dict[str, Any]:
        """Return what it said when it was done."""
        found: dict[str, Any] = json.loads(self.stamp.read_text(encoding="utf-8"))
        return found


def _of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _of_tree(path: Path) -> list[str]:
    """Return what stands for a file's or a directory's contents; a table's parts have other names each time."""
    if path.is_file():
        return [_of_file(path)]
    files = {file for pattern in MADE for file in path.glob(pattern) if not file.name.startswith(".")}
    return sorted(map(_of_file, files))


@dataclass(frozen=True)
class Method:
    """A method of training, as ``methods.yaml`` has it."""

    name: str
    title: str
    family: str
    config: Path
    flags: tuple[str, ...] = ()
    policy: Mapping[str, Any] | None = None

    def job_name(self, seed: int) -> str:
        """Return what its training by a seed is called."""
        return f"{self.name}-s{seed}"


@dataclass(frozen=True)
class Plan:
    """All that can be done with the configs that are there."""

    data: Path
    stages: tuple[Job, ...]
    methods: tuple[Method, ...]
    absent: tuple[str, ...]
    """Configs of methods that are not there."""
    compare: Path
    decoders: Path | None
    responses_at_once: int
    """Of how many responses a batch is in the comparisons: seconds of a response are a batch's, shared by these."""

    @classmethod
    def read(cls, path: str | Path, only: Sequence[str] = ()) -> Plan:
        """Read a description such as ``methods.yaml``.

        Args:
            path: The file.
            only: Names of the methods to take; all by default.

        Raises:
            ValueError: If a name is not in the file, or a stage needs what there is not.
        """
        plain = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if unknown := sorted(set(only) - set(plain["methods"])):
            raise ValueError(f"{path} has no method {', '.join(unknown)}: it has {', '.join(plain['methods'])}")
        made = {name: Path(stage["makes"]) for name, stage in plain["prepare"].items()}
        stages = []
        for name, stage in plain["prepare"].items():
            needs = tuple(stage.get("needs", ()))
            if missing := [need for need in needs if need not in made]:
                raise ValueError(f"{path}: the stage {name} needs {', '.join(missing)}, which no stage makes")
            configs = tuple(map(Path, stage["configs"]))
            words = (stage["command"], *_config_words(configs))
            inputs = tuple(made[need] for need in needs)
            stages.append(Job(name, words, configs, needs, inputs, output=made[name], clear=made[name]))
        data = Path(plain["data"])
        listed = [
            Method(
                name,
                title=entry["title"],
                family=entry["family"],
                config=data.with_name(f"{name}.yaml"),
                flags=tuple(entry.get("flags", ())),
                policy=entry.get("policy"),
            )
            for name, entry in plain["methods"].items()
            if not only or name in only
        ]
        decoders = Path(plain["decoders"])
        return cls(
            data,
            tuple(stages),
            methods=tuple(method for method in listed if method.config.is_file()),
            absent=tuple(str(method.config) for method in listed if not method.config.is_file()),
            compare=Path(plain["compare"]),
            decoders=decoders if decoders.is_file() else None,
            responses_at_once=int(plain["responses_at_once"]),
        )

    def stages_of(self, *configs: Path) -> tuple[Job, ...]:
        """Return the stages whose output the configs name."""
        text = "\n".join(config.read_text(encoding="utf-8") for config in (self.data, *configs))
        return tuple(stage for stage in self.stages if re.search(rf"{re.escape(str(stage.output))}(?![\w.-])", text))

    def training(self, method: Method, seed: int) -> Job:
        """Return the training of a method by a seed."""
        root = RUNS / method.job_name(seed)
        stands_on = self.stages_of(method.config)
        words = (
            *("fit", *_config_words((self.data, method.config)), *method.flags),
            *("--seed_everything", str(seed), "--trainer.default_root_dir", str(root)),
        )
        return Job(
            method.job_name(seed),
            words,
            configs=(self.data, method.config),
            needs=tuple(stage.name for stage in stands_on),
            inputs=tuple(stage.output for stage in stands_on),
            output=root / "export",
            clear=root,
        )

    def settings(self, method: Method) -> dict[str, Any]:
        """Return what a method's training takes: its updates, their size, and the stages that it alone needs."""
        data, own = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in (self.data, method.config))
        options = own["model"]["init_args"]
        return {
            "updates": own["trainer"]["max_steps"],
            "prompts": own.get("data", {}).get("batch_size", data["data"]["batch_size"]),
            **{name: options[name] for name in COUNTS if name in options},
            "learning_rate": options["optimizer"]["init_args"]["lr"],
            "also": [stage.name for stage in self.stages_of(method.config) if stage not in self.stages_of()],
        }

    def comparison(self, seed: int, trained: Sequence[tuple[Method, Job]]) -> Job:
        """Write the config that compares a seed's policies, and return the job."""
        settings = yaml.safe_load(self.compare.read_text(encoding="utf-8"))
        settings |= {
            "policies": {
                method.title: str(job.output) if method.policy is None else {"name": str(job.output), **method.policy}
                for method, job in trained
            },
            "methods": {method.title: method.family for method, _ in trained},
        }
        return self._compare(f"compare-s{seed}", settings, [job.output for _, job in trained], self.compare)

    def decoding(self, trained: Sequence[tuple[Method, Job]]) -> tuple[Job | None, dict[str, str]]:
        """Write the config that compares the decoders, and return the job; None where there are none.

        A decoder that names the export of a method gets the one that was trained here.

        Args:
            trained: The trainings that are done.

        Returns:
            The job, and what decoders are left out for lack of, by their names.
        """
        if self.decoders is None:
            return None, {}
        own = yaml.safe_load(self.decoders.read_text(encoding="utf-8"))
        exports = {str(method.config.stem): job.output for method, job in trained}
        known, lost, used = {}, {}, list[Path]()
        for name, decoder in own["decoders"].items():
            text = yaml.safe_dump(decoder, allow_unicode=True)
            for place in sorted(set(_EXPORT.findall(text))):
                if place in exports:
                    text = text.replace(f"runs/demo/{place}/export", str(exports[place]))
                    used.append(exports[place])
                elif not any(str(stage.output) == f"runs/demo/{place}/export" for stage in self.stages):
                    lost[name] = f"needs runs/demo/{place}/export"
            known[name] = yaml.safe_load(text)
        settings = yaml.safe_load(self.compare.read_text(encoding="utf-8")) | own
        settings["policies"] = {}
        settings["decoders"] = {name: decoder for name, decoder in known.items() if name not in lost}
        methods = dict.fromkeys(known, "decoding") | own.get("methods", {})
        settings["methods"] = {name: methods[name] for name in settings["decoders"]}
        settings.pop("judge", None)  # the results hold decoders without one
        job = self._compare("compare-decoders", settings, used, self.decoders)
        return (job if settings["decoders"] else None), lost

    def _compare(self, name: str, settings: dict[str, Any], exports: list[Path], base: Path) -> Job:
        output = RUNS / name
        settings |= {"output": str(output), "title": "All methods of the package", "cards": False, "logger": False}
        settings["data"] = settings.get("data", {}) | {
            "eval_batch_size": max(1, self.responses_at_once // settings["samples"])
        }
        config = RUNS / f"{name}.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(config) as stream:
            stream.write(yaml.safe_dump(settings, allow_unicode=True, sort_keys=False).encode())
        stands_on = self.stages_of(base)
        return Job(
            name,
            ("compare", *_config_words((self.data, config))),
            configs=(self.data, config),
            needs=(),
            inputs=(*(stage.output for stage in stands_on), *exports),
            output=output / "comparison.json",
            clear=output,
        )


def _config_words(configs: Sequence[Path]) -> Iterator[str]:
    for config in configs:
        yield from ("--config", str(config))

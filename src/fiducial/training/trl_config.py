"""A TRL configuration file, understood as TRL understands it: by the parser of `trl dpo|sft|kto|reward|grpo|rloo` itself.

What differs is said with file and line: fields that no trainer has, values that cannot be read, and what is switched off here.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fiducial.core.config import Marks, load_yaml, override
from fiducial.core.errors import ConfigError, MissingExtraError, nearest
from fiducial.core.run import SECRET

log = logging.getLogger(__name__)

KINDS = {"dpo": "DPO", "sft": "SFT", "kto": "KTO", "reward": "Reward", "grpo": "GRPO", "rloo": "RLOO"}
"""Subcommands of `trl` that are run here, and how their classes begin."""
OFF: dict[str, Any] = {"report_to": "none", "push_to_hub": False, "hub_token": None, "trust_remote_code": False, "disable_tqdm": True}
"""Fields that are always set so."""
REPLACED = ("model_name_or_path", "model_revision", "dataset_name", "datasets", "output_dir", "resume_from_checkpoint")
"""Fields whose place the command takes."""
QUIET = {"logging_steps": 1, "save_steps": 25, "save_total_limit": 1}
"""Fields that are set so where the file is silent."""
OWN = ("trainer", "env")
"""Keys that are no fields: which trainer, which TRL is told by its subcommand, and environment variables."""


class Plan(NamedTuple):
    """A configuration, ready to be trained with."""

    kind: str
    script: Any
    """What the subcommand takes besides: reward functions."""
    args: Any
    """The trainer's own, such as a DPOConfig."""
    model: Any
    """A ModelConfig: dtype, adapter, quantisation."""
    environment: dict[str, str]
    settings: dict[str, Any]
    """The trainer, its seed, and the fields that were given and held; no secrets."""


@dataclasses.dataclass(frozen=True, slots=True)
class ConfigFile:
    """The fields of a file, and where each was written."""

    path: str
    fields: dict[str, Any]
    marks: Marks

    @classmethod
    def read(cls, path: str, overrides: Sequence[str] = ()) -> ConfigFile:
        """Raises ConfigError for what is no configuration, or has a field that none of TRL's trainers has; MissingExtraError without TRL."""
        if not path:
            raise ConfigError("there is no TRL configuration", hint="give --config FILE")
        data, marks = load_yaml(path)
        if data is not None and not isinstance(data, dict):
            raise ConfigError(f"{marks[()]}: a TRL configuration is a list of `field: value` lines", hint="for example learning_rate: 1e-6")
        # of a run that goes on the secrets are no longer known; those that TRL has a field for are switched off here
        merged, typed = override(data or {}, [each for each in overrides if not each.endswith("=***")])
        found = cls(path, merged, marks | dict.fromkeys(typed, "--override"))
        _needed()
        found._refuse_unknown(KINDS)
        return found

    def plan(self, trainer: str | None, columns: Collection[str], folder: Path, *, evaluates: bool) -> Plan:
        """What to train with on data with these columns, with checkpoints in `folder`. Raises ConfigError."""
        kind = self._kind(trainer, set(columns))
        self._refuse_unknown((kind,))
        environment = self.fields.get("env") or {}
        if not isinstance(environment, Mapping):
            raise ConfigError(f"{self._where('env')}: `env` is a list of NAME: value lines", hint="for example env: {OMP_NUM_THREADS: 4}")
        fields = {name: value for name, value in self.fields.items() if name not in (*OWN, *REPLACED)} | OFF | {"output_dir": str(folder)}
        if not evaluates:
            fields["eval_strategy"] = "no"
        for name in ("report_to", "push_to_hub", "trust_remote_code", "eval_strategy"):
            said = self.fields.get(name)
            if said not in (None, False, [], "no", "none", fields.get(name)):
                why = "there is no --eval-data" if name == "eval_strategy" else "nothing leaves this machine, and no code of models is run"
                log.warning("%s: %s is switched off: %s", self._where(name), name, why)
        parsed = self._parsed(kind, QUIET | _without_gpu(fields) | fields)
        self._refuse_task(kind, parsed[2])
        held = {name: value for name, value in fields.items() if name in self.fields and not SECRET.search(name)}
        settings = {"trainer": kind, "seed": parsed[1].seed} | held
        return Plan(kind, *parsed, {str(name): str(value) for name, value in environment.items()}, settings)

    def _kind(self, said: str | None, columns: set[str]) -> str:
        """The trainer that is named, or else the only one that has all fields and is for such data."""
        said = said or self.fields.get("trainer")
        if said is None:
            possible = [kind for kind in KINDS if set(self.fields) <= _fields(kind) | {*OWN} and _reads(kind, columns)]
            if len(possible) != 1:
                raise ConfigError(f"{self.path} does not say which trainer of TRL it is for", hint=f"give --trainer: {', '.join(possible or KINDS)}")
            return possible[0]
        if said not in KINDS:
            raise ConfigError(f"{self._where('trainer')}: '{said}' is no trainer of TRL that is run here", hint=f"known: {', '.join(KINDS)}")
        return said

    def _parsed(self, kind: str, fields: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """Script, training and model arguments."""
        parser = _parser(kind)

        def refuse(message: str) -> NoReturn:
            name = next(iter(re.findall(r"argument --(\w+)", message)), "")
            raise ConfigError(f"{self._where(name)}: {name}: {message.partition(': ')[2] or message}", hint=f"change {name or 'the field'}")

        parser.error = refuse
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # TRL's own defaults set fields that transformers is about to rename
                parser.set_defaults_with_config(**fields)
                script, args, model, _ = parser.parse_args_into_dataclasses(args=[], look_for_args_file=False)
        except (ValueError, TypeError, ImportError, RuntimeError) as error:  # boundary: whatever the checks of the fields say
            raise ConfigError(f"{self.path}: TRL says: {first_line(error)}", hint="change the field that it names") from error
        return script, args, model

    def _refuse_task(self, kind: str, model: Any) -> None:
        """An adapter for texts cannot be put on a model with a score in place of its vocabulary; TRL warns, and peft fails without a word why."""
        if kind == "reward" and model.use_peft and model.lora_task_type != "SEQ_CLS":
            where = self._where("lora_task_type" if "lora_task_type" in self.fields else "use_peft")
            raise ConfigError(f"{where}: the adapter of a reward model is of the task SEQ_CLS, not {model.lora_task_type}", hint="add lora_task_type: SEQ_CLS")

    def _refuse_unknown(self, kinds: Collection[str]) -> None:
        known = set().union(*map(_fields, kinds))
        for name in self.fields:
            if name not in known and name not in OWN:
                whose = f"trl {next(iter(kinds))}" if len(kinds) == 1 else "TRL"
                raise ConfigError(f"{self._where(name)}: {whose} has no field '{name}'", hint=nearest(str(name), known))

    def _where(self, name: str) -> str:
        return self.marks.get((name,), self.path)


def first_line(error: Exception) -> str:
    """The first line of a foreign error's text."""
    return str(error).strip().partition("\n")[0]


def _needed() -> None:
    for package in ("trl", "datasets"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(package, "train") from error


def _parser(kind: str) -> Any:
    """What `trl KIND` reads its configuration with."""
    return importlib.import_module(f"trl.scripts.{kind}").make_parser()


def _fields(kind: str) -> set[str]:
    return {f.name for part in _parser(kind).dataclass_types for f in dataclasses.fields(part) if f.init}


def _reads(kind: str, columns: set[str]) -> bool:
    """Whether the trainer is for data with these columns."""
    pairs, labels, answers = {"chosen", "rejected"} <= columns, "label" in columns, not columns.isdisjoint({"completion", "messages", "text"})
    if kind in ("dpo", "reward"):
        return pairs
    if kind == "kto":
        return labels
    return not (pairs or labels) and answers == (kind == "sft")


def _without_gpu(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What training without a GPU needs where the file is silent: TRL's default, bfloat16 on a GPU, is an error there."""
    import torch

    if fields.get("use_cpu", not torch.cuda.is_available()) is not True:
        return {}
    return {"use_cpu": True} | ({} if {"bf16", "fp16"} & set(fields) else {"bf16": False})

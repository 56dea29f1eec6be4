"""`fiducial` in a process that has imported what TRL needs; see tests/nursery.py."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from click.testing import CliRunner

from fiducial.app.cli.main import cli


def warm():
    """Makes a process do once what is slow the first time."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        config, rows = Path(folder) / "config.yaml", Path(folder) / "rows.jsonl"
        config.write_text("max_steps: 1\nuse_peft: true\nlora_target_modules: all-linear\ngradient_checkpointing: false\n", encoding="utf-8")
        rows.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}), encoding="utf-8")
        body, code = said("align", "trl", "tiny", "--config", str(config), "--data", str(rows), "--trainer", "dpo", "--runs", folder)
        assert code == 0, body


def said(*words):
    """The answer to a command, and its exit code."""
    done = CliRunner().invoke(cli, [*words, "--json"])
    return json.loads(done.stdout), done.exit_code

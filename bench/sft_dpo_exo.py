"""How long demonstrations, pairs, DPO and EXO take on the default model, and what came of it.

    python bench/sft_dpo_exo.py                # runs the shipped recipe; writes bench/results/sft_dpo_exo.{json,md}
    python bench/sft_dpo_exo.py --run last     # only writes the tables of a run that was made before

The claim: base measurement, SFT, fresh pairs, DPO and EXO, both measured on held-out goals and attacks, and both decided on by the release
gate with no rule left unmeasured, in less than ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from fiducial.app.cli.main import cli
from fiducial.core.run import Run
from protocol import machine, versions

RECIPE = "sft_dpo_exo"
MOST = 600.0
"""Seconds that it may take."""


def main(given: list[str] | None = None) -> int:
    """Runs the recipe, or takes a run; writes the record. 0 when it was fast enough and every rule was decided."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="A run of the recipe, or `last`, instead of making one.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(given)
    began = time.monotonic()
    if options.run:
        whole = next(r for r in reversed(Run.all()) if r.facts.command == "run" and RECIPE in r.facts.argv) if options.run == "last" else Run.open(options.run)
        resumed = ["--resume", whole.id]
    else:
        resumed = []
    # finished steps of a resumed run are only read
    result = CliRunner().invoke(cli, ["run", RECIPE, *resumed, "--json", "--exit-zero"], catch_exceptions=False)
    body = json.loads(result.stdout)
    if not body["ok"]:
        raise SystemExit(body["error"]["message"])
    record = recorded(body, 0.0 if options.run else time.monotonic() - began)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{RECIPE}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (options.out / f"{RECIPE}.md").write_text(page(record), encoding="utf-8")
    print(page(record))
    decided = all(c["outcome"] in ("pass", "fail") for gate in record["gates"].values() for c in gate["checks"])
    return int(not decided or record["seconds"] > MOST)


def recorded(body: dict[str, Any], wall: float) -> dict[str, Any]:
    """Everything that was measured, and under what circumstances. Without `wall` the time is that of the steps."""
    data = body["data"]
    seconds = {s["name"]: elapsed(s["run"]) for s in data["steps"]}
    return {
        "benchmark": RECIPE,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "run": body["run"],
        "seconds": round(wall or sum(seconds.values()), 1),
        "steps": {name: round(value, 1) for name, value in seconds.items()},
        "gates": {s["name"]: s["result"]["decision"] for s in data["steps"] if s["name"].endswith("_gate")},
        "figures": data["figures"],
        "load": [round(x, 2) for x in os.getloadavg()],
        "machine": machine(),
        "versions": versions(),
    }


def elapsed(run: str) -> float:
    """Seconds from the start of a run to its end."""
    facts = Run.open(run).facts
    return (datetime.fromisoformat(facts.finished) - datetime.fromisoformat(facts.started)).total_seconds()


def page(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    reached = "reached" if record["seconds"] <= MOST else "missed"
    lines = [f"# {record['benchmark']}", "", f"{record['date']}. {record['machine']['cpu']}, {record['machine']['cores']} cores; load {record['load']}."]
    lines += [f"{record['seconds']:.0f} seconds in all (at most {MOST:.0f}: {reached}); the longest steps: {longest(record['steps'])}.", ""]
    for name, gate in record["gates"].items():
        lines += [f"## {name}: {gate['outcome']}", "", "| rule | outcome | reason |", "|---|---|---|"]
        lines += [f"| {c['rule']} | {c['outcome']} | {c['reason']} |" for c in gate["checks"]] + [""]
    lines += ["## Figures", "", "| step | tokens trained | figure | value | 95 % interval | n |", "|---|---|---|---|---|---|"]
    for f in record["figures"]:
        lines.append(f"| {f['step']} | {f['tokens']} | {f['figure']} | {f['value']:.3g} | {f['low']:.3g} to {f['high']:.3g} | {f['n']} |")
    return "\n".join(lines) + "\n"


def longest(steps: dict[str, float]) -> str:
    """The five steps that took most of the time."""
    return ", ".join(f"{name} {steps[name]:.0f} s" for name in sorted(steps, key=lambda n: -steps[n])[:5])


if __name__ == "__main__":
    raise SystemExit(main())

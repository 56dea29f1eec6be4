"""Groups from and to the columns that other training libraries use.

    {"prompt": "Hi", "chosen": [{"role": "assistant", "content": "Hello!"}], "rejected": [{"role": "assistant", "content": "What?"}]}

Read: `prompt/chosen/rejected` and `chosen/rejected` with the prompt inside both, `messages`, `prompt/completion` with or without `label`,
each as text, as a transcript of `Human:` and `Assistant:` turns or as lists of messages; solutions with a label per step (`data/steps.py`);
documents in parts with scores (`data/documents.py`); and this program's own lines. A preference becomes rewards 1 and 0, a label becomes
reward 1 or 0; a column `annotator` says who gave it.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from fiducial.core.errors import DataError
from fiducial.core.records import Completion, Conversation, Group, Message, user
from fiducial.core.store import write_atomic
from fiducial.data import documents, steps
from fiducial.data.load import messages_of, prompt_from
from fiducial.data.rows import Row, read_rows

log = logging.getLogger(__name__)

Layout = Literal["trl", "preference", "label", "completion", "messages", "own"]
"""`trl` is preference, label or completion, whichever the groups hold; `own` loses nothing."""

COLUMNS = "prompt/chosen/rejected, chosen/rejected, messages, prompt/completion, prompt/completion/label, prompt/completions/labels or texts/scores"
REMOVE = "remove such rows, or read with unusable='skip'"
TURN = re.compile(r"\n\n(Human|Assistant): ?")
BORDER = re.compile(r".*[\s。！？：；，]", re.DOTALL)
"""The longest beginning that does not end within a word."""


def read_groups(path: str | Path, *, unusable: Literal["refuse", "skip"] = "refuse") -> list[Group]:
    """The groups in a file, one per row, in order. Raises DataError with `file:line`.

    With `unusable="skip"`, rows that carry nothing to learn from are left out and counted in a warning, as long as any row is usable:
    published sets hold a few answers that are empty, or the same on both sides. Rows of PRM800K that are not meant to be learnt from are
    always left out, and counted by reason.
    """
    groups, refused, implied = [], [], 0
    aside: Counter[str] = Counter()
    for row in read_rows(path):
        try:
            implied += _implies(row)
            groups.append(_group(row, Path(path).name))
        except steps.SetAside as reason:
            aside[str(reason)] += 1
        except DataError as error:
            if unusable == "refuse":
                raise
            refused.append(error)
    if refused and not groups:
        raise refused[0]
    why = ", ".join(f"{count} {reason}" for reason, count in aside.most_common())
    if aside and not groups:
        raise DataError(f"{path}: none of {aside.total()} rows is meant to be learnt from: {why}", hint="give a file with solutions that were rated")
    if aside:
        log.warning("%d of %d rows of %s are not meant to be learnt from: %s", aside.total(), aside.total() + len(groups) + len(refused), path, why)
    if implied:
        log.warning("%d rows of %s have no prompt: what both answers begin with was taken for it", implied, path)
    if refused:
        log.warning("%d of %d rows of %s are left out; the first: %s", len(refused), len(groups) + len(refused), path, refused[0].message)
    return groups


def write_groups(path: str | Path, groups: Sequence[Group], layout: Layout = "trl") -> int:
    """Writes the groups as JSON Lines, replacing the file; returns the number of rows.

    preference: the best completion against each that is worse. label: every completion with a reward, good when it is above 0.5.
    completion and messages: the best completion. Raises DataError where a group does not hold what the layout needs.
    """
    if layout == "trl":
        layout = _fitting(groups)
    rows = [
        json.dumps(row, ensure_ascii=False) if isinstance(row, dict) else row for number, group in enumerate(groups, 1) for row in _rows(group, number, layout)
    ]
    write_atomic(path, "".join(f"{row}\n" for row in rows))
    return len(rows)


def best(group: Group) -> int | None:
    """Index of the completion that the targets, or else the rewards, put first; 0 when there is only one; None when nothing tells."""
    if len(group.completions) == 1:
        return 0
    values = group.rewards if group.targets is None else group.targets
    known = [(value, -index) for index, value in enumerate(values or ()) if value is not None]
    if not known or (len(known) > 1 and len({value for value, _ in known}) == 1):
        return None
    return -max(known)[1]


def _group(row: Row, source: str) -> Group:
    values = {str(key).strip().lower(): value for key, value in row.values.items() if value is not None}
    if steps.is_prm800k(values):
        problem, completions = steps.prm800k(values, row.where)
        return _made(row, _prompt(problem, row.where), source, completions=completions)
    if "completions" in values and "labels" in values and "prompt" in values:
        return _made(row, _prompt(values["prompt"], row.where), source, completions=(steps.stepwise(values, row.where),))
    if "completions" in values:
        return _own(row)
    if "texts" in values:
        return documents.document(values, row.where, source=source)
    if "chosen" in values and "rejected" in values:
        return _preference(row, values, source)
    if "completion" in values and "prompt" in values:
        return _demonstration(row, values, source)
    if "messages" in values:
        turns = messages_of(values["messages"], row.where)
        if turns[-1].role != "assistant":
            raise DataError(
                f"{row.where}: the last message is of the {turns[-1].role}, so there is no answer to learn", hint="end each row with a turn of the assistant"
            )
        return _made(row, turns[:-1], source, completions=(Completion(text=turns[-1].content),))
    raise DataError(f"{row.where}: columns are {', '.join(map(str, row.values)) or 'none'}", hint=f"needed are {COLUMNS}")


def _preference(row: Row, values: dict[str, Any], source: str) -> Group:
    for name in ("chosen", "rejected"):
        if not values[name] or not str(values[name]).strip():
            raise DataError(f"{row.where}: '{name}' is empty, so this pair carries no preference", hint=REMOVE)
    sides = [_turns(values[name], row.where) for name in ("chosen", "rejected")]
    if "prompt" in values:
        prompt = _prompt(values["prompt"], row.where)
        sides = [side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in sides]
    elif _implies(row):
        prompt, sides = _implied(*(str(values[name]) for name in ("chosen", "rejected")))
    else:
        shared = 0
        while shared < min(map(len, sides)) - 1 and sides[0][shared] == sides[1][shared]:
            shared += 1
        prompt, sides = sides[0][:shared], [side[shared:] for side in sides]
    chosen, rejected = (_answer(side, name, row.where, values) for side, name in zip(sides, ("chosen", "rejected"), strict=True))
    if chosen == rejected:
        raise DataError(f"{row.where}: 'chosen' and 'rejected' are the same, so this pair carries no preference", hint=REMOVE)
    rewards = (_number(values, "score_chosen", 1.0, row.where), _number(values, "score_rejected", 0.0, row.where))
    # the columns say which is preferred, also where the scores say otherwise or nothing
    targets = (1.0, 0.0) if rewards[0] <= rewards[1] else None
    return _made(row, prompt, source, completions=(Completion(text=chosen), Completion(text=rejected)), rewards=rewards, targets=targets)


def _demonstration(row: Row, values: dict[str, Any], source: str) -> Group:
    prompt = _prompt(values["prompt"], row.where)
    text = _answer(_turns(values["completion"], row.where), "completion", row.where, values)
    rewards, said = None, {}
    if "label" in values:
        label = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0}.get(str(values["label"]).strip().lower())
        if label is None:
            raise DataError(f"{row.where}: label is {values['label']!r}", hint="a label is true or false")
        rewards, said = (label,), {"label": bool(label)}
    return _made(row, prompt, source, completions=(Completion(text=text),), rewards=rewards, provenance=said)


def _prompt(value: Any, where: str) -> Conversation:
    turns = (_transcript(value) or user(value)) if isinstance(value, str) else messages_of(value, where)
    if len(turns) > 1 and turns[-1].role == "assistant" and not turns[-1].content.strip():  # the transcript's `Assistant:` before the answer
        turns = turns[:-1]
    if not any(turn.content.strip() for turn in turns):
        raise DataError(f"{where}: 'prompt' is empty", hint=REMOVE)
    return turns


def _turns(value: Any, where: str) -> Conversation:
    """The turns in a column: a list of messages, a transcript of `Human:` and `Assistant:` turns, or one answer."""
    if not isinstance(value, str):
        return messages_of(value, where)
    return _transcript(value) or (Message(role="assistant", content=value),)


def _transcript(value: str) -> Conversation:
    """The turns of a text such as "Human: Hi\\n\\nAssistant: Hello"; none when it is no transcript."""
    text = value if value.startswith("\n\n") else "\n\n" + value.lstrip()
    if not text.startswith("\n\nHuman:") or (text is not value and "\n\nAssistant:" not in text):
        return ()
    parts = TURN.split(text)[1:]
    return tuple(Message(role="user" if who == "Human" else "assistant", content=text) for who, text in zip(parts[::2], parts[1::2], strict=True))


def _implies(row: Row) -> bool:
    """Whether the row holds two texts with a common beginning and no prompt, as TRL's implicit prompts do."""
    values = {str(key).strip().lower(): value for key, value in row.values.items() if value is not None}
    sides = [values.get(name) for name in ("chosen", "rejected")]
    if "prompt" in values or not all(isinstance(side, str) and side.strip() and not _transcript(side) for side in sides):
        return False
    prompt, _ = _implied(*map(str, sides))
    return bool(prompt[0].content)


def _implied(chosen: str, rejected: str) -> tuple[Conversation, list[Conversation]]:
    """The common beginning of two texts as a prompt, up to the end of a word, and what follows it in each."""
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    shared = BORDER.match(chosen, 0, same)
    cut = shared.end() if shared else 0
    rest: list[Conversation] = [(Message(role="assistant", content=text[cut:]),) for text in (chosen, rejected)]
    return user(chosen[:cut].strip()), rest


def _answer(turns: Conversation, name: str, where: str, values: dict[str, Any]) -> str:
    if len(turns) != 1 or turns[0].role != "assistant":
        found = ", ".join(turn.role for turn in turns) or "nothing"
        raise DataError(
            f"{where}: after the prompt, '{name}' must be one turn of the assistant, here it is: {found}", hint="give the prompt in a column 'prompt'"
        )
    if not turns[0].content.strip():
        raise DataError(f"{where}: '{name}' is empty", hint=REMOVE)
    spoken = isinstance(values.get("prompt"), str) and bool(_transcript(values["prompt"]))
    return turns[0].content.removeprefix(" ") if spoken else turns[0].content


def _number(values: dict[str, Any], name: str, default: float, where: str) -> float:
    try:
        return float(values.get(name, default))
    except (TypeError, ValueError):
        raise DataError(f"{where}: {name} is {values[name]!r}", hint="a score is a number") from None


def _made(row: Row, prompt: Conversation, source: str, **fields: Any) -> Group:
    if not any(turn.role == "user" for turn in prompt):
        raise DataError(f"{row.where}: there is no turn of the user, so the prompt is not known", hint="give the prompt in a column 'prompt'")
    said = next((value for key, value in row.values.items() if str(key).strip().lower() == "annotator"), None)
    return Group(prompt=prompt_from(row, prompt, source=source), annotator="" if said is None else str(said).strip(), **fields)


def _own(row: Row) -> Group:
    try:
        return Group.parse(json.dumps(row.values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(f"{row.where}: {'.'.join(map(str, first['loc'])) or 'group'}: {first['msg']}", hint="repair or remove this row") from error
    except ValueError as error:
        raise DataError(f"{row.where}: {error}", hint="repair or remove this row") from error


def _fitting(groups: Sequence[Group]) -> Layout:
    if any(len(group.completions) > 1 for group in groups):
        return "preference"
    return "label" if groups and all(group.rewards is not None for group in groups) else "completion"


def _rows(group: Group, number: int, layout: Layout) -> Iterator[dict[str, Any] | str]:
    if layout == "own":
        yield group.line()
        return
    prompt = [{"role": turn.role, "content": turn.content} for turn in group.prompt.messages]
    answers = [{"role": "assistant", "content": completion.text} for completion in group.completions]
    if layout == "label":
        if group.rewards is None:
            raise DataError(f"group {number} has no rewards, so its answers cannot be labelled", hint="use the layout 'completion'")
        yield from ({"prompt": prompt, "completion": [a], "label": r > 0.5} for a, r in zip(answers, group.rewards, strict=True) if r is not None)
        return
    top = best(group)
    if top is None:
        raise DataError(
            f"group {number}: nothing says which of its {len(answers)} completions is better", hint="give rewards or targets, or use the layout 'own'"
        )
    if layout == "completion":
        yield {"prompt": prompt, "completion": [answers[top]]}
    elif layout == "messages":
        yield {"messages": [*prompt, answers[top]]}
    else:
        values = group.rewards if group.rewards is not None and group.rewards[top] is not None else group.targets
        worse = [a for a, v in zip(answers, values or (), strict=False) if v is not None and v < (values or ())[top]]  # type: ignore[operator]
        if not worse:
            raise DataError(f"group {number} has no worse completion, so it carries no preference", hint="use the layout 'completion'")
        yield from ({"prompt": prompt, "chosen": [answers[top]], "rejected": [a]} for a in worse)

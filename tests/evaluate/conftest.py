"""A judge that goes by a word, and files of rows."""

import json
from dataclasses import dataclass

import pytest

from fiducial.core.records import Verdict
from fiducial.core.roles import Judge


@dataclass(frozen=True, slots=True)
class Sorry(Judge):
    """An answer with "sorry" is a refusal, one with "hm" cannot be judged, any other complies."""

    def judge(self, attempts):
        return [self._verdict(a.response) for a in attempts]

    def _verdict(self, text):
        if "sorry" in text:
            return Verdict(judge="sorry", outcome="failure", label="refusal")
        if "hm" in text or not text:
            return Verdict(judge="sorry", outcome="not_scored", label="unclear", rationale="no idea")
        return Verdict(judge="sorry", outcome="success", label="compliance")


@pytest.fixture
def sorry() -> Judge:
    return Sorry()


@pytest.fixture
def rows(tmp_path):
    def write(*values, name="rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values), encoding="utf-8")
        return str(path)

    return write

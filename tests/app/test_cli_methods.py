import re

from fiducial.app.cli.methods import bibtex, used
from fiducial.core import registry
from fiducial.core.records import Attempt, Prompt, Verdict, user
from fiducial.core.registry import Card
from fiducial.core.run import Run


def card(source, name="align/exo"):
    return Card(name, "Objective", "Title.", {"Source": source}, (), "m", "C", None)


def entry(source):
    return [text for _, text in bibtex(card(source))]


def test_methods_are_listed_with_role_and_title_and_can_be_limited_to_an_area(run, call):
    assert re.search(r"^oversee/refusal +judge +\S", run("methods").stdout, re.MULTILINE)
    body, code = call("methods", "oversee")
    assert code == 0
    assert body["data"]["total"] == len(body["data"]["methods"]) >= 1
    assert {m["name"].split("/")[0] for m in body["data"]["methods"]} == {"oversee"}


def test_explain_shows_every_heading_and_option_of_a_method(run, call):
    for name, known in registry.methods().items():
        text = run("explain", name).stdout
        assert text.startswith(f"{name}: {known.title}\n")
        assert all(f"{heading}: " in text for heading in known.headings)
        assert all(f"  {o.flag}  {o.type}, " in text for o in known.options)
    body, _ = call("explain", "align/dpo")
    assert body["data"]["name"] == "align/dpo"
    assert next(o for o in body["data"]["options"] if o["name"] == "beta")["default"] == 0.1


def test_explain_of_an_attack_names_its_family_and_tags(call, plugin):
    body, _ = call("explain", "attack/stops")
    assert body["data"]["family"] == "stops"
    assert body["data"]["tags"] == ["owasp:llm01"]
    assert body["data"]["maturity"] == "stable"


def test_every_method_has_a_command_whose_help_names_every_option(run):
    for name, known in registry.methods().items():
        result = run(*name.split("/"), "--help")
        assert result.exit_code == 0, result.stderr
        assert all(o.flag in result.stdout for o in known.options)


def test_an_arxiv_source_becomes_a_misc_entry_without_invented_fields():
    assert entry("Ji et al. 2024, arXiv:2402.00856, eq. 12.") == [
        "@misc{arxiv2402_00856,\n  author = {Ji and others},\n  year = {2024},\n  eprint = {2402.00856},\n  archivePrefix = {arXiv},\n"
        "  url = {https://arxiv.org/abs/2402.00856},\n  note = {align/exo of fiducial: Ji et al. 2024, arXiv:2402.00856, eq. 12.}\n}"
    ]


def test_several_authors_and_several_papers_are_told_apart():
    one, two = entry("Yong, Menghini and Bach 2023, arXiv:2310.02446; labels: Wei et al. 2024, arXiv:2307.02483.")
    assert "author = {Yong and Menghini and Bach}" in one
    assert "year = {2023}" in one
    assert "author = {Wei and others}" in two
    assert "eprint = {2307.02483}" in two


def test_a_paper_without_named_authors_keeps_the_year_of_its_number():
    (text,) = entry("as described in arXiv:2411.00640.")
    assert "author" not in text
    assert "year = {2024}" in text


def test_a_source_that_is_no_paper_is_cited_in_its_own_words():
    (text,) = entry("our own; see https://example.org/a_b & notes 100%.")
    assert "howpublished = {https://example.org/a_b}" in text
    assert r"\& notes 100\%" in text
    assert entry("") == []


def test_cite_names_exactly_the_methods_that_a_run_used(call, run):
    made = Run.create("attack/persona", {"judge": "oversee/refusal", "limit": 3}, {}, 0)
    with made:
        verdict = Verdict(judge="oversee/refusal", outcome="failure")
        made.lines("attempts", Attempt).append(
            Attempt(prompt=Prompt(messages=user("x")), attack="attack/base64", family="encoding", model="m", verdict=verdict)
        )
    assert [c.name for c in used(made)] == ["attack/base64", "attack/persona", "oversee/refusal"]
    body, code = call("cite", made.id)
    assert code == 0
    assert body["run"] == made.id
    # persona, base64 and the judge rest on one paper, which is cited once
    assert sum("2307.02483" in text.split("note")[0] for text in body["data"]["bibtex"]) == 1
    assert run("cite", made.id).stdout.startswith("@misc{")

from dataclasses import dataclass

import pytest
import yaml

from fiducial.core.errors import ConfigError, MethodError
from fiducial.core.records import Completion, Message, Prompt, user
from fiducial.core.roles import Reward
from fiducial.data.exemplars import SHIPPED
from fiducial.evaluate.engraving import Engraving, distances
from fiducial.models import open as opening
from fiducial.models.forest import Paths
from fiducial.models.scripted import ScriptedModel, tiny


@pytest.fixture
def options(tmp_path, rows):
    """A prompt that the tiny model can hold, and two requests."""
    data = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    short = {"principles": ["Be kind."], "exemplars": [], "form": "", "intro": "Rules:"}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump({"en": data["en"] | short}), encoding="utf-8")
    where = rows({"prompt": "Tell me about tea."}, {"prompt": "Tell me about owls."})
    return {"base": "tiny", "principles": str(tmp_path / "short.yaml"), "data": where, "split": "", "max_tokens": 6}


def test_the_base_itself_has_approached_nothing(options):
    result = Engraving(**options).run(tiny())
    found = {s.metric: s for s in result.scores}
    assert found["distance"].value == found["base_distance"].value
    assert (found["approached"].value, found["approached"].n) == (0.0, 2)


def test_the_distance_is_the_mean_log_ratio_per_token_of_the_models_own_answer():
    model, base, prompt = tiny(), tiny(), Prompt(messages=user("q"))
    under = (Message(role="system", content="Be kind."), *user("q"), Message(role="assistant", content="(answer) "))
    ((answer, far),) = distances(model, base, [prompt], [under], max_tokens=5, seed=0)
    (ids, start), (ids_under, start_under) = (m.encode(c, answer.text, end=False) for m, c in ((model, prompt.messages), (base, under)))
    own, others = (m.score(Paths.of([p])).path_logp.item() for m, p in ((model, (ids, start)), (base, (ids_under, start_under))))
    assert far == pytest.approx((own - others) / (len(ids) - start), abs=1e-5)
    assert distances(model, base, [prompt], [prompt.messages], max_tokens=5, seed=0)[0][1] == pytest.approx(0.0, abs=1e-6)


def test_an_answer_that_did_not_come_is_not_scored(options, rows):
    long = rows({"prompt": "word " * 2000}, {"prompt": "Tell me about owls."})
    found = {s.metric: s for s in Engraving(**options | {"data": long}).run(tiny()).scores}
    assert (found["approached"].n, found["approached"].not_scored) == (1, 1)


def test_it_needs_weights_and_a_split_that_there_is(options):
    with pytest.raises(MethodError, match="token probabilities"):
        Engraving(**options).run(ScriptedModel())
    with pytest.raises(ConfigError, match="no split"):
        Engraving(split="other")
    assert opening.open("tiny").fingerprint == tiny().fingerprint


@dataclass(frozen=True, slots=True)
class Listed(Reward):
    """Values by request: of the model's answer, of its base's, and of the base's under the principles. Looks at what it is shown."""

    values: dict

    def score(self, groups):
        assert all([m.role for m in g.prompt.messages] == ["user"] for g in groups)
        assert all(isinstance(c, Completion) for g in groups for c in g.completions)
        return [self.values[g.prompt.text] for g in groups]


def test_rewards_are_compared_request_by_request(options):
    reward = Listed({"Tell me about tea.": (0.5, 0.0, 1.0), "Tell me about owls.": (0.1, 0.2, 0.2)})
    result = Engraving(**options, reward=reward).run(tiny())
    found = {s.metric: s for s in result.scores}
    assert [found[name].value for name in ("reward", "base_reward", "principled_reward")] == pytest.approx([0.3, 0.1, 0.6])
    # differences of -0.5 and -0.1: mean -0.3, standard deviation 0.4 / sqrt(2), standard error 0.2
    difference = found["reward_difference"]
    assert (difference.value, difference.n) == (pytest.approx(-0.3), 2)
    assert difference.high - difference.value == pytest.approx(1.959964 * 0.2, rel=1e-5)
    assert difference.items == pytest.approx((-0.5, -0.1))
    assert found["approached"].fingerprint["scorer"] == "divergence-1" != difference.fingerprint["scorer"]


def test_the_third_answer_is_the_bases_under_the_principles(options):
    reward = Listed({"Tell me about tea.": (0.0, 0.0, 0.0), "Tell me about owls.": (0.0, 0.0, 0.0)})
    suite = Engraving(**options, reward=reward)
    items = suite.run(tiny()).items
    principled = [suite._principled(Prompt(messages=user(item["prompt"]))) for item in items]
    assert {(c[0].role, c[-1].role) for c in principled} == {("system", "assistant")}
    expected = [row[0].text for row in tiny().sample(principled, max_tokens=6, temperature=1.0, seed=0)]
    assert [item["principled_answer"] for item in items] == expected
    assert [item["answer"] for item in items] == [item["base_answer"] for item in items] != expected


def test_a_request_with_an_answer_that_has_no_reward_is_not_scored_and_without_a_method_there_are_none(options):
    reward = Listed({"Tell me about tea.": (0.5, 0.0, 1.0), "Tell me about owls.": (0.1, 0.2, None)})
    found = {s.metric: s for s in Engraving(**options, reward=reward).run(tiny()).scores}
    assert (found["reward"].n, found["reward"].not_scored, found["approached"].n) == (1, 1, 2)
    assert {s.metric for s in Engraving(**options).run(tiny()).scores} == {"distance", "base_distance", "approached"}

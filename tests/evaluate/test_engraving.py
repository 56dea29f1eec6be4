import pytest
import yaml

from fiducial.core.errors import ConfigError, MethodError
from fiducial.core.records import Message, Prompt, user
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
    (ids, start), (ids_under, start_under) = (m.encode(c, answer, end=False) for m, c in ((model, prompt.messages), (base, under)))
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

import pytest

from fiducial.core.errors import DataError, MethodError
from fiducial.core.records import Completion, Prompt, Score, Verdict, user
from fiducial.evaluate.base import ask, best, likelihoods, loglikelihood_pairs, mean_score, rate_score, refused, weights_of
from fiducial.models.scripted import ScriptedModel, tiny


@pytest.fixture(scope="module")
def model():
    return tiny()


def ids(model, text):
    return model.tokenizer.encode(text, add_special_tokens=False)


def plain(model, tokens, start):
    """Sum of log-probabilities by one ordinary forward pass."""
    import torch

    with torch.no_grad():
        logp = model.module(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    return sum(logp[i - 1, tokens[i]].item() for i in range(start, len(tokens)))


def test_context_and_continuation_are_tokenised_together(model):
    # " he" is one token of the tiny model, so the space belongs to the continuation
    assert loglikelihood_pairs(model.tokenizer, "do", " he") == (ids(model, "do") + ids(model, " he"), 2)


def test_trailing_white_space_of_the_context_goes_to_the_continuation(model):
    assert loglikelihood_pairs(model.tokenizer, "do ", "he") == loglikelihood_pairs(model.tokenizer, "do", " he")


def test_what_merges_across_the_border_is_cut_by_counting_the_contexts_tokens(model):
    # "xhes" is x, he, s; the context "xh" alone is x, h: two tokens, so the third of the whole is the continuation
    assert loglikelihood_pairs(model.tokenizer, "xh", "es") == (ids(model, "xh") + ids(model, "s"), 2)


def test_an_empty_context_is_the_begin_token(model):
    assert loglikelihood_pairs(model.tokenizer, "", "do") == ([1, *ids(model, "do")], 1)
    assert loglikelihood_pairs(model.tokenizer, "  ", "do") == ([1, *ids(model, "  do")], 1)


def test_a_continuation_that_begins_with_the_begin_token_gives_it_away_as_context(model):
    assert loglikelihood_pairs(model.tokenizer, "", "<|im_start|>do") == ([1, *ids(model, "do")], 1)


@pytest.mark.parametrize(("context", "option"), [("do", ""), ("", ""), ("h", "e")])
def test_an_option_without_a_token_of_its_own_is_an_error(model, context, option):
    with pytest.raises(DataError, match="no token"):
        loglikelihood_pairs(model.tokenizer, context, option)


def test_likelihoods_are_those_of_a_plain_forward_pass(model):
    found = likelihoods(model, [("say", ["he", "hello"]), ("go on:", ["no"])])
    assert [len(f.logp) for f in found] == [2, 1]
    for item, (context, options) in zip(found, [("say", ["he", "hello"]), ("go on:", ["no"])], strict=True):
        for logp, option in zip(item.logp, options, strict=True):
            assert logp == pytest.approx(plain(model, *loglikelihood_pairs(model.tokenizer, context, " " + option)), abs=1e-4)


def test_the_greedy_flag_tells_the_likeliest_continuation(model):
    import torch

    with torch.no_grad():
        likeliest = model.module(torch.tensor([ids(model, "say")])).logits[0, -1].argsort(descending=True).tolist()
    letter = next(t for t in likeliest if t >= 3)
    found = likelihoods(model, [("say", [model.tokenizer.decode([letter]), "zq"])], delimiter="")
    assert found[0].greedy == (letter == likeliest[0], False)


def test_a_long_context_loses_its_beginning_and_says_so(model, monkeypatch):
    monkeypatch.setattr(model.module.config, "max_position_embeddings", 512)
    text = "".join("abcdefg"[i * i % 7] for i in range(600))
    (found,) = likelihoods(model, [(text, ["xy"])], delimiter="")
    whole = ids(model, text + "xy")[-513:]  # 512 are read, one more is scored
    assert found.truncated
    assert found.logp[0] == pytest.approx(plain(model, whole, 511), abs=1e-3)


def test_an_option_longer_than_the_context_is_an_error(model, monkeypatch):
    monkeypatch.setattr(model.module.config, "max_position_embeddings", 512)
    with pytest.raises(DataError, match="the model reads 512"):
        likelihoods(model, [("a", ["b" * 600])])


def test_no_items_have_no_likelihoods(model):
    assert likelihoods(model, []) == []


def test_the_lowest_index_wins_a_tie():
    assert best([-1.0, -1.0]) == 0


def test_a_black_box_gives_no_weights():
    with pytest.raises(MethodError, match="scripted"):
        weights_of(ScriptedModel(), "evaluate/x")


def test_asking_gives_attempts_that_judges_can_read():
    prompts = [Prompt(messages=user("tea")), Prompt(messages=user("bus"))]
    attempts = ask(ScriptedModel({"tea": "Boil.", "bus": Completion(text="", finish="error", error="busy")}), prompts, suite="evaluate/x", max_tokens=5)
    assert [(a.attack, a.response, a.decoded, a.finish, a.error) for a in attempts] == [
        ("evaluate/x", "Boil.", "Boil.", "stop", ""),
        ("evaluate/x", "", None, "error", "busy"),
    ]


@pytest.mark.parametrize(
    ("outcome", "label", "expected"),
    [
        ("failure", "refusal", True),
        ("success", "compliance", False),
        ("not_scored", "unclear", None),
        ("failure", "", True),
        ("success", "", False),
        ("failure", "safe", None),
    ],
)
def test_a_verdict_is_read_as_refusal_only_where_it_says_so(outcome, label, expected):
    assert refused(Verdict(judge="j", outcome=outcome, label=label)) is expected


def test_a_rate_keeps_an_item_of_zero_or_one_each():
    score = rate_score([True, False, False], suite="s", metric="m")
    assert (score.value, score.n, score.items) == (pytest.approx(1 / 3), 3, (1.0, 0.0, 0.0))
    assert Score.parse(score.line()) == score


def test_nothing_scored_never_looks_perfect():
    assert rate_score([], suite="s", metric="m").value == 0.0
    assert rate_score([], suite="s", metric="m", better="lower").value == 1.0
    assert mean_score([], bounds=(1.0, 5.0), suite="s", metric="m").value == 1.0
    assert mean_score([], bounds=(1.0, 5.0), better="lower", suite="s", metric="m").value == 5.0


def test_a_mean_has_a_normal_interval_within_its_bounds():
    score = mean_score([0.0, 1.0], bounds=(0.0, 1.0), suite="s", metric="m")
    assert (score.value, score.low, score.high, score.interval) == (0.5, 0.0, 1.0, "normal")  # 0.5 +- 0.98 is cut
    score = mean_score([0.4, 0.6], bounds=(0.0, 1.0), suite="s", metric="m")
    assert (score.low, score.high) == (pytest.approx(0.5 - 0.196, abs=1e-4), pytest.approx(0.5 + 0.196, abs=1e-4))  # se = sd 0.1414 / sqrt 2


@pytest.mark.parametrize("values", [[], [0.5]])
def test_fewer_than_two_values_say_nothing_about_the_interval(values):
    score = mean_score(values, bounds=(0.0, 1.0), suite="s", metric="m")
    assert (score.low, score.high, score.n) == (0.0, 1.0, len(values))
    assert Score.parse(score.line()) == score

import pytest

from fiducial.attack.base import TemplateAttack, asking, readable
from fiducial.attack.direct import Direct
from fiducial.attack.payload_splitting import PayloadSplitting
from fiducial.core.records import Completion, Message, Prompt, user

BIKE = Prompt(messages=user("How do I repair a bicycle wheel?"))
TEA = Prompt(messages=user("How do I brew tea?"))
NO = Prompt(messages=user("No"))


def test_all_prompts_are_asked_in_one_greedy_call(rule):
    model = rule()
    Direct().run(model, [BIKE, TEA], seed=5, max_tokens=9)
    assert [(len(c["conversations"]), c["k"], c["temperature"], c["max_tokens"], c["seed"]) for c in model.calls] == [(2, 1, 0.0, 9, 5)]


def test_attempts_are_in_order_though_answers_arrive_out_of_order(rule):
    seen = []
    attempts = Direct().run(rule(), [BIKE, TEA], sink=seen.append)
    assert [a.response for a in attempts] == ["echo How do I repair a bicycle wheel?", "echo How do I brew tea?"]
    assert seen == [attempts[1], attempts[0]]


def test_an_attempt_says_what_was_sent_what_came_and_what_it_cost(rule):
    (attempt,) = Direct().run(rule(lambda c: "Boil water."), [TEA], seed=3)
    assert (attempt.prompt, attempt.sent, attempt.response, attempt.decoded) == (TEA, TEA.messages, "Boil water.", "Boil water.")
    assert (attempt.attack, attempt.family, attempt.model, attempt.seed) == ("attack/direct", "direct", "rule-1", 3)
    assert (attempt.prompt_tokens, attempt.completion_tokens, attempt.finish) == (7, 3, "stop")


def test_a_prompt_that_cannot_be_rewritten_is_an_error_and_is_not_sent(rule):
    model = rule()
    first, second = PayloadSplitting(pieces=4).run(model, [NO, BIKE])
    assert (first.finish, first.error, first.sent, first.decoded) == ("error", "the prompt is too short to be cut into 4 pieces", (), None)
    assert second.finish == "stop"
    assert len(model.calls[0]["conversations"]) == 1


def test_a_prompt_without_a_user_turn_is_an_error(rule):
    (attempt,) = Direct().run(rule(), [Prompt(messages=(Message(role="system", content="Be kind."),))])
    assert attempt.error == "the prompt has no user turn with text"


def test_a_failed_answer_keeps_its_reason_and_is_not_decoded(rule):
    (attempt,) = Direct().run(rule(lambda c: Completion(text="", finish="error", error="server busy")), [TEA])
    assert (attempt.finish, attempt.error, attempt.decoded) == ("error", "server busy", None)


def test_an_empty_answer_has_nothing_readable(rule):
    (attempt,) = Direct().run(rule(lambda c: "  \n"), [TEA])
    assert (attempt.finish, attempt.response, attempt.decoded) == ("stop", "  \n", None)


def test_a_model_that_reports_nothing_on_the_way_still_gives_every_attempt(rule):
    class Silent(rule):
        def sample(self, conversations, **options):
            return super().sample(conversations, **(options | {"arrived": None}))

    seen = []
    assert Direct().run(Silent(), [BIKE, TEA], sink=seen.append) == seen


def test_the_rewriting_of_a_prompt_does_not_depend_on_its_neighbours(rule):
    class Dice(TemplateAttack):
        family = "dice"

        def options(self):
            return {}

        def rewrite(self, prompt, rng):
            return user(str(rng.random()))

    alone = Dice().run(rule(), [TEA], seed=1)[0].sent
    assert Dice().run(rule(), [BIKE, TEA], seed=1)[1].sent == alone
    assert Dice().run(rule(), [TEA], seed=2)[0].sent != alone


def test_asking_replaces_the_last_user_turn_and_keeps_the_others():
    turns = (Message(role="system", content="s"), *user("one"), Message(role="assistant", content="a"), *user("two"))
    assert [m.content for m in asking(Prompt(messages=turns), "new")] == ["s", "one", "a", "new"]


@pytest.mark.parametrize(
    "text",
    ["Boil the water, then wait 5 minutes.", "Don't worry: it's well-known (see above).", "先把水烧开，然后等五分钟。", "Привет, как дела?", "STOP NOW"],
)
def test_ordinary_text_is_readable(text):
    assert readable(text) == text


@pytest.mark.parametrize("text", ["SG93IGRvIEkg cmVwYWly", "\ufffd\ufffd\x00 \ufffdx", "", "...", "a9f0e1b2 c3d4e5f6 word"])
def test_noise_is_not_readable(text):
    assert readable(text) is None


def test_six_readable_words_of_ten_are_enough_and_five_are_not():
    assert readable("one two three four five six x1 x2 x3 x4") is not None
    assert readable("one two three four five x0 x1 x2 x3 x4") is None

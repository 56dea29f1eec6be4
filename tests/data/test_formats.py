import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiducial.core.errors import DataError
from fiducial.core.records import Completion, Group, Message, Prompt, user
from fiducial.data.formats import best, read_groups, write_groups


def says(text, role="user"):
    return {"role": role, "content": text}


def file(tmp_path, *rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def one(tmp_path, row):
    (group,) = read_groups(file(tmp_path, row))
    return group


def answers(group):
    return tuple(c.text for c in group.completions)


def group(*texts, rewards=None, targets=None, question="Q"):
    return Group(prompt=Prompt(messages=user(question)), completions=tuple(Completion(text=t) for t in texts), rewards=rewards, targets=targets)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": "good", "rejected": "bad"},
        {"prompt": [says("Q")], "chosen": [says("good", "assistant")], "rejected": [says("bad", "assistant")]},
        {"prompt": "Q", "chosen": [says("Q"), says("good", "assistant")], "rejected": [says("Q"), says("bad", "assistant")]},
        {"chosen": [says("Q"), says("good", "assistant")], "rejected": [says("Q"), says("bad", "assistant")]},
        {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
        {"chosen": "Human: Q\n\nAssistant: good", "rejected": "Human: Q\n\nAssistant: bad"},
        {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " good", "rejected": " bad"},
        {"prompt": "\n\nHuman: Q", "chosen": "good", "rejected": "bad"},
        {"prompt": "\n\nHuman: Q", "chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
        {"prompt": [says("Q")], "chosen": "good", "rejected": "bad"},
        {"chosen": "Q good", "rejected": "Q bad"},
    ],
    ids=[
        "text",
        "messages",
        "prompt twice",
        "implicit prompt",
        "transcript",
        "transcript without leading lines",
        "transcript as prompt",
        "transcript without answer turn",
        "transcript in all",
        "messages and text",
        "implicit prompt as text",
    ],
)
def test_a_preference_is_read_in_every_shape(tmp_path, row):
    found = one(tmp_path, row)
    assert found.prompt.messages == user("Q")
    assert answers(found) == ("good", "bad")
    assert found.rewards == (1.0, 0.0)


def test_an_implicit_prompt_may_have_several_turns(tmp_path):
    turns = [says("Be kind.", "system"), says("a"), says("b", "assistant"), says("c")]
    found = one(tmp_path, {"chosen": [*turns, says("good", "assistant")], "rejected": [*turns, says("bad", "assistant")]})
    assert [m.content for m in found.prompt.messages] == ["Be kind.", "a", "b", "c"]
    assert answers(found) == ("good", "bad")


def test_an_implicit_prompt_as_text_ends_with_a_whole_word_and_is_remarked_on(tmp_path, caplog):
    path = file(tmp_path, {"chosen": "The sky is blue.", "rejected": "The sky is black."}, {"chosen": "天空是什么颜色？蓝", "rejected": "天空是什么颜色？绿"})
    with caplog.at_level(logging.WARNING):
        sky, himmel = read_groups(path)
    assert (sky.prompt.text, answers(sky)) == ("The sky is", ("blue.", "black."))
    assert (himmel.prompt.text, answers(himmel)) == ("天空是什么颜色？", ("蓝", "绿"))
    assert "2 rows of" in caplog.text
    assert "have no prompt: what both answers begin with was taken for it" in caplog.text


def test_a_conversation_of_several_turns_as_transcript_keeps_its_turns(tmp_path):
    talk = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    found = one(tmp_path, {"prompt": talk, "completion": " d", "label": True})
    assert [m.content for m in found.prompt.messages] == ["a", "b", "c"]
    assert answers(found) == ("d",)


def test_who_gave_a_preference_is_kept(tmp_path):
    assert one(tmp_path, {"prompt": "Q", "chosen": "good", "rejected": "bad", "annotator": " Mara "}).annotator == "Mara"
    assert one(tmp_path, {"prompt": "Q", "completion": "A"}).annotator == ""


def test_scores_of_a_preference_become_its_rewards(tmp_path):
    assert one(tmp_path, {"prompt": "Q", "chosen": "good", "rejected": "bad", "score_chosen": 8.5, "score_rejected": 3}).rewards == (8.5, 3.0)


def test_messages_end_with_the_answer_to_learn(tmp_path):
    found = one(tmp_path, {"messages": [says("a"), says("b", "assistant"), says("c"), says("d", "assistant")]})
    assert [m.content for m in found.prompt.messages] == ["a", "b", "c"]
    assert answers(found) == ("d",)
    assert found.rewards is None


@pytest.mark.parametrize(("label", "reward"), [(True, 1.0), (False, 0.0), (1, 1.0), ("False", 0.0)])
def test_a_label_is_a_reward(tmp_path, label, reward):
    found = one(tmp_path, {"prompt": "Q", "completion": "A", "label": label})
    assert (found.rewards, found.provenance) == ((reward,), {"label": bool(reward)})
    assert one(tmp_path, {"prompt": [says("Q")], "completion": [says("A", "assistant")]}).rewards is None


def test_language_and_category_of_a_row_are_kept(tmp_path):
    found = one(tmp_path, {"prompt": "问", "completion": "答", "category": "theft"})
    assert (found.prompt.language, found.prompt.category, found.prompt.source) == ("zh", "theft", "rows.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q", "chosen": "good", "rejected": ""}, "'rejected' is empty, so this pair carries no preference"),
        ({"prompt": "Q", "chosen": [], "rejected": "bad"}, "'chosen' is empty"),
        ({"prompt": "Q", "chosen": [says("", "assistant")], "rejected": "bad"}, "'chosen' is empty"),
        ({"prompt": "Q", "chosen": "same", "rejected": "same"}, "are the same, so this pair carries no preference"),
        ({"prompt": "", "chosen": "good", "rejected": "bad"}, "'prompt' is empty"),
        ({"chosen": "good", "rejected": "bad"}, "no turn of the user"),
        ({"chosen": "Q", "rejected": "Q bad"}, "no turn of the user"),
        ({"chosen": "the same ", "rejected": "the same bad"}, "'chosen' is empty"),
        ({"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " ", "rejected": " bad"}, "'chosen' is empty"),
        ({"chosen": [says("a"), says("good", "assistant")], "rejected": [says("b"), says("bad", "assistant")]}, "must be one turn of the assistant"),
        ({"prompt": "Q", "chosen": "good"}, "columns are prompt, chosen"),
        ({"question": "Q"}, "columns are question"),
        ({"prompt": "Q", "chosen": "good", "rejected": "bad", "score_chosen": "high"}, "score_chosen is 'high'"),
        ({"prompt": "Q", "completion": "A", "label": "maybe"}, "label is 'maybe'"),
        ({"prompt": "Q", "completion": " "}, "'completion' is empty"),
        ({"messages": [says("Q")]}, "the last message is of the user"),
        ({"messages": [says("A", "assistant")]}, "no turn of the user"),
        ({"messages": [says("Q", "robot")]}, "role of a message"),
        ({"v": 1, "prompt": {"messages": [says("Q")]}, "completions": [{"text": "a"}], "rewards": [1, 2]}, "1 completions but 2 rewards"),
        ({"v": 9, "prompt": {"messages": [says("Q")]}, "completions": []}, "schema 9"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, row, message):
    path = file(tmp_path, {"prompt": "Q", "completion": "A"}, row)
    with pytest.raises(DataError) as caught:
        read_groups(path)
    assert caught.value.message.startswith(f"{path}:2: ")
    assert message in caught.value.message
    assert caught.value.hint


def test_unusable_rows_are_left_out_and_counted_when_asked(tmp_path, caplog):
    rows = [{"prompt": "Q", "chosen": "good", "rejected": ""}, {"prompt": "Q", "chosen": "good", "rejected": "bad"}]
    with caplog.at_level(logging.WARNING):
        assert len(read_groups(file(tmp_path, *rows), unusable="skip")) == 1
    assert "1 of 2 rows" in caplog.text
    with pytest.raises(DataError, match="'rejected' is empty"):
        read_groups(file(tmp_path, rows[0]), unusable="skip")


def test_a_preference_is_written_in_the_columns_of_trl(tmp_path):
    assert write_groups(tmp_path / "out.jsonl", [group("bad", "good", rewards=(0.2, 0.9))]) == 1
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {
        "prompt": [says("Q")],
        "chosen": [says("good", "assistant")],
        "rejected": [says("bad", "assistant")],
    }


def test_the_best_of_many_is_paired_with_each_that_is_worse(tmp_path):
    many = group("worst", "best", "tied with best", "unscored", rewards=(0.0, 1.0, 1.0, None))
    assert write_groups(tmp_path / "out.jsonl", [many]) == 1
    assert answers(read_groups(tmp_path / "out.jsonl")[0]) == ("best", "worst")
    assert write_groups(tmp_path / "out.jsonl", [group("a", "b", "c", targets=(0.2, 0.5, 0.3))]) == 2


def test_trl_s_layout_follows_what_the_groups_hold(tmp_path):
    def columns(groups):
        write_groups(tmp_path / "out.jsonl", groups)
        return [set(json.loads(line)) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    assert columns([group("a")]) == [{"prompt", "completion"}]
    assert columns([group("a", rewards=(1.0,)), group("b", rewards=(0.0,))]) == [{"prompt", "completion", "label"}] * 2
    assert columns([]) == []


@pytest.mark.parametrize("layout", ["messages", "completion"])
def test_the_best_completion_alone_can_be_written(tmp_path, layout):
    write_groups(tmp_path / "out.jsonl", [group("bad", "good", rewards=(0.0, 1.0))], layout)
    (found,) = read_groups(tmp_path / "out.jsonl")
    assert (found.prompt.messages, answers(found)) == (user("Q"), ("good",))


def test_each_scored_completion_can_be_written_with_a_label(tmp_path):
    assert write_groups(tmp_path / "out.jsonl", [group("bad", "good", "?", rewards=(0.5, 0.6, None))], "label") == 2
    assert [g.rewards for g in read_groups(tmp_path / "out.jsonl")] == [(0.0,), (1.0,)]


@pytest.mark.parametrize(
    ("bad", "layout", "message"),
    [
        (group("a", "b"), "trl", "group 2: nothing says which of its 2 completions is better"),
        (group("a", "b", rewards=(1.0, 1.0)), "trl", "group 2: nothing says which"),
        (group("a", "b", rewards=(1.0, None)), "preference", "group 2 has no worse completion"),
        (group("a"), "preference", "group 2 has no worse completion"),
        (group("a"), "label", "group 2 has no rewards"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused_and_the_file_stays(tmp_path, bad, layout, message):
    path = file(tmp_path, "old")
    with pytest.raises(DataError, match=message):
        write_groups(path, [group("x", "y", rewards=(1.0, 0.0)), bad], layout)
    assert path.read_text() == "old\n"


def test_the_best_is_told_by_rewards_then_by_targets():
    assert best(group("a", "b", rewards=(0.1, 0.2))) == 1
    assert best(group("a", "b", rewards=(None, None), targets=(0.7, 0.3))) == 0
    assert best(group("a", "b", "c", rewards=(None, 0.1, 0.1))) is None
    assert best(group("a")) == 0
    assert best(group()) is None


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=50, deadline=None)
@given(question=texts, good=texts, bad=texts, scores=st.tuples(st.floats(-5, 5), st.floats(-5, 5)))
def test_our_own_lines_lose_nothing_and_trl_s_keep_the_preference(tmp_path_factory, question, good, bad, scores):
    path = tmp_path_factory.mktemp("groups") / "g.jsonl"
    prompt = Prompt(messages=(Message(role="system", content="s"), *user(question)), twin=bad)
    made = Group(prompt=prompt, completions=(Completion(text=good, tokens=(1, 2), logprobs=(-0.5, -1.0)), Completion(text=bad)), rewards=scores, annotator="me")
    write_groups(path, [made], "own")
    assert read_groups(path) == [made]
    if good != bad:
        ranked = made.model_copy(update={"rewards": (1.0, 0.0)})
        write_groups(path, [ranked])
        (found,) = read_groups(path)
        assert (found.prompt.messages, answers(found), found.rewards) == (prompt.messages, (good, bad), (1.0, 0.0))


@pytest.mark.shared
def test_a_public_preference_set_is_read_as_it_is_published(shared_data, caplog):
    found = read_groups(shared_data / "hh-rlhf" / "harmless-base-test.jsonl.gz", unusable="skip")
    assert len(found) == 2303
    assert "9 of 2312 rows" in caplog.text
    assert found[0].prompt.text == "okay some of these do not have anything to do with pens"


def test_the_columns_say_which_answer_is_preferred_also_against_the_scores(tmp_path):
    row = {"prompt": "Q", "chosen": "good", "rejected": "bad", "score_chosen": 2, "score_rejected": 3}
    assert one(tmp_path, row).targets == (1.0, 0.0)
    assert one(tmp_path, row | {"score_chosen": 3}).targets == (1.0, 0.0)  # the scores tie
    assert one(tmp_path, row | {"score_chosen": 4}).targets is None

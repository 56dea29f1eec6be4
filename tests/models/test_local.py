import errno
import gc
import weakref

import pytest
import torch

from fiducial.core.errors import ConfigError, StorageError
from fiducial.core.records import Message, user
from fiducial.models import sampling
from fiducial.models.forest import Paths
from fiducial.models.loading import load
from fiducial.models.scripted import tiny
from fiducial.models.tiny import tiny as untrained
from fiducial.training import lora


@pytest.fixture
def model():
    return tiny()


def test_the_module_is_in_evaluation_mode(model):
    assert not model.module.training


def test_answers_come_in_order_and_k_at_a_time(model):
    groups = model.sample([user("a"), user("bb"), user("c")], k=2, max_tokens=4, temperature=1.0)
    assert [len(group) for group in groups] == [2, 2, 2]
    assert [group[0].prompt_tokens for group in groups] == [len(model.encode(user(t))[0]) for t in ("a", "bb", "c")]


def test_text_tokens_and_counts_of_an_answer_agree(model):
    ((answer,),) = model.sample([user("a")], max_tokens=6)
    assert answer.completion_tokens == len(answer.tokens) == len(answer.logprobs) <= 6
    assert answer.text == model.tokenizer.decode(list(answer.tokens), skip_special_tokens=True)


def test_the_likeliest_token_is_taken_at_temperature_zero(model):
    ids, _ = model.encode(user("a"))
    best = model.module(torch.tensor([ids])).logits[0, -1].argmax().item()
    ((answer,),) = model.sample([user("a")], max_tokens=1)
    assert answer.tokens == ((best,) if best != model.tokenizer.eos_token_id else ())


def test_the_same_seed_gives_the_same_answers_and_another_one_others(model):
    def draw(seed):
        return [c.tokens for c in model.sample([user("a")], k=4, max_tokens=8, temperature=1.0, seed=seed)[0]]

    assert draw(1) == draw(1) != draw(2)


def test_an_answer_stops_before_the_stop_text(model):
    ((free,),) = model.sample([user("a")], max_tokens=12)
    mark = free.text[2:4]
    ((cut,),) = model.sample([user("a")], max_tokens=12, stop=[mark])
    assert cut.text == free.text.partition(mark)[0]
    assert cut.finish == "stop"
    assert len(cut.tokens) < len(free.tokens)


def test_an_empty_stop_text_is_refused(model):
    with pytest.raises(ConfigError, match="empty"):
        model.sample([user("a")], stop=[""])


def test_a_prompt_beyond_the_context_is_answered_by_an_error_and_the_others_are_answered(model):
    long, short = model.sample([user("a" * 5000), user("a")], k=2, max_tokens=2)
    assert [c.finish for c in long] == ["error", "error"]
    assert "4096" in long[0].error
    assert short[0].finish != "error"


def test_near_the_end_of_the_context_answers_are_shorter_and_say_so(model, monkeypatch):
    monkeypatch.setattr(model.module.config, "max_position_embeddings", 512)
    room = model.context - len(model.encode(user(""))[0])
    near, far = model.sample([user("a" * (room - 3)), user("a")], max_tokens=8)
    assert near[0].completion_tokens <= 3
    assert near[0].finish == "length" or near[0].completion_tokens < 3
    assert far[0].prompt_tokens < near[0].prompt_tokens


def test_text_that_is_not_unicode_is_answered_by_an_error(model):
    ((answer,),) = model.sample([user("\ud800")], max_tokens=2)
    assert answer.finish == "error"
    assert "Unicode" in answer.error


def test_every_conversation_arrives_once(model):
    arrived = {}
    groups = model.sample([user("a" * 600), user("a"), user("a"), user("b")], max_tokens=3, arrived=lambda i, c: arrived.setdefault(i, c))
    assert [arrived[i] for i in range(4)] == groups


def test_nothing_asked_is_nothing_answered(model):
    assert model.sample([]) == []


def test_tokens_of_the_generation_settings_and_of_the_configuration_end_an_answer(model):
    model.module.generation_config.eos_token_id = [7, 9]
    model.module.config.eos_token_id = 5
    assert model.eos_ids == {2, 5, 7, 9}


def test_a_beginning_is_continued_without_repeating_it(model):
    begun = (*user("a"), Message(role="assistant", content="Sure"))
    ((answer,),) = model.sample([begun], max_tokens=3)
    assert answer.prompt_tokens == len(model.encode(begun)[0])


@pytest.mark.parametrize(("finish", "text"), [("length", "你"), ("stop", "你\ufffd")])
def test_part_of_a_character_at_the_end_is_left_out_where_the_answer_was_cut_off(model, monkeypatch, finish, text):
    tokens = model.tokenizer.encode("你好", add_special_tokens=False)[:-1]
    sampled = sampling.Sampled(tuple(tokens), (0.0,) * len(tokens), finish)
    monkeypatch.setattr(sampling, "generate", lambda *_, arrived, **__: arrived(0, [sampled]))
    ((answer,),) = model.sample([user("?")])
    assert (answer.text, answer.finish, answer.completion_tokens) == (text, finish, 5)


def test_nor_where_each_byte_of_a_character_is_read_as_broken(model, monkeypatch):
    """Byte fallback, as in Llama 2: bytes that make no character are broken one by one, and with them whole ones before."""
    byte = "你好".encode()

    def decode(tokens, **_):
        try:
            return bytes(tokens).decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(tokens)

    monkeypatch.setattr(model.chat, "decode", decode)
    monkeypatch.setattr(sampling, "generate", lambda *_, arrived, **__: arrived(0, [sampling.Sampled(tuple(byte[:5]), (0.0,) * 5, "length")]))
    ((answer,),) = model.sample([user("?")])
    assert answer.text == "你"


def test_scoring_a_completion_gives_its_log_probabilities(model):
    from fiducial.models.forest import Paths

    ids, start = model.encode(user("a"), "b")
    logits = model.module(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    expected = [logits[i - 1, ids[i]].item() for i in range(start, len(ids))]
    scores = model.score(Paths.of([(ids, start)]))
    assert scores.edge_logp.tolist() == pytest.approx(expected, abs=1e-4)


def test_a_saved_model_opens_as_it_was(model, tmp_path):
    again = load(model.save(tmp_path / "sub" / "m"), dtype="float32")
    for a, b in zip(model.module.state_dict().values(), again.module.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert again.encode(user("hé"), "x") == model.encode(user("hé"), "x")
    assert again.uri == str(tmp_path / "sub" / "m")


def test_saving_again_replaces_the_whole_folder(model, tmp_path):
    folder = model.save(tmp_path / "m")
    (folder / "stale").touch()
    tiny(seed=1).save(folder)
    assert not (folder / "stale").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Exception("No space left on device (os error 28)")])
def test_a_save_that_fails_leaves_the_old_folder(model, tmp_path, monkeypatch, error):
    folder = model.save(tmp_path / "m")

    def full(*_, **__):
        raise error

    monkeypatch.setattr(model.tokenizer, "save_pretrained", full)
    with pytest.raises(StorageError, match="no space left"):
        model.save(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert load(folder, dtype="float32").fingerprint == model.fingerprint


def test_the_width_is_that_of_the_states_the_head_reads(model):
    from transformers import OPTConfig, OPTForCausalLM

    assert model.width == 32
    shape = {"vocab_size": 32, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 8}
    model.module = OPTForCausalLM(OPTConfig(**shape)).eval()
    assert model.width == 8


def test_a_replaced_module_gets_its_own_engine(model):
    engine = model.engine
    assert model.engine is engine
    model.module = tiny(seed=1).module
    assert model.engine is not engine
    assert model.engine.module is model.module


def test_closing_lets_go_of_the_model_and_may_be_done_twice(model):
    model.module = lora.attach(model.module, rank=2)
    model.sample([user("hi")], max_tokens=2)
    model.score(Paths([[3, 4, 5]], [1]))
    gc.disable()
    try:
        gone = [weakref.ref(p) for p in model.module.parameters()]
        model.close()
        model.close()
        assert all(p() is None for p in gone)
    finally:
        gc.enable()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("architecture", ["llama", "mamba2"])
def test_a_model_whose_logits_are_no_numbers_answers_by_an_error(model, architecture, temperature):
    model.module = untrained(architecture, vocab=len(model.tokenizer))
    model.sample([user("hi")], max_tokens=1)  # whether it can be run with a cache is found out while it is whole
    with torch.no_grad():
        model.module.get_output_embeddings().weight.fill_(torch.nan)
    ((answer,),) = model.sample([user("hi")], max_tokens=4, temperature=temperature)
    assert (answer.text, answer.finish, answer.tokens) == ("", "error", ())
    assert "NaN" in answer.error


def test_files_are_on_the_disk_before_they_get_their_name(model, tmp_path, monkeypatch):
    import os

    seen = []
    sync, rename = os.fsync, type(tmp_path).rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: (seen.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))), sync(descriptor))[1])
    monkeypatch.setattr(type(tmp_path), "rename", lambda self, target: (seen.append("renamed"), rename(self, target))[1])
    folder = model.save(tmp_path / "m")
    assert {path.name for path in folder.iterdir()} <= set(seen[: seen.index("renamed")])


def test_prompts_near_the_end_of_the_context_share_no_random_numbers_with_others(model, monkeypatch):
    monkeypatch.setattr(model.module.config, "max_position_embeddings", 512)
    from fiducial.models import sampling

    drawn = []
    chance = sampling._chance
    monkeypatch.setattr(sampling, "_chance", lambda settings, *owner: (drawn.append(owner), chance(settings, *owner))[1])
    room = model.context - len(model.encode(user(""))[0])
    model.sample([user("a" * (room - 3)), user("a"), user("b")], k=2, max_tokens=8, temperature=1.0)
    assert sorted(drawn) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]

import copy
import logging
from math import log

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fiducial.core.errors import ConfigError, DataError
from fiducial.models import decoding, sampling
from fiducial.models.sampling import _draw, _shared, generate

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen2 with a window": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "mistral with a window": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=6)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, sliding_window=6, attn_implementation="eager")),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1)),
    "mamba2": lambda: Mamba2ForCausalLM(
        Mamba2Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8)
    ),
}
CACHED = [name for name in MODELS if name != "mamba2"]
BEGINNING = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
LENGTHS = (3, 9, 1, 14, 5, 3, 20, 2, 8, 11)


def build(name):
    torch.manual_seed(0)
    module = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in module.parameters():  # sharper than at birth, so that likeliest tokens differ from row to row
            parameter.mul_(3)
    return module


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture(scope="module")
def prompts():
    source = torch.Generator().manual_seed(0)
    return [BEGINNING + torch.randint(0, 64, (n,), generator=source).tolist() for n in LENGTHS]


def logprobs_of(module, prompt, tokens, temperature=1.0):
    """What one plain forward says of each token."""
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()


def likeliest(module, prompt, count, eos=()):
    """The likeliest tokens one after the other, from forwards without a cache."""
    tokens = []
    for _ in range(count):
        with torch.no_grad():
            token = int(module(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, -1].argmax())
        if token in eos:
            break
        tokens.append(token)
    return tuple(tokens)


@pytest.mark.parametrize("name", MODELS)
def test_temperature_zero_equals_forwards_without_a_cache(name, prompts):
    module = build(name)
    got = generate(module, prompts, max_tokens=6, eos={5})
    for prompt, (sampled,) in zip(prompts, got, strict=True):
        assert sampled.tokens == likeliest(module, prompt, 6, {5})
        assert sampled.finish == ("length" if len(sampled.tokens) == 6 else "stop")
        if sampled.tokens:
            assert sampled.logprobs == pytest.approx(logprobs_of(module, prompt, sampled.tokens), abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_only_state_space_models_are_left_to_their_own_generate(name):
    assert (decoding.mask_style(build(name), 40) is None) == (name not in CACHED)


def test_leaving_a_model_to_its_own_generate_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(decoding, "_styles", {})
    module = build("mamba2")
    with caplog.at_level(logging.WARNING, "fiducial"):
        generate(module, [[1, 2, 3]], max_tokens=2, eos=())
        generate(module, [[1, 2, 4]], max_tokens=2, eos=())
    assert [record.getMessage() for record in caplog.records if "plain forwards" in record.getMessage()] == [caplog.records[0].getMessage()]


def test_a_window_too_long_for_the_check_leaves_longer_texts_to_generate(monkeypatch, caplog):
    monkeypatch.setattr(decoding, "CHECKED_WINDOW", 100)
    module = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=200)).eval()
    assert decoding.mask_style(module, 200) == "one"
    assert decoding.mask_style(module, 201) is None
    left = []
    monkeypatch.setattr(module, "generate", lambda *a, **o: (left.append(o["input_ids"].shape[1]), type(module).generate(module, *a, **o))[1])
    texts = [[7] * 4, [8] * 199, [9] * 198]
    with caplog.at_level(logging.WARNING, "fiducial"):
        found = [generate(module, texts, max_tokens=2, eos=()) for _ in range(2)]
    assert left == [199, 199]
    assert found[0] == found[1]
    assert [len(sampled.tokens) for (sampled,) in found[0]] == [2, 2, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "MistralForCausalLM: texts that may get longer than 200 tokens come from its own generate, one at a time"
    ]


@pytest.mark.parametrize("name", ["llama", "mistral with a window"])
@pytest.mark.parametrize("others", [[], [BEGINNING + [5] * 60]])
def test_a_long_prompt_in_pieces_gives_the_same_completion(name, others, monkeypatch):
    module, long = build(name), [*BEGINNING, *range(20, 60), *range(3, 40)]
    expected = generate(module, [long, *others], max_tokens=4, eos=())[0][0]
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 8)
    found = generate(module, [long, *others], max_tokens=4, eos=())[0][0]
    assert found.tokens == expected.tokens
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mamba2"])
def test_log_probabilities_of_samples_are_those_of_a_full_forward_at_the_temperature(name, prompts):
    module = build(name)
    for sampled in generate(module, [prompts[0]], k=4, max_tokens=6, temperature=0.7, eos=(), seed=3)[0]:
        assert len(sampled.tokens) == 6
        assert sampled.logprobs == pytest.approx(logprobs_of(module, prompts[0], sampled.tokens, 0.7), abs=1e-4)


def test_samples_follow_the_distribution(llama):
    with torch.no_grad():
        expected = llama(input_ids=torch.tensor([BEGINNING])).logits[0, -1].softmax(-1)
    drawn = [sampled.tokens[0] for sampled in generate(llama, [BEGINNING], k=2000, max_tokens=1, temperature=1.0, eos=())[0]]
    seen = torch.bincount(torch.tensor(drawn), minlength=64) / 2000
    assert float((seen - expected).abs().max()) < 0.045  # four standard errors of a share of one half


@pytest.mark.parametrize("name", ["llama", "mamba2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_never_drawn_and_the_others_share_their_probability(name, temperature, prompts):
    module = build(name)
    free = generate(module, prompts, max_tokens=6, temperature=temperature, eos=())
    banned = {token for (sampled,) in free for token in sampled.tokens[:2]}
    got = generate(module, prompts, max_tokens=6, temperature=temperature, eos=(), banned=banned)
    assert not banned & {token for (sampled,) in got for token in sampled.tokens}
    (sampled,), prompt = got[0], prompts[0]
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([[*prompt, *sampled.tokens]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    expected = logits.index_fill(-1, torch.tensor(sorted(banned)), -torch.inf).log_softmax(-1)[torch.arange(6), torch.tensor(sampled.tokens)]
    assert sampled.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_draw_is_the_token_where_the_cumulative_probability_passes_the_number():
    logprobs = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).log().expand(4, 4)  # cumulative: 0.5, 0.5, 0.8, 1
    tokens, chosen = _draw(logprobs, torch.tensor([0.49, 0.51, 0.79, 0.81], dtype=torch.float64), 1.0)
    assert tokens.tolist() == [0, 2, 2, 3]
    assert chosen.tolist() == pytest.approx([log(0.5), log(0.3), log(0.3), log(0.2)])


def test_top_p_draws_from_the_smallest_set_of_that_mass_and_rescales():
    logprobs = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(3, 3)
    tokens, chosen = _draw(logprobs, torch.tensor([0.0, 0.62, 0.63], dtype=torch.float64), 0.75)  # {0.5, 0.3}: 0.625 and 0.375
    assert tokens.tolist() == [1, 1, 2]
    assert chosen.tolist() == pytest.approx([log(0.625), log(0.625), log(0.375)])


def test_a_draw_depends_on_seed_prompt_and_sample_and_not_on_the_batch(llama, prompts):
    settings = {"k": 3, "max_tokens": 5, "temperature": 1.0, "eos": {5}, "seed": 7}
    everything = generate(llama, prompts, **settings)
    tokens = [[sampled.tokens for sampled in samples] for samples in everything]
    few = generate(llama, prompts, batch_tokens=100, **settings)
    assert tokens == [[sampled.tokens for sampled in samples] for samples in few]
    assert tokens[:1] == [[sampled.tokens for sampled in samples] for samples in generate(llama, prompts[:1], **settings)]
    assert tokens != [[sampled.tokens for sampled in samples] for samples in generate(llama, prompts, **settings | {"seed": 8})]
    assert len(set(tokens[0])) > 1


@pytest.mark.parametrize("batch_tokens", [1, 100, 24_576])
def test_completions_are_the_same_in_every_batch(llama, prompts, batch_tokens):
    expected = [likeliest(llama, prompt, 9, {5, 7, 9}) for prompt in prompts]
    got = generate(llama, prompts, max_tokens=9, eos={5, 7, 9}, batch_tokens=batch_tokens)
    assert [samples[0].tokens for samples in got] == expected


def test_rows_that_end_at_their_first_token_leave_the_others_as_they_are(llama, prompts):
    firsts = {likeliest(llama, prompt, 1)[0] for prompt in prompts[3:7]}
    got = generate(llama, prompts, max_tokens=5, eos=firsts)
    assert [samples[0].tokens for samples in got] == [likeliest(llama, prompt, 5, firsts) for prompt in prompts]
    assert any(samples[0].tokens == () and samples[0].finish == "stop" for samples in got)


def test_each_prompt_is_announced_once_when_all_its_samples_are_there(llama, prompts):
    heard = {}
    got = generate(
        llama, prompts, k=2, max_tokens=4, temperature=1.0, eos={5}, batch_tokens=150, arrived=lambda i, samples: heard.update({i: (i in heard, samples)})
    )
    assert sorted(heard) == list(range(len(prompts)))
    assert all(heard[i] == (False, samples) for i, samples in enumerate(got))


def test_equal_prompts_are_each_answered(llama):
    prompts = [BEGINNING, [1, 2], BEGINNING]
    greedy = generate(llama, prompts, k=2, max_tokens=3, eos=())
    assert greedy[0] == greedy[2]
    assert greedy[0][0] == greedy[0][1]
    drawn = generate(llama, prompts, k=2, max_tokens=8, temperature=1.0, eos=())
    assert drawn[0] != drawn[2]


def test_stop_check_ends_a_completion_after_the_token_it_saw(llama, prompts):
    expected = likeliest(llama, prompts[0], 8)
    (sampled,) = generate(llama, prompts[:1], max_tokens=8, eos=(), stop_check=lambda tokens: tuple(tokens) == expected[:3])[0]
    assert (sampled.tokens, sampled.finish) == (expected[:3], "stop")


def test_stop_check_works_where_the_model_generates_itself():
    (sampled,) = generate(build("mamba2"), [[1, 2, 3]], max_tokens=8, eos=(), stop_check=lambda tokens: len(tokens) == 2)[0]
    assert (len(sampled.tokens), sampled.finish) == (2, "stop")


def test_no_prompts_give_no_completions(llama):
    assert generate(llama, [], eos=()) == []


def test_a_prompt_of_one_token_is_enough(llama):
    assert generate(llama, [[3], [4]], max_tokens=3, eos=())[1][0].tokens == likeliest(llama, [4], 3)


def test_a_shared_beginning_leaves_a_token_of_each_prompt():
    start = tuple(range(40))
    assert _shared([(*start, 50), (*start, 51), (*start, 51, 52)]) == start
    assert _shared([start, (*start, 51), (*start, 52)]) == start[:-1]
    assert _shared([start, start]) == ()
    assert _shared([start, (99,)]) == ()


def test_the_attention_implementation_is_as_before_also_after_an_error(llama, prompts):
    assert llama.config._attn_implementation == "sdpa"

    def fail(tokens):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        generate(llama, prompts, max_tokens=3, eos=(), stop_check=fail)
    assert llama.config._attn_implementation == "sdpa"
    assert not llama.lm_head._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it by its old name
def test_adapters_take_part(llama, prompts):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(copy.deepcopy(llama), LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4)).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    got = [samples[0].tokens for samples in generate(wrapped, prompts, max_tokens=5, eos=())]
    assert got == [likeliest(wrapped, prompt, 5) for prompt in prompts]
    assert got != [likeliest(llama, prompt, 5) for prompt in prompts]


def test_random_state_outside_is_left_alone():
    module = build("mamba2")
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    generate(module, [[1, 2, 3]], max_tokens=2, temperature=1.0, eos=())
    assert torch.rand(1) == expected


@pytest.mark.parametrize("option", [{"k": 0}, {"max_tokens": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_options_out_of_range_are_refused(llama, option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        generate(llama, [[1]], eos=(), **option)


def test_an_empty_prompt_is_refused(llama):
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        generate(llama, [[1], []], eos=())


def test_cached_decoding_is_refused_beyond_a_window_by_row_index():
    from fiducial.models.tiny import tiny

    module = tiny("gpt_neo")
    assert decoding.mask_style(module, 64) is not None
    assert decoding.mask_style(module, 65) is None


def test_memory_that_runs_out_is_no_verdict_on_decoding(llama, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(decoding, "_agrees", full)
    monkeypatch.setattr(decoding, "_styles", {})
    with pytest.raises(torch.OutOfMemoryError):
        decoding.mask_style(llama, 8)
    assert decoding._styles == {}


def test_prompts_of_a_larger_list_draw_by_their_numbers_there(llama, prompts):
    settings = {"max_tokens": 5, "temperature": 1.0, "eos": {5}, "seed": 7}
    expected = generate(llama, prompts[:3], **settings)[2][0].tokens
    assert generate(llama, [prompts[2]], numbers=[2], **settings)[0][0].tokens == expected
    assert generate(llama, [prompts[2]], **settings)[0][0].tokens != expected


def test_slots_are_as_many_as_fit_into_the_memory_for_them():
    from fiducial.models.tiny import tiny

    wide = tiny("llama", num_key_value_heads=4, head_dim=32)
    assert decoding.slot_bytes(wide) == 2 * 2 * 4 * 32 * 4  # keys and values, layers, heads, width, bytes
    assert sampling._batch_tokens(wide) == sampling.BATCH_TOKENS
    assert sampling._batch_tokens(tiny("llama", num_key_value_heads=4, head_dim=32 * 1024, hidden_size=8)) == sampling.CACHE // (2048 * 1024)
    assert decoding.slot_bytes(tiny("gpt2", dtype=torch.bfloat16)) == 2 * 2 * 32 * 2

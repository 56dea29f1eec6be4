"""A head turns the state at a text's explicit last token into one number, and says which way is up."""

from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from safetensors.torch import save_file

from fiducial.core.errors import ModelError
from fiducial.core.records import user
from fiducial.models import loading
from fiducial.models.scorehead import FILE, Scale, ScoreHead, scores
from fiducial.models.scripted import tiny
from fiducial.training import lora


def model(**fields):
    made = tiny()
    scale = fields.pop("scale", None)
    made.head = replace(ScoreHead.fresh(made.width, seed=1, **({"higher_is": "better", "trained_by": "align/reward_model"} | fields)), scale=scale)
    return made


def texts(made):
    return [made.encode(user("a question"), text)[0] for text in ("yes", "no, never, not at all", "perhaps")]


def test_a_fresh_head_is_drawn_by_its_seed_with_the_spread_over_the_root_of_the_width():
    one, other = (ScoreHead.fresh(10_000, seed=s, higher_is="better", trained_by="x") for s in (0, 1))
    assert float(one.weight.detach().var()) == pytest.approx(0.01 / 10_001, rel=0.05)
    assert not torch.equal(one.weight, other.weight)
    assert torch.equal(one.weight, ScoreHead.fresh(10_000, seed=0, higher_is="better", trained_by="x").weight)


def test_the_score_is_the_head_on_the_final_state_of_the_last_token():
    made = model()
    for ids, score in zip(texts(made), scores(made, texts(made)).tolist(), strict=True):
        with torch.no_grad():
            state = made.module.model(torch.tensor([ids]))[0][0, -1]
        assert score == pytest.approx(float(state @ made.head.weight.detach()), abs=1e-5)


def test_a_score_does_not_depend_on_batch_mates_or_on_padding_that_is_the_end_token():
    made = model()
    together = scores(made, texts(made))
    alone = torch.cat([scores(made, [ids]) for ids in texts(made)])
    assert (together - alone).abs().max() < 1e-5
    made.tokenizer.pad_token = made.tokenizer.eos_token
    assert (scores(made, texts(made)[::-1]).flip(0) - together).abs().max() < 1e-5


def test_a_head_of_the_cost_stands_beside_and_is_part_of_the_fingerprint(tmp_path):
    made = model(trained_by="align/ppo")
    alone = made.fingerprint
    made.cost_head = ScoreHead.fresh(made.width, seed=2, higher_is="worse", trained_by="align/ppo")
    assert made.fingerprint != alone
    made.save(tmp_path / "model")
    again = loading.load(tmp_path / "model", dtype="float32")
    assert torch.equal(again.cost_head.weight, made.cost_head.weight)
    assert (again.cost_head.higher_is, again.head.higher_is) == ("worse", "better")
    assert again.fingerprint == made.fingerprint


def test_what_a_head_learnt_from_is_part_of_its_identity_and_a_head_of_one_kind_has_the_old_one():
    one, other = (ScoreHead.fresh(4, seed=0, higher_is="better", trained_by="x", learns_from=kind) for kind in ("", "outcome"))
    assert one.digest == sha256(one.weight.detach().numpy().tobytes() + b"better x").hexdigest()[:16]
    assert other.digest != one.digest


@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "adapter"])
def test_a_head_is_saved_and_opened_with_its_model(tmp_path, rank):
    made = model(higher_is="worse", trained_by="align/cost_model")
    if rank:
        base = tiny()
        base.save(tmp_path / "base")
        made.base = str(tmp_path / "base")
        made.module = lora.attach(made.module, rank=rank)
    made.save(tmp_path / "model")
    again = loading.load(tmp_path / "model", dtype="float32")
    assert torch.equal(again.head.weight, made.head.weight)
    assert (again.head.higher_is, again.head.trained_by) == ("worse", "align/cost_model")
    assert again.fingerprint == made.fingerprint
    assert torch.allclose(scores(again, texts(again)), scores(made, texts(made)), atol=1e-6)


def test_the_head_is_part_of_the_models_identity():
    made, plain = model(), tiny()
    before = made.fingerprint
    assert before != plain.fingerprint
    with torch.no_grad():
        made.head.weight[0] += 1
    assert made.fingerprint != before


def test_a_scale_is_the_mean_score_of_preferred_answers_and_the_deviation_of_all():
    # preferred: (3 * 1 + 1 * 0.5 + 2 * 0.5) / 2; all about their mean of 1.5: 2.25 + 2.25 + 0.25 + 0.25 over 4
    found = Scale.of(torch.tensor([3.0, 0.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, 0.5, 0.5]))
    assert found == pytest.approx((2.25, 1.25**0.5))


@pytest.mark.parametrize("said", [[1.0, 1.0], [float("nan"), 1.0], [2.0]])
def test_scores_that_do_not_differ_or_are_no_numbers_have_no_scale(said):
    assert Scale.of(torch.tensor(said), torch.ones(len(said))) is None


def test_a_scale_is_saved_with_its_head_and_part_of_what_the_model_is(tmp_path):
    made = model(scale=Scale(0.1 + 0.2, 1 / 3))
    assert made.fingerprint != model().fingerprint
    made.save(tmp_path / "model")
    again = loading.load(tmp_path / "model", dtype="float32")
    assert again.head.scale == (0.1 + 0.2, 1 / 3)
    assert again.fingerprint == made.fingerprint


def test_a_head_that_was_saved_without_a_scale_opens_as_the_model_it_was(tmp_path):
    weight = torch.arange(32.0)
    save_file({"weight": weight}, tmp_path / FILE, metadata={"higher_is": "better", "trained_by": "align/reward_model"})
    head = ScoreHead.read(tmp_path, width=32)
    assert head.scale is None
    # the digest of before there were scales
    assert head.digest == sha256(weight.numpy().tobytes() + b"better align/reward_model").hexdigest()[:16]


@pytest.mark.parametrize("said", [{"spread": "1"}, {"location": "x", "spread": "1"}, {"location": "0", "spread": "0"}, {"location": "inf", "spread": "1"}])
def test_a_damaged_scale_is_refused(tmp_path, said):
    save_file({"weight": torch.zeros(32)}, tmp_path / FILE, metadata={"higher_is": "better"} | said)
    with pytest.raises(ModelError, match=r"no scale|could not convert"):
        ScoreHead.read(tmp_path, width=32)


def test_a_model_without_a_head_scores_nothing():
    with pytest.raises(ModelError, match="no score head"):
        scores(tiny(), [[1, 2, 3]])


@pytest.mark.parametrize(("width", "said"), [(5, {"higher_is": "better"}), (32, {}), (32, {"higher_is": "sideways"})])
def test_a_head_of_another_width_or_without_direction_is_refused(tmp_path, width, said):
    save_file({"weight": torch.zeros(width)}, tmp_path / FILE, metadata=said)
    with pytest.raises(ModelError, match="which way is up"):
        ScoreHead.read(tmp_path, width=32)


def test_a_damaged_head_is_refused(tmp_path):
    (tmp_path / FILE).write_bytes(b"half")
    with pytest.raises(ModelError, match="cannot be read"):
        ScoreHead.read(tmp_path, width=32)

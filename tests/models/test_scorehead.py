"""A head turns the state at a text's explicit last token into one number, and says which way is up."""

import pytest
import torch
from safetensors.torch import save_file

from fiducial.core.errors import ModelError
from fiducial.core.records import user
from fiducial.models import loading
from fiducial.models.scorehead import FILE, ScoreHead, scores
from fiducial.models.scripted import tiny
from fiducial.training import lora


def model(**fields):
    made = tiny()
    made.head = ScoreHead.fresh(made.width, seed=1, **({"higher_is": "better", "trained_by": "align/reward_model"} | fields))
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

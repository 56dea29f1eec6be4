import subprocess
import sys

import pytest

from fiducial.core.errors import ConfigError, FiducialError, ModelError
from fiducial.core.records import user
from fiducial.core.run import Run
from fiducial.models.open import FORMS, ready
from fiducial.models.open import open as open_model
from fiducial.models.scripted import tiny


def test_the_tiny_model_opens():
    model = open_model("tiny")
    assert model.uri == "tiny"
    assert model.sample([user("a")], max_tokens=1)[0][0].finish in ("stop", "length")


def test_a_model_trained_in_a_run_opens_by_the_id_of_the_run():
    run = Run.create("align/dpo", {}, {}, 0)
    tiny(seed=4).save(run.path / "model")
    model = open_model(f"run:{run.id}", dtype="float32")
    assert model.uri == f"run:{run.id}"
    assert model.fingerprint == tiny(seed=4).fingerprint


def test_a_run_that_trained_nothing_is_a_model_error():
    run = Run.create("evaluate", {}, {}, 0)
    with pytest.raises(ModelError, match="trained no model"):
        open_model(f"run:{run.id}")
    assert not (run.path / "model").exists()


def test_a_script_opens(tmp_path):
    (tmp_path / "s.yaml").write_text("hello: hi")
    model = open_model(f"scripted:{tmp_path / 's.yaml'}")
    assert model.uri == f"scripted:{tmp_path / 's.yaml'}"
    assert model.sample([user("hello")])[0][0].text == "hi"


def test_a_server_opens_without_being_asked_anything(tmp_path, monkeypatch):
    monkeypatch.setenv("FIDUCIAL_CACHE", str(tmp_path))
    model = open_model("openai:org/name:tag", base_url="http://localhost:1/v1", concurrency=2)
    assert model.uri == "openai:org/name:tag"
    assert model.fingerprint == "org/name:tag@http://localhost:1/v1"


def test_the_name_says_that_a_server_goes_on_from_a_begun_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("FIDUCIAL_CACHE", str(tmp_path))
    model = open_model("openai+prefill:org/name:tag", base_url="http://localhost:1/v1")
    assert (model.name, model.prefill, model.uri) == ("org/name:tag", True, "openai+prefill:org/name:tag")
    assert not open_model("openai:org/name:tag", base_url="http://localhost:1/v1").prefill


def test_an_option_that_the_model_cannot_take_is_an_error():
    with pytest.raises(ConfigError, match="base_url has no meaning"):
        open_model("tiny", base_url="http://localhost:1")
    with pytest.raises(ConfigError, match="dtype has no meaning"):
        open_model("openai:x", base_url="http://localhost:1", dtype="bf16")
    with pytest.raises(ConfigError, match="colour"):
        open_model("openai:x", base_url="http://localhost:1", colour="red")


@pytest.mark.parametrize("uri", ["hf:", "openai:", "run:", "", "two words", "a/b/c", "http://x", "hf:no spaces@main"])
def test_what_names_no_model_lists_the_forms_that_do(uri):
    with pytest.raises(ModelError) as failure:
        open_model(uri)
    assert all(form in failure.value.hint for form in FORMS)


def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub():
    with pytest.raises(ModelError, match=r"the folder \./none does not exist"):
        open_model("./none")


def test_a_misspelt_name_gets_the_nearest_one(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="did you mean 'smollm2'"):
        open_model("smolm2")


def test_a_hub_model_that_is_not_here_is_one_line(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for uri in ("nobody/nothing", "hf:nobody/nothing@main"):
        with pytest.raises(ModelError, match="'nobody/nothing' is not on this machine") as failure:
            open_model(uri)
        assert "\n" not in str(failure.value)


def test_a_hub_model_in_the_cache_opens_at_its_revision(tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "a" * 40
    repository = tmp_path / "models--me--mine"
    tiny(seed=5).save(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = open_model("hf:me/mine@v1", dtype="float32")
    assert model.uri == "hf:me/mine@v1"
    assert model.fingerprint == tiny(seed=5).fingerprint


def test_a_provider_of_inspect_points_to_the_form_that_works():
    with pytest.raises(ModelError, match="openai:NAME"):
        open_model("inspect:anthropic/x")


def test_an_unknown_dtype_of_the_embedded_model_is_a_config_error():
    with pytest.raises(ConfigError, match="int3"):
        open_model("smollm2", dtype="int3")


def test_a_folder_opens(tmp_path):
    folder = tiny(seed=2).save(tmp_path / "m")
    model = open_model(str(folder), dtype="float32")
    assert (model.uri, model.fingerprint) == (str(folder), tiny(seed=2).fingerprint)


@pytest.mark.parametrize("uri", ["", "hf:", "two words", "./none", "nobody/nothing", "nosuchmodel", "scripted:none.yaml", "run:nothere", "inspect:anthropic/x"])
def test_a_name_that_leads_nowhere_is_known_before_anything_is_opened(uri, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FiducialError) as before:
        ready(uri)
    with pytest.raises(FiducialError) as then:
        open_model(uri)
    assert str(before.value) == str(then.value)


def test_names_are_looked_at_without_torch(tmp_path):
    folder = tiny().save(tmp_path / "m")
    code = "import sys; from fiducial.models.open import ready; [ready(uri) for uri in sys.argv[1:]]; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "tiny", "smollm2", str(folder)], check=True)

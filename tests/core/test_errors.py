import errno

import pytest

from fiducial.core import errors
from fiducial.core.errors import EndpointError, FiducialError, MissingExtraError, ModelError, StorageError, nearest


def test_an_error_says_what_was_wrong_and_what_to_do():
    error = FiducialError("beta is -1", hint="give a value above 0")
    assert str(error) == "beta is -1 (give a value above 0)"
    assert (error.message, error.hint) == ("beta is -1", "give a value above 0")
    assert str(FiducialError("beta is -1")) == "beta is -1"


def test_every_error_has_a_kind_of_its_own():
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, FiducialError)]
    assert len({c.kind for c in classes}) == len(classes) == 9


def test_an_error_of_an_endpoint_is_an_error_of_a_model():
    assert issubclass(EndpointError, ModelError)


def test_a_missing_package_comes_with_the_command_that_installs_it():
    error = MissingExtraError("openai", "remote")
    assert "openai" in error.message
    assert error.hint == 'in the folder of the project: pip install -e ".[remote]"'


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "no space left on the disk while writing x.jsonl"),
        (errno.EACCES, "x.jsonl cannot be written"),
        (errno.EROFS, "x.jsonl cannot be written"),
        (errno.EIO, "x.jsonl: it broke"),
    ],
)
def test_an_error_of_the_disk_is_translated(number, says):
    error = StorageError.from_os(OSError(number, "it broke"), "x.jsonl")
    assert error.message.startswith(says)
    assert error.hint


def test_the_nearest_name_is_offered_or_a_few_are_listed():
    assert nearest("epocs", ["epochs", "beta"]) == "did you mean 'epochs'?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
    assert nearest("zzz", [f"name{i:02}" for i in range(13)]).endswith("name11, ...")

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fiducial.core import registry
from fiducial.core.errors import ConfigError, MethodError
from fiducial.core.roles import Objective

SOURCE = '''"""Direct preference optimisation.

What it does: fits a policy to pairs,
              without a reward model.
Use it when:  pairs exist.
Formula:      loss = -log sigmoid(beta * m), where m is: the margin.
Defaults:     beta 0.1.
Limits:       none known.
Source:       arXiv:2305.18290.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from fiducial.core.roles import Objective


class Helper:
    pass


@final
@dataclass(frozen=True, slots=True)
class DPO(Objective):
    needs_reference: ClassVar[bool] = True
    tags = ("preference",)

    beta: float = 0.1
    """Strength of the pull; > 0.
    Smaller moves further."""
    model: str = "x" + "y"
    name_of: str = ""

    def __post_init__(self):
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")

    def __call__(self, policy, reference=None):
        return policy
'''


@pytest.fixture
def area(tmp_path, monkeypatch):
    """An area `toy` of two methods in a package that can be imported."""
    folder = tmp_path / "toys_of_test" / "align"
    folder.mkdir(parents=True)
    (folder / "toy_dpo.py").write_text(SOURCE)
    (folder / "toy_attack.py").write_text(SOURCE.replace("Objective", "Attack").replace("DPO", "Toy"))
    (folder / "plain.py").write_text("class NoMethod:\n    pass\n")
    (folder / "__init__.py").write_text("")
    (folder / "base.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))

    def files():
        for path in registry._modules(folder):
            yield "align", f"toys_of_test.align.{path.stem}", path

    monkeypatch.setattr(registry, "_files", files)
    yield folder
    for name in [n for n in sys.modules if n.startswith("toys_of_test")]:
        del sys.modules[name]


def test_methods_are_found_by_their_files_without_importing_them(area):
    assert list(registry.methods()) == ["align/toy_attack", "align/toy_dpo"]
    assert "toys_of_test.align.toy_dpo" not in sys.modules


def test_a_card_holds_what_explain_prints(area):
    card = registry.card("align/toy_dpo")
    assert (card.name, card.area, card.role, card.cls, card.title) == ("align/toy_dpo", "align", "Objective", "DPO", "Direct preference optimisation.")
    assert list(card.headings) == ["What it does", "Use it when", "Formula", "Defaults", "Limits", "Source"]
    assert card.headings["What it does"] == "fits a policy to pairs, without a reward model."
    assert card.headings["Formula"].endswith("where m is: the margin.")
    assert card.constants == {"needs_reference": True, "tags": ("preference",)}
    beta, model, name_of = card.options
    assert (beta.name, beta.type, beta.default, beta.required, beta.flag) == ("beta", "float", 0.1, False, "--beta")
    assert beta.help == "Strength of the pull; > 0. Smaller moves further."
    assert (model.default, name_of.flag) == ("'x' + 'y'", "--name-of")


def test_a_short_name_does_when_only_one_method_has_it(area):
    assert registry.card("toy_dpo").name == "align/toy_dpo"


def test_an_unknown_method_is_refused_with_the_nearest_name(area):
    with pytest.raises(MethodError, match="no method 'align/toy_dop'") as caught:
        registry.card("align/toy_dop")
    assert caught.value.hint == "did you mean 'align/toy_dpo'?"


def test_a_method_of_another_role_is_refused(area):
    with pytest.raises(MethodError, match=r"'align/toy_dpo' is .* objective, but .* attack is needed") as caught:
        registry.card("align/toy_dpo", role="Attack")
    assert "align/toy_attack" in caught.value.hint


def test_a_method_is_created_with_its_options(area):
    method = registry.create("align/toy_dpo", {"beta": 0.5})
    assert isinstance(method, Objective)
    assert method.options() == {"beta": 0.5, "model": "xy", "name_of": ""}
    assert method.name == "align/toy_dpo"


def test_an_unknown_option_is_refused_with_the_nearest_name(area):
    with pytest.raises(ConfigError, match="align/toy_dpo has no option 'beat'") as caught:
        registry.create("align/toy_dpo", {"beat": 0.5})
    assert caught.value.hint == "did you mean 'beta'?"


def test_a_value_that_the_method_refuses_is_an_error_of_configuration(area):
    with pytest.raises(ConfigError, match="align/toy_dpo: beta must be positive, got -1") as caught:
        registry.create("align/toy_dpo", {"beta": -1})
    assert "fiducial explain align/toy_dpo" in caught.value.hint


def test_a_changed_file_is_read_again(area):
    assert registry.card("align/toy_dpo").title.startswith("Direct")
    (area / "toy_dpo.py").write_text(SOURCE.replace("Direct", "Indirect") + "\n# longer\n")
    assert registry.card("align/toy_dpo").title.startswith("Indirect")


def test_a_method_given_as_an_option_is_named_by_its_name(area):
    @dataclass(frozen=True, slots=True)
    class Wrap(Objective):
        inner: Objective

        def __call__(self, policy, reference=None):
            return self.inner(policy, reference)

    assert Wrap(registry.create("align/toy_dpo")).options() == {"inner": "align/toy_dpo"}


def test_the_package_s_own_methods_are_listed_from_its_areas():
    root = Path(registry.__file__).parent.parent
    for name, card in registry.methods().items():
        if card.module.startswith("fiducial."):
            assert card.path == root / card.area / f"{name.split('/')[1]}.py"
            assert card.title


def test_a_file_that_is_not_python_is_named_with_its_path_and_line(tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\nclass :\n")
    with pytest.raises(MethodError, match=re.escape(f"{tmp_path / 'mine.py'}:2: not valid Python: invalid syntax")):
        registry.read(tmp_path / "mine.py", name="attack/mine", module="mine")

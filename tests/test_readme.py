"""What the README says is true; its commands are tested with those of the other pages, in test_docs.py."""

import doctest
import pathlib

from sit_jax.analysis.flops import count_cost
from sit_jax.models.variants import VARIANTS

README = pathlib.Path("README.md")
TEXT = README.read_text()


def test_python_examples() -> None:
    result = doctest.testfile(str(README.absolute()), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted >= 8
    assert result.failed == 0


def test_table_of_models() -> None:
    rows = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| sit_")]
    assert len(rows) == 5
    for name, params, both, gmac, tokens, size, _, teacher, teacher_gmac, _ in rows:
        cost, arch = count_cost(VARIANTS[name]), VARIANTS[name]
        assert params == f"{cost.params:,}"
        assert both == f"{cost.params + cost.rtsm_params:,}"
        assert gmac == f"{cost.gmac:.2f}"
        assert tokens == "/".join(str(count) for count in arch.token_counts)
        assert size == str(arch.image_size)
        assert VARIANTS[teacher] == arch.without_slimming()
        assert teacher_gmac == f"{count_cost(VARIANTS[teacher]).gmac:.2f}"

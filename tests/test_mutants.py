"""The mutants of `make mutants` still fit the source; that their tests fail is `make mutants`' own."""

import pytest

from tests.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.promise} without {mutant.without}")
def test_a_mutant_changes_one_place_of_the_source(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    compile((ROOT / mutant.file).read_text().replace(mutant.old, mutant.new), mutant.file, "exec")

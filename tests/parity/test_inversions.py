"""Prompts with embeddings of textual inversion give the context of diffusers."""

import pytest

from tests.parity import compare, inversions, test_parity
from tests.parity.test_parity import RELATIVE

pytestmark = test_parity.pytestmark


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "sd15" else pytest.mark.slow) for name in inversions.FAMILIES]
)
def test_the_context_of_a_prompt_with_embeddings_equals_that_of_diffusers(name, folder, both, tmp_path):
    pipe, theirs = both(name)
    differences = inversions.differences(folder(name), theirs, tmp_path)
    print(name, [f"{value:.1e}" for value in differences])
    assert len(differences) == 1 + (name == "sdxl-base")
    assert max(differences) <= RELATIVE
    files = inversions.write(tmp_path, theirs)
    made, without = inversions.ours(folder(name), files), pipe.text_encoder.encode(inversions.TEXTS)
    assert compare.relative(made.context, without.context) > 0.01

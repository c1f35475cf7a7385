"""Learn a small byte-pair vocabulary in CLIP's format from captions."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from ldm.models.tokens import BOS, EOS, byte_alphabet


def build_vocabulary(captions: Iterable[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a vocabulary of at most `size` tokens, in CLIP's order, and its merges.

    CLIP's order is: the 256 byte characters, the same characters at the end of a word, one token for each merge
    (Sennrich et al. 2016), the begin token and the end token. Few captions give fewer merges than `size` allows.
    Raises ValueError for a size below 514.
    """
    alphabet = byte_alphabet()
    fixed = [*alphabet, *(c + "</w>" for c in alphabet)]
    if size < len(fixed) + 2:
        raise ValueError(f"a vocabulary needs at least {len(fixed) + 2} tokens, got {size}")
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=10 * size,  # more than needed, because the trainer adds an alphabet of its own; cut below
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    learned = json.loads(learner.to_str())["model"]["merges"]
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in learned]
    merges = [(a, b) for a, b in pairs][: size - len(fixed) - 2]
    tokens = [*fixed, *(a + b for a, b in merges), BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, merges

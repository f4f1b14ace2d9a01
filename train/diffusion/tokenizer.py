"""The tokenizer of the prompts: byte-pair encoding, the same in every process."""

from __future__ import annotations

import itertools
import string
import typing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import CLIPTokenizer

from train.diffusion.config import Config

SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
END_OF_WORD = "</w>"


def build_tokenizer(prompts: Iterable[str], config: Config) -> CLIPTokenizer:
    """Train a CLIP tokenizer (byte-pair encoding) on prompts: the same one for the same prompts, in any order.

    The library's own trainer numbers the end-of-word characters by the order of a hash map, which is another
    one in every process: an interrupted run would go on with other token ids. Hence the few lines here.
    """
    blank = CLIPTokenizer().backend_tokenizer
    words: Counter[str] = Counter()
    for prompt in prompts:
        normal = blank.normalizer.normalize_str(prompt)
        words.update(piece for piece, _ in blank.pre_tokenizer.pre_tokenize_str(normal))
    alphabet = sorted(set(string.printable[:94]).union(*words))
    vocabulary = [*SPECIAL_TOKENS, *alphabet, *(character + END_OF_WORD for character in alphabet)]
    merges = byte_pair_merges(words, config.text_vocab - len(vocabulary))
    vocabulary += [first + second for first, second in merges]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=merges,
        model_max_length=config.text_length,
    )


def byte_pair_merges(words: Mapping[str, int], count: int) -> list[tuple[str, str]]:
    """Return up to ``count`` merges: each time of the most frequent pair, the alphabetically first among equals.

    ``words`` holds the number of times that each word occurs; a pair that occurs once is not merged.
    """
    spelled = {word: [*word[:-1], word[-1] + END_OF_WORD] for word in sorted(words)}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        for parts in spelled.values():
            position = 0
            while position < len(parts) - 1:
                if (parts[position], parts[position + 1]) == best:
                    parts[position : position + 2] = [best[0] + best[1]]
                position += 1
    return merges


def tokens(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> torch.Tensor:
    """Return token ids (N, L), padded as StableDiffusionPipeline pads them."""
    encoded = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return typing.cast("torch.Tensor", encoded.input_ids)

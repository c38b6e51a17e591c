"""Writes the toybox's tokenizer in CLIP's format: byte pairs in which every caption word is one token.

    python -m toybox.make_tokenizer --output toybox/sd/tokenizer

Any text can be encoded (all 256 bytes are there), but only the words below are whole.
"""

import argparse
import itertools
import json
from pathlib import Path

from toybox.draw import NAMED, PATTERNS, PREFIXES, SCENES, THINGS, UNSEEN_WORDS
from toybox.things import COLOURS

START, END = "<|startoftext|>", "<|endoftext|>"


def caption_words() -> list[str]:
    """All words that captions use, sorted; the rare words last."""
    phrases = [*PREFIXES, *SCENES.values(), *COLOURS, *PATTERNS, *THINGS, "an"]
    return sorted({word for phrase in phrases for word in phrase.split()}) + list(NAMED) + list(UNSEEN_WORDS)


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte (the table of GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def apply_merges(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    while len(pieces) > 1:
        rank, i = min((ranks.get(pair, 10**9), i) for i, pair in enumerate(itertools.pairwise(pieces)))
        if rank == 10**9:
            return pieces
        pieces = pieces[:i] + [pieces[i] + pieces[i + 1]] + pieces[i + 2 :]
    return pieces


def merges_for(words: list[str]) -> list[tuple[str, str]]:
    """Each word adds the merges that it still lacks; later merges cannot undo earlier words."""
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = apply_merges([*word[:-1], word[-1] + "</w>"], ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return list(ranks)


def save_tokenizer(folder: Path) -> None:
    from transformers import CLIPTokenizer

    merges = merges_for(caption_words())
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77).save_pretrained(folder)
    # transformers 5 writes tokenizer.json only; older versions read these two.
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("toybox/sd/tokenizer"))
    save_tokenizer(parser.parse_args().output)

"""New tokens that learn beside adapters (pivotal tuning): a word in the prompts stands for vectors of its own.

Textual inversion, https://arxiv.org/abs/2208.01618, learns the vectors alone; here adapters learn along, and the
vectors stop first. Only the new rows are parameters: no decay, moment or rounding can touch the words that were there.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from utils import learning, randomness
from utils.saved import EMBEDDINGS_FILE, EMBEDDINGS_KEYS, ONE_ENCODER, header, marked, shared, word_files


class Embedding(torch.nn.Module):
    """A frozen table of words, and the rows after it that learn, in fp32 whatever the table is in."""

    def __init__(self, base: torch.nn.Embedding, first: int, rows: torch.Tensor):
        super().__init__()
        self.base, self.first = base, first  # the base comes first: the encoder's dtype is that of its first weight
        self.learned = torch.nn.Embedding.from_pretrained(rows, freeze=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = ids - self.first  # (b, 77)
        new = (rows >= 0) & (rows < self.learned.num_embeddings)
        known = self.base(ids.masked_fill(new, 0))  # (b, 77, c)
        # Always asked for: without a new token its gradient is zero, not missing, and several processes agree.
        learned = self.learned(rows.clamp(0, self.learned.num_embeddings - 1))
        return torch.where(new.unsqueeze(-1), learned.to(known.dtype), known)


def beside(adapters, family, words: Sequence[str], count: int, seed: int) -> "WithTokens":
    """`count` new tokens for each of the words, in every text encoder. They start as random as the other rows are."""
    taken = set().union(*(getattr(family, part).get_vocab() for part in family.tokenizers))
    names = itertools.islice((n for k in itertools.count() if (n := f"<s{k}>") not in taken), count * len(words))
    given = {word: list(itertools.islice(names, count)) for word in words}
    every = [name for each in given.values() for name in each]
    modules, weights = {}, {}
    for encoder, part, key in zip(family.encoders, family.tokenizers, EMBEDDINGS_KEYS):
        tokenizer, module = getattr(family, part), getattr(family, encoder).requires_grad_(False)
        tokenizer.add_tokens(every)
        base = module.get_input_embeddings()
        spread = base.weight.float().std().cpu()
        generators = (torch.Generator().manual_seed(randomness.seed_of(seed, f"tokens/{key}/{n}")) for n in every)
        rows = torch.stack([spread * torch.randn(base.embedding_dim, generator=each) for each in generators])
        first = tokenizer.convert_tokens_to_ids(every[0])
        module.set_input_embeddings(Embedding(base, first, rows.to(base.weight.device)))
        modules[encoder] = module.train()  # its activations may be recomputed in this mode only
        weights[key] = module.get_input_embeddings().learned.weight
    family.abstractions = {word: "".join(each) for word, each in given.items()}
    return WithTokens(adapters, modules, weights, given)


class WithTokens:
    """Adapters and new tokens; the same methods as `adapters.Adapters`."""

    def __init__(self, adapters, modules: dict, weights: dict[str, torch.nn.Parameter], names: dict[str, list[str]]):
        self.adapters, self.weights, self.names = adapters, weights, names
        self.modules, self.encoders = adapters.modules | modules, list(modules)

    def named(self) -> dict[str, torch.nn.Parameter]:
        return self.adapters.named() | self.weights

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.named().values())

    def groups(self, learning_rate, text_encoder_lr=None, weight_decay=0.01, text_encoder_weight_decay=None) -> list:
        rates = (learning_rate, text_encoder_lr, weight_decay, text_encoder_weight_decay)
        rows = dict(zip(self.encoders, ([weight] for weight in self.weights.values())))
        return self.adapters.groups(*rates) + learning.groups(rows, *rates)

    def settle(self, step: int, total: int) -> None:
        self.adapters.settle(step, total)

    def describe(self) -> dict:
        return self.adapters.describe() | {"tokens": {word: "".join(names) for word, names in self.names.items()}}

    def save(
        self,
        folder: str | Path,
        output_kohya_format: bool = False,
        mark: str = "",
        token_abstraction: Sequence[str] = (),  # given where the result is saved: one more file for each word
        kohya_dtype: str = "fp32",
        about: dict[str, str] | None = None,
        output_dir: str | None = None,
    ) -> None:
        """The adapters' files and one of fp32 rows; its header says which word stands for which tokens."""
        self.adapters.save(folder, output_kohya_format, mark, kohya_dtype, about, output_dir)
        rows = {key: weight.detach().cpu().contiguous() for key, weight in self.weights.items()}
        told = {"format": "pt", "tokens": json.dumps(self.names)}
        file = marked(Path(folder, EMBEDDINGS_FILE), mark)
        save_file(rows, str(file), metadata=told)
        shared(file)
        if token_abstraction:
            split(file, Path(folder))

    def load(self, folder: str | Path, mark: str = "") -> None:
        self.adapters.load(folder, mark)
        learning.copy_from(marked(Path(folder, EMBEDDINGS_FILE), mark), self.weights)


def split(file: Path, folder: Path) -> list[Path]:
    """One file for each word of EMBEDDINGS_FILE, as ComfyUI and A1111 read embeddings: they call one by the name of
    its file, and take all rows in it for one word. SDXL's rows are called clip_l and clip_g there too; those of a model
    with one text encoder emb_params, (rows, width)."""
    words = json.loads(header(file).get("__metadata__", {}).get("tokens", "{}"))
    rows, first, written = load_file(file), 0, []
    for word, name in word_files(words).items():
        own = {key: each[first : first + len(words[word])].clone() for key, each in rows.items()}
        first += len(words[word])
        if EMBEDDINGS_KEYS[1] not in own:
            own = {ONE_ENCODER: own[EMBEDDINGS_KEYS[0]]}
        told = {"format": "pt", "word": word, "tokens": json.dumps({word: words[word]})}
        save_file(own, str(folder / name), metadata=told)
        shared(folder / name)
        written.append(folder / name)
    return written

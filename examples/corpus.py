"""The Python standard library's own source text as token ids, cached in a folder."""

import sys
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

END_OF_FILE = "<|endoffile|>"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


def token_file(folder: Path, V: int) -> Path:
    """The file in `folder` with the corpus in a vocabulary of V, one 1-D int32 tensor; made when missing."""
    path = folder / f"tokens-py{sys.version_info.major}.{sys.version_info.minor}-{V}.pt"
    if not path.exists():
        texts = read_standard_library()
        tokenizer = train_vocabulary(texts, V)
        tokens = encode(tokenizer, texts)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(path.with_suffix(".json")))
        unfinished = path.with_suffix(".part")
        torch.save(tokens, unfinished)
        unfinished.rename(path)
    return path


def read_standard_library() -> list[str]:
    """The text of each module of the running Python's standard library, its tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in root.rglob("*.py") if SKIPPED_FOLDERS.isdisjoint(p.relative_to(root).parts))
    return [path.read_text(encoding="utf-8", errors="replace") for path in tqdm(paths, desc="reading files")]


def train_vocabulary(texts: list[str], V: int) -> Tokenizer:
    """A byte-level byte-pair tokenizer with exactly V tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=V,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tqdm(texts, desc="counting words for the vocabulary"), trainer)
    if tokenizer.get_vocab_size() != V:
        raise ValueError(f"the text yields {tokenizer.get_vocab_size()} tokens at most, not {V}")
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts as one 1-D int32 tensor, an end-of-file token after each."""
    end = tokenizer.token_to_id(END_OF_FILE)
    ids: list[int] = []
    for text in tqdm(texts, desc="encoding files"):
        ids += tokenizer.encode(text).ids
        ids.append(end)
    return torch.tensor(ids, dtype=torch.int32)

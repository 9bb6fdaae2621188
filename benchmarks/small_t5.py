"""A small T5 that is pretrained here, on span corruption of the shared texts, because none is at hand.

    python benchmarks/small_t5.py              # continues where it was stopped

4 + 4 blocks of width 256, a BPE vocabulary of 8,000 lower-case pieces, 9.4 M parameters. Each step reads 16 pieces of
64 tokens, of which 15 % in spans of 3 are left out and have to be written, as in T5's own pretraining; the 1,500 steps
take about 14 minutes of one CPU core. The texts are those of SST-2, MR, CR, SNLI, RTE, MRPC and STS-B, less the
sentences of SST-2's dev set. The folder is $SIDESTEP_SMALL_T5, or `.small_t5` beside the results.
"""

from __future__ import annotations

import gzip
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from sidestep.data import read
from text_tasks import SHARED, TASKS

FOLDER = Path(os.environ.get("SIDESTEP_SMALL_T5", Path(__file__).parent / "results" / ".small_t5"))
STATE = "pretraining.pt"
VOCABULARY, SENTINELS = 8000, 20
STEPS, BATCH, PIECE = 1500, 16, 64
RATE, WARMUP = 2e-3, 100
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


def tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    """Lower-case BPE with T5's special tokens."""
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{number}>" for number in range(SENTINELS))]
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.decoder = decoders.Metaspace()
    pieces.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special))
    pieces.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=special[3:],
        model_max_length=512,
    )


def model() -> T5ForConditionalGeneration:
    """T5 1.0's design, small, with random weights of seed 0."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=256,
        d_kv=64,
        d_ff=1024,
        num_layers=4,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5ForConditionalGeneration(config)


def corrupted(ids: list[int], first: int, chance: random.Random) -> dict[str, list[int]]:
    """A piece with spans replaced by sentinels (from token `first` on), and the spans behind their sentinels."""
    noise = max(1, round(NOISE * len(ids)))
    spans = max(1, round(noise / SPAN))
    dropped, kept = _parts(noise, spans, chance), _parts(len(ids) - noise, spans, chance)
    source, target, place = [], [], 0
    for number, (keep, drop) in enumerate(zip(kept, dropped, strict=True)):
        source += [*ids[place : place + keep], first + number]
        target += [first + number, *ids[place + keep : place + keep + drop]]
        place += keep + drop
    return {"input_ids": [*source, 1], "labels": [*target, 1]}


def pretrained(folder: Path = FOLDER, steps: int = STEPS) -> Path:
    """The folder of the pretrained model, which is trained (on) first if it is not there."""
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    lines = texts()
    words = tokenizer(lines)
    words.save_pretrained(folder)
    stream = [token for ids in words(lines, verbose=False)["input_ids"] for token in ids]
    net = model().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.0)
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
    """Batches of the steps from `start`; those of one step are the same in every run."""
    first = words.convert_tokens_to_ids("<extra_id_0>")
    collate = DataCollatorForSeq2Seq(words)
    for step in range(start, end):
        chance = random.Random(step)
        places = [chance.randrange(len(stream) - PIECE) for _ in range(BATCH)]
        yield dict(collate([corrupted(stream[place : place + PIECE], first, chance) for place in places]))


def _parts(total: int, count: int, chance: random.Random) -> list[int]:
    """A whole number in so many parts of at least 1, at random."""
    cuts = sorted(chance.sample(range(1, total), count - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def _plain(text: str) -> str:
    return "".join(text.lower().split())


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    print(pretrained())

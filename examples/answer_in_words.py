"""Text to text: a T5 answers in words, from rows to a saved task and its texts.

A small T5 with random weights stands in for a pretrained one, so nothing is downloaded, and all of it is tuned; with a
pretrained one, take its name and a method such as `ss.SherlConfig()`.
"""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.data import Fields
from sidestep.kinds.prepare import prepare
from sidestep.tasks.predict import predict
from sidestep.training.train import TrainSettings, head_for, train

THINGS = ("phone", "camera", "film", "book")
MOODS = {"great": "good", "lovely": "good", "broken": "bad", "slow": "bad"}
WORDS = ("<pad>", "</s>", "<unk>", "the", "is", *THINGS, *MOODS, "good", "bad")

folder = Path(tempfile.mkdtemp())
words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "t5")
torch.manual_seed(0)
config = T5Config(vocab_size=len(WORDS), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
config.decoder_start_token_id = 0
T5ForConditionalGeneration(config).save_pretrained(folder / "t5")

said = [{"text": f"the {thing} is {mood}", "answer": MOODS[mood]} for thing in THINGS for mood in MOODS]
rows, fields = Dataset.from_list(said), Fields(text="text", label="answer")
data = prepare(rows, rows, fields, load_processor(folder / "t5"), kind="text2text")
backbone = load_backbone(folder / "t5", writes="text2text")
model = ss.attach(backbone, ss.FullConfig(), head=head_for(data))
how = TrainSettings(output=folder / "task", epochs=10, batch_size=4, learning_rate=0.005, progress=False, measure=False)
print("exact match", train(model, data, how).scores["exact_match"])

task = ss.load(folder / "task")
for row in predict(task, rows.select(range(4)).remove_columns("answer")):
    print(row["text"], "->", row["prediction"])

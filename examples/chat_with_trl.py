"""Chats with TRL's SFTTrainer: attach, train on the assistant's words in packed rows, load a checkpoint as a task.

Needs trl (`pip install trl`). A small Llama with random weights stands in for a pretrained one, so nothing is
downloaded, and all of it is tuned; with a pretrained one, take its name and a method such as `ss.ReadConfig(rank=64)`.
"""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import sidestep as ss
from sidestep.training.callbacks import SaveTask

THINGS = ("phone", "camera", "film", "book")
MOODS = {"great": "good", "lovely": "good", "broken": "bad", "slow": "bad"}
WORDS = ("<pad>", "</s>", "<unk>", "<user>", "<assistant>", "the", "is", *THINGS, *MOODS, "good", "bad")
# the loss is over what stands between the two marks of generation
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' </s>' }}{% endgeneration %}{% else %}{{ message['content'] + ' ' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

folder = Path(tempfile.mkdtemp())
words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **special)
torch.manual_seed(0)
size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
config = LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, **size)
LlamaForCausalLM(config).save_pretrained(folder / "llama")

said = [({"role": "user", "content": f"the {thing} is {mood}"}, MOODS[mood]) for thing in THINGS for mood in MOODS]
rows = Dataset.from_list([{"messages": [one, {"role": "assistant", "content": other}]} for one, other in said])
model = ss.attach(AutoModelForCausalLM.from_pretrained(folder / "llama"), ss.FullConfig())
how = SFTConfig(
    output_dir=folder / "run",
    assistant_only_loss=True,
    packing=True,
    max_length=32,
    num_train_epochs=20,
    per_device_train_batch_size=2,
    learning_rate=0.005,
    bf16=torch.cuda.is_available(),  # TRL's default is True
    report_to="none",
)
SFTTrainer(model=model, args=how, train_dataset=rows, processing_class=tokenizer, callbacks=[SaveTask()]).train()

task = ss.load(folder / "run" / "checkpoint-40")
for row in rows.select(range(4)):
    prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_tensors="pt")
    print(tokenizer.decode(task.generate(**prompt, max_new_tokens=3)[0]))

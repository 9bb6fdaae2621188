"""What `gpu.py` measures, as data: contenders, backbones at the papers' scale, and what the laws are tried on.

To add a contender or a backbone, add a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import transformers as t
from torch import Tensor, nn

import sidestep as ss
from sidestep.interface.keep import Keep
from sidestep.model.settings import Settings
from sidestep.model.token_loss import LmLoss

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way of tuning.

    Attributes:
        method, keep, checkpoint: as in `attach`.
        on: the kind of backbone that it is for. None: any.
        to_host: what autograd keeps waits in the host's memory.
        quantised: the backbone's linear maps are in 4 bit.
        bare: a pass of the backbone without gradients, and no step.
    """

    method: ss.MethodConfig
    keep: Keep = "full"
    checkpoint: Literal["late"] | None = None
    on: Literal["images", "texts"] | None = None
    to_host: bool = False
    quantised: bool = False
    bare: bool = False


LORA = ss.LoraConfig()
CONTENDERS = {
    "no_grad": Contender(method=ss.ProbeConfig(), bare=True),
    "read-128": Contender(method=ss.ReadConfig(rank=128)),
    "read-128 replay": Contender(method=ss.ReadConfig(rank=128), keep="replay"),
    "lora": Contender(method=LORA),
    "lora+checkpoint": Contender(method=LORA, checkpoint="late"),
    "read-8": Contender(method=ss.ReadConfig(rank=8)),
    "read-8 replay": Contender(method=ss.ReadConfig(rank=8), keep="replay"),
    "full": Contender(method=ss.FullConfig()),
    "lora+checkpoint+host": Contender(method=LORA, checkpoint="late", to_host=True),
    "read-128 offload": Contender(method=ss.ReadConfig(rank=128), keep="offload"),
    "read-128 int8": Contender(method=ss.ReadConfig(rank=128), keep="int8"),
    "read-8 offload": Contender(method=ss.ReadConfig(rank=8), keep="offload"),
    "read-8 int8": Contender(method=ss.ReadConfig(rank=8), keep="int8"),
    "dtl+": Contender(method=ss.DTLConfig(kernel=5), on="images"),
    "dtl": Contender(method=ss.DTLConfig(), on="texts"),
    "sherl": Contender(method=ss.SherlConfig()),
    "lst": Contender(method=ss.LSTConfig()),
    "synqt": Contender(method=ss.SynQTConfig()),
    "qlora+checkpoint": Contender(method=LORA, checkpoint="late", quantised=True),
}
SMALL = ("no_grad", "read-8 replay", "lora+checkpoint+host", "qlora+checkpoint")
"""Those that tiny sizes are tried with."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A backbone and its batch.

    Attributes:
        build: the backbone with random weights.
        small: the same kind on a tiny scale.
        reads: what a row is.
        rows: of the batch, and of the tiny one.
        size: tokens of a text, or rows and columns of an image, and the tiny ones.
        writes: whether it is a language model with its own head, which is frozen.
        dtype: of the weights.
    """

    build: Callable[[], nn.Module]
    small: Callable[[], nn.Module]
    reads: Literal["images", "texts"]
    rows: tuple[int, int] = (32, 2)
    size: tuple[int, int]
    writes: bool = False
    dtype: torch.dtype = torch.float32

    def settings(self, one: Contender) -> Settings:
        """What is attached. A bare pass makes no logits."""
        if not self.writes or one.bare:
            return Settings(
                one.method, ss.Classify(num_labels=2, pool="mean"), checkpoint=one.checkpoint, keep=one.keep
            )
        return Settings(one.method, checkpoint=one.checkpoint, keep=one.keep, lm_loss="chunked")

    def backbone(self, *, small: bool) -> nn.Module:
        """In eval mode, on the default device."""
        return (self.small if small else self.build)().to(self.dtype).eval()

    def batch(self, *, small: bool) -> Batch:
        """With labels, on the default device."""
        rows, size = self.rows[small], self.size[small]
        if self.reads == "images":
            return {
                "pixel_values": torch.randn(rows, 3, size, size, dtype=self.dtype),
                "labels": torch.arange(rows) % 2,
            }
        ids = torch.randint(3, 30 if small else 30000, (rows, size))
        return {"input_ids": ids, "labels": ids.clone() if self.writes else torch.arange(rows) % 2}


def vit(**sizes: Any) -> nn.Module:
    return t.ViTModel(t.ViTConfig(**sizes), add_pooling_layer=False)


def bert(**sizes: Any) -> nn.Module:
    return t.BertModel(t.BertConfig(**sizes), add_pooling_layer=False)


def llama(**sizes: Any) -> nn.Module:
    """By default the shapes of Llama 3.2 1B."""
    large = {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    }
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return t.LlamaForCausalLM(t.LlamaConfig(**large | ends | sizes))


def t5(**sizes: Any) -> nn.Module:
    large = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    return t.T5Model(t.T5Config(**large | sizes, decoder_start_token_id=0))


TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY_VIT = partial(vit, **TINY, image_size=32, patch_size=8)
TINY_BERT = partial(bert, **TINY, vocab_size=32)
TINY_LLAMA = partial(llama, **TINY, vocab_size=32, num_key_value_heads=1)
TINY_T5 = partial(t5, d_model=64, d_ff=128, d_kv=32, num_layers=3, num_heads=2, vocab_size=32)
SCALES = {
    "vit-b": Scale(build=vit, small=TINY_VIT, reads="images", size=(224, 32)),
    "bert-base": Scale(build=bert, small=TINY_BERT, reads="texts", size=(128, 8)),
    "llama-1b": Scale(
        build=llama,
        small=TINY_LLAMA,
        reads="texts",
        rows=(4, 2),
        size=(2048, 8),
        writes=True,
        dtype=torch.bfloat16,
    ),
    "t5-base": Scale(build=t5, small=TINY_T5, reads="texts", size=(128, 8)),
}

METHODS: dict[str, ss.MethodConfig] = {
    "read": ss.ReadConfig(rank=4),
    "dtl": ss.DTLConfig(rank=4, late_blocks=2),
    "lst": ss.LSTConfig(reduction=2, heads=2),
    "sherl": ss.SherlConfig(reduction=4),
}
FAMILIES = {
    "bert": Scale(build=TINY_BERT, small=TINY_BERT, reads="texts", rows=(4, 4), size=(16, 8)),
    "vit": Scale(build=TINY_VIT, small=TINY_VIT, reads="images", rows=(4, 4), size=(32, 32)),
    "llama": Scale(build=TINY_LLAMA, small=TINY_LLAMA, reads="texts", rows=(4, 4), size=(16, 8), writes=True),
}
WAYS: tuple[tuple[Keep, LmLoss], ...] = (
    ("full", "own"),
    ("replay", "own"),
    ("offload", "own"),
    ("int8", "own"),
    ("bf16", "own"),
    ("full", "chunked"),
)

BANKS: dict[str, tuple[ss.MethodConfig, str, tuple[int, ...]]] = {
    "read-128, one token": (ss.ReadConfig(rank=128), "cls", (16, 64)),
    "read-8, all tokens": (ss.ReadConfig(rank=8), "mean", (16,)),
    "readout": (ss.ReadoutConfig(), "cls", (16, 256)),
}
"""Methods of many tasks on one batch, what their heads read, and how many tasks."""

"""What trainers look for on a model besides its forward pass and its state: Hugging Face's Trainer, and TRL's.

TRL's trainers compute the loss from the backbone's hidden states and the weights of its head, without the model's own
forward. Given the bare backbone for that, they would train a model without the task, and nothing would say so.
"""

from __future__ import annotations

import copy
import inspect
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from sidestep.backbone import Facts, checkpoint_blocks, device_of, trunk_of, uncheckpoint_blocks
from sidestep.fold import Fold
from sidestep.interface.offload import HOOK, is_dispatched
from sidestep.interface.sites import Place
from sidestep.interface.sparse_delta import SparseDelta
from sidestep.metrics import Written
from sidestep.model.dense_stage import DenseStage
from sidestep.model.heads import Head
from sidestep.model.inputs import Inputs


class TrainerFace(DenseStage):
    """The part of a `SideModel` that trainers, pipelines and pickle see.

    Attributes:
        model_tags: what a Trainer's model card is to be found by.
        loss_type: tells the Trainer which tokens a loss is a mean of.
        accepts_loss_kwargs: whether the loss is scaled by the Trainer's `num_items_in_batch` here.
    """

    head: Head | None
    facts: Facts
    fold: Fold
    inputs: Inputs
    places: list[Place]
    model_tags: Sequence[str] = ()

    @abstractmethod
    def late_blocks(self) -> list[nn.Module]:
        """The blocks after the method's first write."""

    def show_face(self) -> None:
        """Set what is looked for on an instance, once all of it is there."""
        if hasattr(self.backbone, "config"):
            self.config = self._described()
        # by which the Trainer leaves the model where it is. accelerate's `cpu_offload` makes none
        if is_dispatched(self.backbone) and (where := getattr(self.backbone, "hf_device_map", None)) is not None:
            self.hf_device_map = where
        if getattr(self.backbone, "generation_config", None) is not None:
            self.generation_config = self.backbone.generation_config
        # The Trainer hands `num_items_in_batch` to models that scale their loss by it and divides the others' loss
        # itself. Sidestep's heads and causal language models do. Other Hugging Face heads may take it and ignore it.
        # The loss of encoder-decoders, a mean over the batch's tokens, is scaled by the model.
        self.scales_loss = self.head is None and self.is_text2text()
        # the loss of a causal language model is of shifted tokens
        self.loss_type = vars(self.backbone).get("loss_type") if self.head is None else None
        self.accepts_loss_kwargs = self.head is not None or self.is_causal_lm() or self.scales_loss
        # a class, as a function on the instance would be a reference cycle, which keeps a model in memory for long
        named = type(self.backbone if self._has_own_loss() else self)
        self.__class__ = _like(type(self), named.__name__, self._reads())

    def _described(self) -> Any:
        """The backbone's config. With a Sidestep head it is a copy that tells of that head, as pipelines ask."""
        if self.settings.head is None:
            return self.backbone.config
        config = copy.deepcopy(self.backbone.config)
        for name, value in self.settings.head.described().items():
            setattr(config, name, value)
        return config

    def is_causal_lm(self) -> bool:
        """Whether the backbone is transformers' causal language model, which may read pictures too."""
        name = type(self.backbone).__name__
        known = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
        return any(name in names.values() for names in known)

    def is_text2text(self) -> bool:
        """Whether the backbone is transformers' encoder-decoder that writes text."""
        return type(self.backbone).__name__ in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()

    @property
    def writes(self) -> Written | None:
        """What the backbone's own head writes: "text2text" (an encoder-decoder's), "lm" (a decoder's), or no text."""
        if self.head is not None:
            return None
        if self.is_text2text():
            return "text2text"
        return "lm" if self.is_causal_lm() and self.facts.is_causal else None

    def can_generate(self) -> bool:
        """Whether `generate` writes text."""
        return self.head is None and isinstance(self.backbone, PreTrainedModel) and self.backbone.can_generate()

    @property
    def trunk(self) -> Any:
        """The backbone without its own head."""
        return trunk_of(self.backbone)

    @property
    def main_input_name(self) -> str:
        """Name of the model's first input."""
        return self.inputs.main_name

    @property
    def input_modalities(self) -> Any:
        """What the backbone reads, in transformers' words."""
        return self.backbone.input_modalities

    @property
    def output_modalities(self) -> Any:
        """What the backbone writes where it generates, in transformers' words."""
        return self.backbone.output_modalities

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return device_of(self.backbone)

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's precision."""
        return next(self.backbone.parameters()).dtype

    def _get_name(self) -> str:
        # The Trainer's label smoothing shifts labels by the class name of a causal language model.
        own_lm = self.__dict__.get("settings") is not None and self.settings.head is None
        return type(self.backbone).__name__ if own_lm and "backbone" in self._modules else type(self).__name__

    # --- a class with forward's signature, and what it costs pickle ---------------------------------------------------

    def _has_own_loss(self) -> bool:
        """Whether the backbone's own head, if it has one, takes the labels."""
        return self.head is None and isinstance(self.backbone, PreTrainedModel)

    def _reads(self) -> tuple[str, ...]:
        """Names of what `forward` takes."""
        if not isinstance(self.backbone, PreTrainedModel):
            names = ["pixel_values"]
        else:
            entry = self.trunk if self.head is not None else self.backbone
            parameters = inspect.signature(type(entry).forward).parameters.values()
            variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            names = [p.name for p in parameters if p.kind not in variable][1:]
        if not self._has_own_loss():
            names.append("labels")
        return (*dict.fromkeys(names), "features")

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle finds no class that was made here by its name
        return _blank_like, vars(type(self))["made_of"], self.__getstate__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        for module in self.backbone.modules():
            hook = vars(module).get(HOOK)
            if hook is not None and id(hook) not in memo:
                raise ValueError(
                    f"{type(self.backbone).__name__} is placed by accelerate (device_map), and a copy would run the "
                    "original's hooks: load the backbone again and attach to that"
                )
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        # accelerate puts a `forward` on a model that it prepares for half precision, and a copy's would run this model
        return {name: value for name, value in self.__dict__.items() if name != "forward"}

    # --- whether a step trains anything ------------------------------------------------------------------------------

    def check_trains(self, *, learns: bool) -> None:
        """Raise where a training step has no gradient (`learns`), instead of autograd's own error in backward.

        Raises:
            ValueError: also if the method is not ready for a step yet. The message says what to do.
        """
        if not learns:
            raise ValueError(self._nothing_trained())
        if self.sparse is not None and self.sparse.is_idle:
            how = (
                "as configured it trains all of them first, which needs `sidestep train` or ss.train"
                if self.relaxes
                else "`sidestep train` does that, and for a loop of your own ss.initialise(model, batches)"
            )
            raise ValueError(f"{self.record.name} has not chosen yet which weights it trains: {how}")
        if self.sparse is not None and isinstance(self.delta, SparseDelta):
            self.delta.check_told(self.sparse)

    @property
    def untrained(self) -> str | None:
        """Why nothing is trained. None if something is trained."""
        return None if any(True for _ in self.trained_parameters()) else self._nothing_trained()

    def _nothing_trained(self) -> str:
        return (
            f"nothing is trained: {self.record.name} leaves it to the head, and the own head of "
            f"{type(self.backbone).__name__} is frozen: pass head=ss.Classify(...), or train_head=True if the head is "
            "not tied to the embeddings, or choose another method"
        )

    # --- without the head --------------------------------------------------------------------------------------------

    @property
    def base_model(self) -> Any:
        """The backbone without its own head, with the task active. Called with inputs, it gives the trunk's output.

        Raises:
            ValueError: when called on a model with a Sidestep head, or on one of timm's.
        """
        return self._headless

    def _headless(self, *args: Any, **kwargs: Any) -> Any:
        if self.head is not None or not isinstance(self.backbone, PreTrainedModel):
            raise ValueError(
                "the loss is to be computed by the backbone's own language model head, which this model does not "
                "have. Attach to a ...ForCausalLM model and leave head= out, or train with transformers' Trainer"
            )
        output = self.fold.run(
            self.trunk, *args, **self.inputs.completed(self.trunk, args, kwargs, training=self.training)
        )[0]
        if self.training and torch.is_grad_enabled():
            head = self.get_output_embeddings()
            trained = head is not None and any(weight.requires_grad for weight in head.parameters())
            self.check_trains(learns=trained or output[0].requires_grad)
        return output

    def get_output_embeddings(self) -> nn.Module | None:
        """The backbone's own head, where it gives tokens."""
        return self.backbone.get_output_embeddings() if isinstance(self.backbone, PreTrainedModel) else None

    # --- recomputation, tags -----------------------------------------------------------------------------------------

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Recompute the blocks that a gradient flows through (`checkpoint="late"`)."""
        checkpoint_blocks(self.late_blocks())

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        uncheckpoint_blocks([place.module for place in self.places])

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """What newer Trainers call instead of `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable()

    def add_model_tags(self, tags: str | Sequence[str]) -> None:
        """Note tags for a Trainer's model card."""
        self.model_tags = list(dict.fromkeys([*self.model_tags, *([tags] if isinstance(tags, str) else tags)]))

    # --- what comes to nothing on a frozen backbone, or not to what was meant ----------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's table of tokens, where the method trains the backbone's weights.

        Raises:
            ValueError: if the method does not train them. Noise on the embeddings (NEFTune) belongs to training mode.
        """
        if self.delta is None:
            raise ValueError(
                "noise on the embeddings (neftune_noise_alpha) would do nothing, as this backbone is frozen and stays "
                "in eval mode: leave it out. For the table itself take model.backbone.get_input_embeddings()"
            )
        return self.backbone.get_input_embeddings()

    def enable_input_require_grads(self) -> None:
        """Refused, because PEFT asks for it, whose adapters would be trained in the task's place.

        Raises:
            ValueError: saying what to do instead.
        """
        raise ValueError(
            "this model has a task attached already, and the adapters of a peft_config would be trained in its place. "
            "Leave peft_config out (PEFT's adapters are ss.LoraConfig, ss.DoraConfig and ss.IA3Config), or give PEFT "
            "the bare backbone"
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> None:
        """Refused, because the task would fit no backbone.

        Raises:
            ValueError: saying where to do it instead.
        """
        raise ValueError(
            "the embeddings of an attached model keep their size. Bring backbone and tokenizer to one size before "
            "ss.attach (after trl.clone_chat_template, save the backbone and load it from there). Or set a chat "
            "template alone (tokenizer.chat_template, or chat_template_path with a .jinja file)"
        )

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "nn.DataParallel copies modules but not their hooks, so a side network would read another device's hidden "
            "states. Start one process per GPU with torchrun, or show one GPU (CUDA_VISIBLE_DEVICES=0)"
        )


_LIKE: dict[tuple[type[TrainerFace], str, tuple[str, ...]], type[TrainerFace]] = {}
"""What `_like` has made: one class for all models that read alike."""


def _like(base: type[TrainerFace], name: str, reads: tuple[str, ...]) -> type[TrainerFace]:
    """A model's class of another name, whose `forward` has the backbone's signature.

    The Trainer keeps or drops columns by the signature. It finds the names of labels (start_positions for question
    answering) by name and signature. Pipelines find by the name whether a model is of their task.
    """
    if (base, name, reads) in _LIKE:
        return _LIKE[base, name, reads]

    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        return base.forward(self, *args, labels=labels, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    named = (inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY, default=None) for each in reads)
    # `inspect` reads this attribute. The types know no such attribute of functions
    forward.__signature__ = inspect.Signature([own, *named])  # type: ignore[attr-defined]
    forward.__doc__ = base.forward.__doc__
    fields = {
        "forward": forward,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "made_of": (base, name, reads),
    }
    return _LIKE.setdefault((base, name, reads), type(name, (base,), fields))


def _blank_like(base: type[TrainerFace], name: str, reads: tuple[str, ...]) -> TrainerFace:
    """An attached model of this class without its state, which pickle or a copy sets."""
    cls = _like(base, name, reads)
    return cls.__new__(cls)

"""What trainers look for on a model besides its forward pass and its state: Hugging Face's Trainer, and TRL's.

TRL's trainers compute the loss from the backbone's hidden states and the weights of its head, without the model's own
forward. Given the bare backbone for that, they would train a model without the task, and nothing would say so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sidestep import backbone as backbones
from sidestep.fold import Fold
from sidestep.interface.sites import Place
from sidestep.interface.weight_delta import WeightDelta
from sidestep.model.heads import Head


class TrainerFace(nn.Module, ABC):
    """The part of a `SideModel` that trainers see.

    Attributes:
        model_tags: what a Trainer's model card is to be found by.
    """

    backbone: Any
    head: Head | None
    fold: Fold
    places: list[Place]
    model_tags: Sequence[str] = ()

    @property
    @abstractmethod
    def trunk(self) -> Any:
        """The backbone without its own head."""

    @property
    @abstractmethod
    def delta(self) -> WeightDelta | None:
        """The method, if it changes weights."""

    @abstractmethod
    def late_blocks(self) -> list[nn.Module]:
        """The blocks after the method's first write."""

    @abstractmethod
    def _defaults(self, entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]: ...

    @abstractmethod
    def _check_trains(self, *, learns: bool) -> None: ...

    # --- without the head --------------------------------------------------------------------------------------------

    @property
    def base_model(self) -> Any:
        """The backbone without its own head, with the task active: called with inputs, it gives the trunk's output.

        Raises:
            ValueError: when called on a model with a Sidestep head, or on one of timm's.
        """
        return self._headless

    def _headless(self, *args: Any, **kwargs: Any) -> Any:
        if self.head is not None or not isinstance(self.backbone, PreTrainedModel):
            raise ValueError(
                "the loss is to be computed by the backbone's own language model head, which this model does not "
                "have: attach to a ...ForCausalLM model and leave head= out, or train with transformers' Trainer"
            )
        output = self.fold.run(self.trunk, *args, **self._defaults(self.trunk, args, kwargs))[0]
        if self.training and torch.is_grad_enabled():
            head = self.get_output_embeddings()
            trained = head is not None and any(weight.requires_grad for weight in head.parameters())
            self._check_trains(learns=trained or output[0].requires_grad)
        return output

    def get_output_embeddings(self) -> nn.Module | None:
        """The backbone's own head, where it gives tokens."""
        return self.backbone.get_output_embeddings() if isinstance(self.backbone, PreTrainedModel) else None

    # --- recomputation, tags -----------------------------------------------------------------------------------------

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Recompute the blocks that a gradient flows through (`checkpoint="late"`)."""
        backbones.checkpoint_blocks(self.late_blocks())

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        backbones.uncheckpoint_blocks([place.module for place in self.places])

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
            ValueError: where it does not, as noise on the embeddings (NEFTune) is one of training mode.
        """
        if self.delta is None:
            raise ValueError(
                "noise on the embeddings (neftune_noise_alpha) would do nothing, as this backbone is frozen and stays "
                "in eval mode: leave it out; for the table itself take model.backbone.get_input_embeddings()"
            )
        return self.backbone.get_input_embeddings()

    def enable_input_require_grads(self) -> None:
        """Refused: PEFT asks for it, whose adapters would be trained in the task's place.

        Raises:
            ValueError: saying what to do instead.
        """
        raise ValueError(
            "this model has a task attached already, and the adapters of a peft_config would be trained in its place: "
            "leave peft_config out (PEFT's adapters are ss.LoraConfig, ss.DoraConfig and ss.IA3Config), or give PEFT "
            "the bare backbone"
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the task would fit no backbone.

        Raises:
            ValueError: saying where to do it instead.
        """
        raise ValueError(
            "the embeddings of an attached model keep their size: bring backbone and tokenizer to one size before "
            "ss.attach (after trl.clone_chat_template, save the backbone and load it from there), or set a chat "
            "template alone (tokenizer.chat_template, or chat_template_path with a .jinja file)"
        )

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "nn.DataParallel copies modules but not their hooks, so a side network would read another device's hidden "
            "states: start one process per GPU with torchrun, or show one GPU (CUDA_VISIBLE_DEVICES=0)"
        )

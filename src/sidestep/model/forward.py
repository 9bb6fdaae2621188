"""Running a model: its forward pass, live or from stored features, and the texts that it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import ModelOutput

from sidestep import backbone as backbones
from sidestep.backbone.families import Pool
from sidestep.backbone.in_order import in_order
from sidestep.fold import KEY_VALUES, Reading, Recorder, States, fed, recorded
from sidestep.fold.packing import is_packed
from sidestep.interface.registry import Method
from sidestep.methods import SideNet, WeightDelta
from sidestep.model import outputs
from sidestep.model.inputs import check_labels
from sidestep.model.settings import Settings
from sidestep.model.token_loss import TokenLoss
from sidestep.model.trainer_face import TrainerFace


class Forward(TrainerFace):
    """The part of a `SideModel` that runs it.

    Attributes:
        settings: what it was attached with.
        record: the method as it is registered.
        side: the side network.
        delta: the method, if it changes weights.
        token_loss: the loss of the backbone's own language model head without its logits, where that was asked for.
    """

    settings: Settings
    record: Method
    side: SideNet
    delta: WeightDelta | None
    token_loss: TokenLoss | None

    @property
    def pool(self) -> Pool:
        """The read-out of the head, the head's or the family's default where the config leaves it open."""
        head = self.settings.head
        asked = None if head is None else head.pool or head.default
        return asked or backbones.default_pool(self.backbone, self.facts)

    @property
    def _reads_own(self) -> bool:
        """Whether the hidden states go on into the backbone's own head, or its own pooled output."""
        return self.settings.head is None or self.pool == "own"

    @property
    def caches(self) -> bool:
        """Whether text is generated with a cache as it is without."""
        return self.side.tokenwise or (self.side.caches and self.facts.caches == (KEY_VALUES,))

    def forward(self, *args: Any, labels: Tensor | None = None, features: States | None = None, **kwargs: Any) -> Any:
        """The backbone's inputs (and `labels`) -> its output type, or with a Sidestep head a classifier output.

        With `features` the frozen blocks do not run: these are what they gave for the batch.
        """
        self.fold.require_attached()
        self.fold.keeping.check_compiler()
        if labels is not None and (self.head is None or self.head.config.kind != "regress"):
            check_labels(labels)
        entry = self.trunk if self.head is not None else self.backbone
        if features is not None and features.vector is None:
            kwargs.update(features.inputs(self.device))
        if features is None or features.vector is None:
            kwargs = self.inputs.completed(entry, args, kwargs, training=self.training)
        output = self._run(args, labels, kwargs, features)
        if self.training and torch.is_grad_enabled() and (loss := outputs.loss_of(output)) is not None:
            self.check_trains(learns=loss.requires_grad)
        return output

    def _run(
        self, args: tuple[Any, ...], labels: Tensor | None, kwargs: dict[str, Any], features: States | None
    ) -> Any:
        if self.head is None and isinstance(self.backbone, PreTrainedModel):
            backbone = self._entry(self.backbone, features)
            if self.token_loss is not None and self.training and labels is not None and not args:
                output = self.token_loss.run(lambda **own: self.fold.run(backbone, **own)[0], labels, kwargs)
                if output is not None:
                    return output
            given = {} if labels is None else outputs.own_labels(self.backbone, labels)
            items = kwargs.pop("num_items_in_batch", None) if self.scales_loss else None
            output = self.fold.run(backbone, *args, **given, **kwargs)[0]
            if items is None or labels is None:
                return output
            return outputs.scaled(output, (labels >= 0).sum() / items)
        items, as_dict = (
            kwargs.pop("num_items_in_batch", None),
            outputs.pop_return_dict(kwargs, getattr(self, "config", None)),
        )
        if features is not None and features.vector is not None:
            assert self.head is not None
            home = self.fold.home
            keep = None if features.keep is None else home.tensor(features.keep)
            return self._answer(self.head.map(home.tensor(features.vector), keep), None, labels, items, as_dict=as_dict)
        output, reading = self._read(args, kwargs, features)
        if self.head is None:
            loss = None if labels is None else nn.functional.cross_entropy(output, labels)
            found: ModelOutput = ImageClassifierOutput(loss=loss, logits=output)
            return found if as_dict else found.to_tuple()
        assert reading is not None
        logits, name = self.head(reading), self.main_input_name
        outputs.check_rows(logits, args[0] if args else kwargs.get(name, kwargs.get("inputs_embeds")), self.backbone)
        return self._answer(logits, output, labels, items, as_dict=as_dict)

    def _read(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], features: States | None
    ) -> tuple[Any, Reading | None]:
        """What the trunk gives, and what a Sidestep head reads of it."""
        if not isinstance(self.backbone, PreTrainedModel):
            outputs.refuse_timm_options(kwargs, self.backbone)
            args, kwargs = (*args, *kwargs.values()), {}
        output, reading = self.fold.run(self._entry(self.trunk, features), *args, **kwargs)
        if self.head is not None and self._reads_own and reading is not None and reading.pooled is None:
            reading = replace(reading, pooled=self.fold.home.tensor(output.pooler_output))
        return output, reading

    def _answer(self, logits: Tensor, output: Any, labels: Tensor | None, items: Any, *, as_dict: bool) -> Any:
        """The output of a model with a Sidestep head.

        It is where the inputs are, as accelerate sends a dispatched model's.
        """
        assert self.head is not None
        if self.fold.home.device is not None:
            logits = logits.to(self.device if labels is None else labels.device)
        loss, images = None if labels is None else self.head.loss(logits, labels, items), self.main_input_name
        found = outputs.classified(loss, logits, output, self.backbone, reads_images=images == "pixel_values")
        return found if as_dict else found.to_tuple()

    def _entry(self, module: nn.Module, features: States | None) -> Callable[..., Any]:
        """The module whose call is a pass. With features it passes over the frozen blocks."""
        return module if features is None else fed(self.fold, features, module)

    # --- a pass that several tasks share ---------------------------------------------------------------------------

    @property
    def only_reads(self) -> bool:
        """Whether a pass of the bare backbone is enough: nothing is written but behind the last block."""
        border = self.fold.keeping.border
        at_end = border is None or border.kind == "norm" or border.last
        reads_end = self.head is not None and not self._reads_own and self.facts.head.after is None
        return reads_end and self.delta is None and at_end

    def bare(self, inputs: dict[str, Any]) -> Any:
        """What the trunk gives for inputs. Whoever has hooks on it follows the pass."""
        inputs = self.inputs.completed(self.trunk, (), {**inputs}, training=False)
        if isinstance(self.backbone, PreTrainedModel):
            outputs.pop_return_dict(inputs, getattr(self, "config", None))
            with in_order(self.trunk):
                return self.trunk(**inputs)
        outputs.refuse_timm_options(inputs, self.backbone)
        return self.trunk(*inputs.values())

    def answer(self, reading: Reading, output: Any, inputs: Mapping[str, Any]) -> Any:
        """The output of the Sidestep head for what was read in a pass, which may have been shared.

        Args:
            reading: of this task's method.
            output: of the trunk.
            inputs: of the pass.
        """
        assert self.head is not None
        logits = self.head(reading)
        outputs.check_rows(logits, inputs.get(self.main_input_name, inputs.get("inputs_embeds")), self.backbone)
        return self._answer(logits, output, None, None, as_dict=True)

    # --- what a store holds of a batch -------------------------------------------------------------------------------

    def take(self, recorder: Recorder, inputs: dict[str, Any]) -> None:
        """A pass without the method and without gradients, whose hidden states `recorder` takes."""
        entry = self.trunk if self.head is not None else self.backbone
        inputs = self.inputs.completed(entry, (), inputs, training=False)
        args, inputs = ((), inputs) if isinstance(self.backbone, PreTrainedModel) else (tuple(inputs.values()), {})
        with torch.no_grad():
            self.fold.run(recorded(self.fold, recorder, entry), *args, **inputs)

    def vector(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """What the Sidestep head reads of a batch, without gradients: (batch, width), or of every token.

        Besides, which tokens are no padding (None: all).
        """
        assert self.head is not None
        with torch.no_grad():
            reading = self._read((), self.inputs.completed(self.trunk, (), inputs, training=False), None)[1]
            assert reading is not None
            return self.head.features(reading), self.head.kept(reading)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's `generate` with the task active.

        Raises:
            ValueError: if the model has a Sidestep head, or a prompt is longer than the backbone has positions for.
                Also if a cache is asked for that the method cannot go on from.
        """
        if self.head is not None:
            raise ValueError(f"a model with a {type(self.settings.head).__name__} head does not generate text")
        is_packed(kwargs, lambda: "generate goes on from one text a row: give each prompt a row of its own")
        self.inputs.check_prompts(args[0] if args else kwargs.get("input_ids", kwargs.get("inputs")), kwargs)
        config = kwargs.get("generation_config", getattr(self, "generation_config", None))
        cached = kwargs.get("use_cache", getattr(config, "use_cache", True))
        # where nobody says, transformers uses one
        if cached is not False and not self.caches:
            raise ValueError(
                f"{self.record.name} mixes tokens, so a cache would give other outputs than it was trained "
                "for: pass use_cache=False"
            )
        return self.fold.run(self.backbone.generate, *args, **kwargs)[0]

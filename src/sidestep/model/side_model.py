"""SideModel: a frozen backbone, a method and a head; the one `nn.Module` that a user holds."""

from __future__ import annotations

import copy
import inspect
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    ImageClassifierOutput,
    Seq2SeqSequenceClassifierOutput,
    SequenceClassifierOutput,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils import ModelOutput

from sidestep import backbone as backbones
from sidestep.backbone import Digest
from sidestep.backbone.families import Pool, family_of
from sidestep.fold import KEY_VALUES, Fold, FoldError, Hooks, is_hooked
from sidestep.fold.packing import is_packed, refusal
from sidestep.interface.registry import Method
from sidestep.interface.sites import Place, Site
from sidestep.interface.sparse_delta import SparseDelta
from sidestep.messages import some
from sidestep.methods import MethodConfig, ProbeConfig, SideNet, UnsupportedBackbone, WeightDelta, method_of
from sidestep.methods.controls import Probe
from sidestep.metrics import IGNORED, Written
from sidestep.model.before import Before, Rest
from sidestep.model.heads import Head, HeadConfig
from sidestep.model.settings import Settings
from sidestep.model.trainer_face import TrainerFace
from sidestep.sparse.diff import SparseDiff

TRACES = (
    "hidden_states",
    "attentions",
    "encoder_hidden_states",
    "encoder_attentions",
    "decoder_hidden_states",
    "decoder_attentions",
    "cross_attentions",
)
"""What a trunk's output holds besides its last hidden state if it is asked to."""


class SideModel(TrainerFace):
    """A backbone with a method and a head attached; make one with `attach` or `load`.

    It returns the backbone's own output type, or with a Sidestep head a `SequenceClassifierOutput` or
    `ImageClassifierOutput`. `state_dict()` is the task alone: what is trained, side buffers, and what the backbone's
    checkpoint did not have.

    Attributes:
        backbone: the backbone as given.
        settings: what it was attached with.
        side: the side network (for a method that changes weights, a probe that does nothing).
        head: the Sidestep head, or None.
        sparse: the sparse diff of the backbone's weights that is trained in their place, or None.
        facts: what the backbone is, as a traced pass of it showed.
        places: the backbone's sites and the modules they sit on.
        fold: runs the method along a pass.
        hooks: bring it the passes.
        extras: what `save_pretrained` stores besides (tokenizer or processor, preprocessing, scores).
    """

    backbone: Any
    side: SideNet
    head: Head | None
    sparse: SparseDiff | None

    def __init__(self, backbone: nn.Module, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.record: Method = method_of(settings.method)
        self.extras: dict[str, Any] = {}
        self._digest: Digest | None = None
        self.facts = backbones.facts_of(backbone)
        self._check_head(backbone, settings.head)

        places = self._with_features(backbones.find_places(backbone), settings.head)
        sites = [place.site for place in places]
        trunk = backbones.trunk_of(backbone)
        self._before, snapshot = Before.of(backbone), backbones.Snapshot(backbone)
        try:
            delta = self._build_delta(backbone, trunk, settings.method)
            side = self._build_side(backbone, sites, settings.method)
            mean_first = self._means_first(sites, side)
            backbones.freeze(backbone)
            self._assemble(backbone, places, delta, side, mean_first)
        except BaseException:
            if isinstance(sparse := self._modules.get("sparse"), SparseDiff):
                sparse.unhook()
            if isinstance(wide := self.__dict__.get("_wide"), backbones.Widened):
                wide.remove()
            snapshot.restore()
            self._before.restore(backbone)
            raise

    # --- building --------------------------------------------------------------------------------------------------

    def _assemble(
        self, backbone: nn.Module, places: list[Place], delta: WeightDelta | None, side: SideNet, mean_first: bool
    ) -> None:
        """Put the parts together on a frozen backbone."""
        settings, sites, trunk = self.settings, [place.site for place in places], backbones.trunk_of(backbone)
        self.backbone = backbone
        self.attached_shapes = self.shapes()
        self.side = side.to(device=backbones.device_of(backbone))
        pool = self.pool
        self.head = None
        if settings.head is not None:
            self.head = settings.head.build(self._feature_width(sites), pool).to(device=backbones.device_of(backbone))
        self.places, self._delta = places, delta
        self._set_trained()
        entry = trunk if self.head is not None else backbone
        self.fold = Fold(
            trunk,
            places,
            self.side,
            self.facts,
            family_of(backbone).grid,
            narrow=self._narrow(sites),
            mean_first=mean_first,
            through=self._reads_own,
            frozen=delta is None,
            late=bool(self.late_blocks()),
            pools=self.head is not None,
            diff=self.sparse,
        )
        self.hooks = Hooks(self.fold, entry, trunk, places)
        if settings.checkpoint == "late":
            backbones.checkpoint_blocks(self.late_blocks())
        self._set_interface()
        self.train(self._before.training)

    def _build_delta(self, backbone: nn.Module, trunk: nn.Module, config: MethodConfig) -> WeightDelta | None:
        if not issubclass(self.record.implementation, WeightDelta):
            return None
        delta = self.record.implementation(config)
        with _naming(self.record, backbone):
            delta.insert(trunk)
            delta.check([name for name, parameter in trunk.named_parameters() if delta.moves(name, parameter)])
        return delta

    def _check_head(self, backbone: nn.Module, head: HeadConfig | None) -> None:
        """Refuse a Sidestep head where it would read something else than the model's last hidden state."""
        if head is not None and not self.facts.head.ends:
            raise UnsupportedBackbone(
                f"a {type(head).__name__} head does not work on {type(backbone).__name__}: it reads what the last "
                "block or a final norm gives, and here something else follows, so that this is not the model's last "
                "hidden state: train the model's own head (head=None, on a For...Classification class)"
            )

    def _build_side(self, backbone: nn.Module, sites: list[Site], config: MethodConfig) -> SideNet:
        if not issubclass(self.record.implementation, SideNet):
            return Probe(ProbeConfig(), sites)
        with _naming(self.record, backbone):
            self.record.implementation.check(config, sites)
            if self.record.implementation.replays:
                backbones.prove_replay(backbone)
        # A method's constructor takes its config and the sites.
        side = self.record.implementation(config, sites)
        if side.from_data and self.settings.head is not None:
            raise ValueError(
                f"{self.record.name} as configured starts by the loss of the backbone's own head on training rows, and "
                f"a {type(self.settings.head).__name__} head is none: let the backbone write the labels as words, or "
                "choose a start without data"
            )
        if self.settings.head is None and (side.pooled_width is not None or side.corrects):
            raise ValueError(
                f"{self.record.name} has a read-out of its own, which the own head of {type(backbone).__name__} does "
                "not read: pass head=ss.Classify(...), ss.Regress(...) or ss.Retrieve(...)"
            )
        return side

    @staticmethod
    def _with_features(places: list[Place], head: HeadConfig | None) -> list[Place]:
        """The places with the width of the head's vector at their sites."""
        width = places[-1].site.width
        features = width if head is None else head.features(width)
        return [replace(place, site=replace(place.site, features=features)) for place in places]

    @property
    def pool(self) -> Pool:
        """The read-out of the head, the family's default where the config leaves it open."""
        asked = self.settings.head.pool if self.settings.head is not None else None
        return asked or backbones.default_pool(self.backbone, self.facts)

    @property
    def head_config(self) -> dict[str, Any] | None:
        """The head's config as JSON-ready values, with its read-out as it was resolved; None for the backbone's own."""
        return None if self.settings.head is None else {**self.settings.head.to_dict(), "pool": self.pool}

    @property
    def _reads_own(self) -> bool:
        """Whether the hidden states go on into the backbone's own head, or its own pooled output."""
        return self.settings.head is None or self.pool == "own"

    def _feature_width(self, sites: list[Site]) -> int:
        own = self.side.pooled_width
        return own if own is not None else next(site.width for site in reversed(sites) if site.head)

    def _narrow(self, sites: list[Site]) -> Pool | None:
        """Which single token the method may be given, where that is known to be all that the head reads."""
        staged = any(site.stage > 0 for site in sites)
        write = self._first_write()
        if self._delta is not None or not self.side.tokenwise or staged or not _at_end(write):
            return None
        if not self._reads_own:
            return self.pool if self.pool in ("cls", "last") and self.side.pooled_width is None else None
        return "cls" if type(self.backbone).__name__ in family_of(self.backbone).first_token_heads else None

    def _means_first(self, sites: list[Site], side: SideNet) -> bool:
        """Whether the head reads the tokens' mean before the final norm.

        Raises:
            ValueError: if the method writes behind that place only.
        """
        head = self.settings.head
        if head is None or head.pool != "mean_pre_norm" or side.pooled_width is not None:
            return False
        write = type(side).first_write(self.settings.method, sites)
        if write is not None and write.kind == "norm":
            raise ValueError(
                f'pool="mean_pre_norm" reads before the final norm, and {self.record.name} as configured writes behind '
                'it: choose pool="mean"'
            )
        return True

    def _first_write(self) -> Site | None:
        if self._delta is not None:
            return self.places[0].site
        return type(self.side).first_write(self.settings.method, [place.site for place in self.places])

    def late_blocks(self) -> list[nn.Module]:
        """The blocks after the method's first write: those through which a gradient flows."""
        write = self._first_write()
        if write is None:
            return []
        order = next(n for n, place in enumerate(self.places) if _same_place(place.site, write))
        return [place.module for place in self.places[order + 1 :] if place.site.kind == "block"]

    def _set_trained(self) -> None:
        """Unfreeze what is trained, list the task's tensors, and keep their original values for `detach`."""
        # A Sidestep head does not run through the backbone's own, nor through its pooler unless it reads that.
        new, own = backbones.new_parameters(self.backbone), self._own_head()
        unread: set[int] = set()
        if self.head is not None:
            unread = own if self._reads_own else self._beyond_trunk()
        moved = {id(p) for name, p in self.trunk.named_parameters() if self._delta and self._delta.moves(name, p)}
        unfit = unread | own | {id(p) for name, p in self.backbone.named_parameters() if name in new}
        self.sparse = self._build_sparse(moved - unfit)
        if self.sparse is not None:
            moved = set()
        stored, heads = [], {}
        for name, parameter in self.backbone.named_parameters():
            if id(parameter) in unread:
                continue
            if head := self._trains_head(name, id(parameter) in own, new):
                heads[name] = parameter
            trained = head or id(parameter) in moved
            if self.sparse is None or not self.sparse.covers(parameter):
                parameter.requires_grad_(trained)
            if trained or name in new:
                stored.append(name)
        stored += self._running_statistics()
        tensors = dict([*self.backbone.named_parameters(), *self.backbone.named_buffers()])
        # a backbone without values (a plan's, on the meta device) has none to keep
        place = "meta" if self.device.type == "meta" else "cpu"
        self._originals = {name: tensors[name].detach().to(place, copy=True) for name in stored}
        with _naming(self.record, self.backbone):
            self._wide = backbones.Widened(self.backbone, heads)
        self._wide.put()
        # not by `state_dict` of the whole, which unpacks what bitsandbytes has packed
        parts = {"side": self.side, "head": self.head, "sparse": self.sparse}
        side = [
            f"{part}.{name}" for part, module in parts.items() if module is not None for name in module.state_dict()
        ]
        self._task_names = (*side, *(f"backbone.{name}" for name in stored))

    def _build_sparse(self, moved: set[int]) -> SparseDiff | None:
        """The sparse diff of these weights of the trunk, if the method trains one."""
        if self._delta is None:
            return None
        with _naming(self.record, self.backbone):
            return self._delta.diff({name: p for name, p in self.trunk.named_parameters() if id(p) in moved})

    def _own_head(self) -> set[int]:
        """Identities of the parameters of the backbone's own head (a weight that is tied to the trunk's is none)."""
        inside = {id(p) for p in self.trunk.parameters()}
        return ({id(p) for p in self.backbone.parameters()} - inside) | backbones.head_tensors(self.trunk)

    def _beyond_trunk(self) -> set[int]:
        """Identities of the backbone's parameters behind the last hidden state: its own head, poolers."""
        poolers = {id(p) for name, p in self.trunk.named_parameters() if backbones.in_pooler(name)}
        return poolers | self._own_head()

    def _running_statistics(self) -> list[str]:
        """Batch norms' buffers, which move when a method trains the backbone in its own training mode."""
        if self._delta is None:
            return []
        return [
            f"{path}.{name}"
            for path, module in self.backbone.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for name, _ in module.named_buffers(recurse=False)
        ]

    def _trains_head(self, name: str, own: bool, new: set[str]) -> bool:
        """Whether a parameter of the backbone's own head (`own`) or of a pooler is trained."""
        if not (own or backbones.in_pooler(name)) or not self._reads_own:
            return False
        if self.settings.train_head is not None:
            return self.settings.train_head and (own or name in new)
        timm = not isinstance(self.backbone, PreTrainedModel)
        return name in new or (own and (timm or "Classification" in type(self.backbone).__name__))

    def _set_interface(self) -> None:
        """What the Trainer and other callers look for on a model."""
        if hasattr(self.backbone, "config"):
            self.config = self._described()
        if getattr(self.backbone, "generation_config", None) is not None:
            self.generation_config = self.backbone.generation_config
        # The Trainer hands `num_items_in_batch` to models that scale their loss by it and divides the others' loss
        # itself. Sidestep's heads and causal language models do; other Hugging Face heads may take it and ignore it.
        # The loss of encoder-decoders, a mean over the batch's tokens, is scaled in `_run`.
        self._scales_loss = self.head is None and self._is_text2text()
        # by it the Trainer counts the tokens that a loss is a mean of: those of a causal language model are shifted
        self.loss_type = vars(self.backbone).get("loss_type") if self.head is None else None
        self.accepts_loss_kwargs = self.head is not None or self._is_causal_lm() or self._scales_loss
        if self.head is None and isinstance(self.backbone, PreTrainedModel):
            self.__class__ = _like(type(self.backbone))
        self._bind_forward()

    def _described(self) -> Any:
        """The backbone's config; with a Sidestep head a copy that tells of that head, as pipelines ask."""
        if self.settings.head is None:
            return self.backbone.config
        config = copy.deepcopy(self.backbone.config)
        for name, value in self.settings.head.described().items():
            setattr(config, name, value)
        return config

    def _is_causal_lm(self) -> bool:
        return type(self.backbone).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def _is_text2text(self) -> bool:
        return type(self.backbone).__name__ in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()

    def _bind_forward(self) -> None:
        """Give this instance's `forward` the backbone's signature: by it the Trainer keeps or drops columns."""

        def forward(self: SideModel, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
            return SideModel.forward(self, *args, labels=labels, **kwargs)

        forward.__signature__ = self._signature()  # type: ignore[attr-defined]
        object.__setattr__(self, "forward", types.MethodType(forward, self))

    def _signature(self) -> inspect.Signature:
        keyword = inspect.Parameter.KEYWORD_ONLY
        if not isinstance(self.backbone, PreTrainedModel):
            names = ["pixel_values"]
        else:
            entry = self.trunk if self.head is not None else self.backbone
            parameters = inspect.signature(type(entry).forward).parameters.values()
            variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            names = [p.name for p in parameters if p.kind not in variable][1:]
        names += [] if "labels" in names else ["labels"]
        self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        return inspect.Signature([self_parameter, *(inspect.Parameter(name, keyword, default=None) for name in names)])

    def __reduce_ex__(self, protocol: Any) -> Any:
        # a class that was made of a backbone's own is made again, as pickle finds no such name
        if type(self) is SideModel:
            return super().__reduce_ex__(protocol)
        return _blank_like, (type(self.backbone),), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bind_forward()

    # --- running ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """The backbone's inputs (and `labels`) -> its output type, or with a Sidestep head a classifier output."""
        self.fold.require_attached()
        if labels is not None and (self.head is None or self.head.config.kind == "single"):
            _refuse_ignored(labels)
        entry = self.trunk if self.head is not None else self.backbone
        output = self._run(args, labels, self._defaults(entry, args, kwargs))
        if self.training and torch.is_grad_enabled() and (loss := _loss_of(output)) is not None:
            self._check_trains(learns=loss.requires_grad)
        return output

    def _run(self, args: tuple[Any, ...], labels: Tensor | None, kwargs: dict[str, Any]) -> Any:
        if self.head is None and isinstance(self.backbone, PreTrainedModel):
            given = {} if labels is None else {"labels": labels}
            items = kwargs.pop("num_items_in_batch", None) if self._scales_loss else None
            output = self.fold.run(self.backbone, *args, **given, **kwargs)[0]
            if items is None or labels is None:
                return output
            return _scaled(output, (labels >= 0).sum() / items)
        items, as_dict = kwargs.pop("num_items_in_batch", None), self._pop_return_dict(kwargs)
        if not isinstance(self.backbone, PreTrainedModel):
            self._check_timm(kwargs)
            args, kwargs = (*args, *kwargs.values()), {}
        output, reading = self.fold.run(self.trunk, *args, **kwargs)
        if self.head is None:
            loss = None if labels is None else nn.functional.cross_entropy(output, labels)
            found: ModelOutput = ImageClassifierOutput(loss=loss, logits=output)
            return found if as_dict else found.to_tuple()
        assert reading is not None
        if self._reads_own and reading.pooled is None:
            reading = replace(reading, pooled=output.pooler_output)
        logits = self.head(reading)
        self._check_rows(logits, args, kwargs)
        loss = None if labels is None else self.head.loss(logits, labels, items)
        found = self._classified(loss, logits, output)
        return found if as_dict else found.to_tuple()

    def _pop_return_dict(self, kwargs: dict[str, Any]) -> bool:
        """Whether an output with names is asked for; the trunk's own always has them, as the head reads by name."""
        asked, usual = kwargs.pop("return_dict", None), getattr(getattr(self, "config", None), "return_dict", True)
        if not usual:
            kwargs["return_dict"] = True
        return usual if asked is None else asked

    def _check_timm(self, kwargs: dict[str, Any]) -> None:
        """Refuse what a timm model's forward does not give; leave out what is not asked for."""
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.pop(name, None):
                raise ValueError(
                    f"{name}=True, but {type(self.backbone).__name__} is timm's and gives logits alone: leave it out, "
                    "or call model.backbone.forward_intermediates"
                )

    def _classified(self, loss: Tensor | None, logits: Tensor, output: Any) -> ModelOutput:
        """The output of a Sidestep head, with what was asked for of the trunk's own besides."""
        image = self.main_input_name == "pixel_values"
        kind: type[ModelOutput] = ImageClassifierOutput if image else SequenceClassifierOutput
        named = output if isinstance(output, ModelOutput) else {}
        extra = {name: named[name] for name in TRACES if named.get(name) is not None}
        if extra and backbones.is_encoder_decoder(self.backbone):
            kind = Seq2SeqSequenceClassifierOutput
        fields = kind.__dataclass_fields__
        return kind(loss=loss, logits=logits, **{name: value for name, value in extra.items() if name in fields})

    def _check_rows(self, logits: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise unless the head gave one row for each row of the batch."""
        given = args[0] if args else kwargs.get(self.main_input_name, kwargs.get("inputs_embeds"))
        if isinstance(given, Tensor) and logits.shape[0] != given.shape[0]:
            raise FoldError(
                f"the head gave {logits.shape[0]} rows for a batch of {given.shape[0]}: the hidden states of "
                f"{type(self.backbone).__name__} do not have the batch as their first axis in this pass, or it puts "
                "rows together; give it one example a row"
            )

    def _check_trains(self, *, learns: bool) -> None:
        """Raise where a training step has no gradient (`learns`), instead of autograd's own error in backward."""
        if not learns:
            raise ValueError(self._nothing_trained())
        if self.sparse is not None and self.sparse.is_idle:
            how = (
                "as configured it trains all of them first, which needs `sidestep train` or training.train.train"
                if self.relaxes
                else "`sidestep train` does that, and for a loop of your own ss.initialise(model, batches)"
            )
            raise ValueError(f"{self.record.name} has not chosen yet which weights it trains: {how}")
        if self.sparse is not None and isinstance(self.delta, SparseDelta):
            self.delta.check_told(self.sparse)

    def _nothing_trained(self) -> str:
        return (
            f"nothing is trained: {self.record.name} leaves it to the head, and the own head of "
            f"{type(self.backbone).__name__} is frozen: pass head=ss.Classify(...), or train_head=True if the head is "
            "not tied to the embeddings, or choose another method"
        )

    def _defaults(self, entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Fill in what a pass of this module needs: no cache where nothing is generated, a decoder's first token."""
        if not isinstance(self.backbone, PreTrainedModel):
            return kwargs
        names = list(inspect.signature(type(entry).forward).parameters)[1:]
        # with a cache, transformers takes a row of several texts for one
        packed = self._is_packed({**dict(zip(names, args, strict=False)), **kwargs})
        uncached = self.head is not None or self.training or packed
        if "use_cache" in names and "past_key_values" not in kwargs and uncached:
            kwargs.setdefault("use_cache", False)
        if self.head is not None and backbones.is_encoder_decoder(self.backbone):
            given = (kwargs.get(name) for name in (self.main_input_name, "inputs_embeds"))
            first = args[0] if args else next((tensor for tensor in given if tensor is not None), None)
            if first is not None and kwargs.get("decoder_input_ids") is None:
                start = torch.full((first.shape[0], 1), self._decoder_start(), device=first.device)
                kwargs["decoder_input_ids"] = start
        return self._with_positions(args, kwargs, names)

    def _is_packed(self, inputs: dict[str, Any]) -> bool:
        """Whether rows hold several texts each, which are then read as if each were alone.

        Raises:
            ValueError: if they would be read as one.
        """

        def packs() -> bool | None:
            if self.facts.packs is None and not torch.compiler.is_compiling():
                self.facts = replace(self.facts, packs=backbones.packs(self.backbone))
            return self.facts.packs

        name, causal, pools = type(self.backbone).__name__, self.facts.is_causal, self.head is not None
        return is_packed(inputs, lambda: refusal(inputs, self.side, name, packs, causal=causal, pools=pools))

    def _with_positions(self, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]) -> dict[str, Any]:
        """The inputs with positions that count from each text's first token, where the model would count padding.

        Raises:
            ValueError: if texts are padded on the left and the model counts that, whatever it is given.
        """
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        if self.facts.left in (None, "kept") or not isinstance(mask, Tensor) or mask.ndim != 2 or not _pads_left(mask):
            return kwargs
        ids = given.get("input_ids", given.get("inputs_embeds"))
        if self.facts.left == "moved" and self.facts.padding and not torch.compiler.is_compiling():
            raise ValueError(
                f"a text is padded on the left, and {type(self.backbone).__name__} counts its positions from there, "
                "so that a text would be read otherwise in other batches: pad on the right "
                '(tokenizer.padding_side="right")'
            )
        if self.facts.left == "moved" or ids is None or given.get("position_ids") is not None:
            return kwargs
        padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
        positions = (torch.arange(mask.shape[1], device=mask.device) - padding).clamp(min=0)
        return {**kwargs, "position_ids": positions[:, -ids.shape[1] :]}

    def _decoder_start(self) -> int:
        """The token that a decoder begins with."""
        config, generation = self.backbone.config, getattr(self.backbone, "generation_config", None)
        for holder in (config, generation):
            if (token := getattr(holder, "decoder_start_token_id", None)) is not None:
                return token
        return config.pad_token_id

    def can_generate(self) -> bool:
        """Whether `generate` writes text."""
        return self.head is None and isinstance(self.backbone, PreTrainedModel) and self.backbone.can_generate()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's `generate` with the task active.

        Raises:
            ValueError: if the model has a Sidestep head, a prompt is longer than the backbone has positions for, or a
                cache is asked for that the method cannot go on from.
        """
        if self.head is not None:
            raise ValueError(f"a model with a {type(self.settings.head).__name__} head does not generate text")
        is_packed(kwargs, lambda: "generate goes on from one text a row: give each prompt a row of its own")
        self._check_prompts(args[0] if args else kwargs.get("input_ids", kwargs.get("inputs")), kwargs)
        config = kwargs.get("generation_config", getattr(self, "generation_config", None))
        cached = kwargs.get("use_cache", getattr(config, "use_cache", True))
        # where nobody says, transformers uses one
        if cached is not False and not self.caches:
            raise ValueError(
                f"{self.record.name} mixes tokens, so a cache would give other outputs than it was trained "
                "for: pass use_cache=False"
            )
        return self.fold.run(self.backbone.generate, *args, **kwargs)[0]

    def _check_prompts(self, tokens: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Refuse prompts that are longer than the backbone's table of positions; masked padding is no part of them."""
        most, _ = backbones.positions(self.backbone)
        if most is None or tokens is None or self.main_input_name != "input_ids":
            return
        mask = kwargs.get("attention_mask")
        longest = tokens.shape[1] if mask is None else int(mask.sum(1).max())
        if longest > most:
            raise ValueError(
                f"a prompt of {longest} tokens, but {type(self.backbone).__name__} has {most} positions: give at most "
                f"{most}"
            )

    def train(self, mode: bool = True) -> SideModel:
        """Training mode for the method and the head; the backbone stays in eval mode unless noise was asked for."""
        super().train(mode)
        if self._delta is None:
            backbones.set_noise(self.trunk, self.settings.backbone_noise if mode else None)
        return self

    # --- what it holds ---------------------------------------------------------------------------------------------

    @property
    def trunk(self) -> Any:
        """The backbone without its own head."""
        return backbones.trunk_of(self.backbone)

    @property
    def writes(self) -> Written | None:
        """What the backbone's own head writes: "text2text" (an encoder-decoder's), "lm" (a decoder's), or no text."""
        if self.head is not None:
            return None
        if self._is_text2text():
            return "text2text"
        return "lm" if self._is_causal_lm() and self.facts.is_causal else None

    @property
    def caches(self) -> bool:
        """Whether text is generated with a cache as it is without."""
        return self.side.tokenwise or (self.side.caches and self.facts.caches == (KEY_VALUES,))

    @property
    def main_input_name(self) -> str:
        """Name of the model's first input."""
        return getattr(self.backbone, "main_input_name", "pixel_values")

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
        return backbones.device_of(self.backbone)

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's precision."""
        return next(self.backbone.parameters()).dtype

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the backbone's tables of embeddings, by their names."""
        tables = ((name, part) for name, part in self.backbone.named_modules() if isinstance(part, nn.Embedding))
        return {f"{name}.weight": tuple(part.weight.shape) for name, part in tables}

    @property
    def precisions(self) -> str:
        """Those of the backbone's weights but for the task, joined by "+"; an own head counts as it was given."""
        inserted: set[int] = set()
        if self._delta is not None:
            named = self.trunk.named_parameters()
            inserted = {id(p) for name, p in named if self._delta.plain_name(name) is None}
        own = [p for p in self.backbone.parameters() if p.is_floating_point() and id(p) not in inserted]
        return "+".join(sorted({str(self._wide.own_dtype(p)).removeprefix("torch.") for p in own}))

    @property
    def digest(self) -> Digest:
        """The digest of the backbone's pretrained weights, as they were at `attach`."""
        if self._digest is None:
            plain_name = self._delta.plain_name if self._delta is not None else str
            named = backbones.pretrained_tensors(self.backbone, self._originals, plain_name)
            with self._without_diff():
                self._digest = backbones.digest_of(named)
        return self._digest

    @digest.setter
    def digest(self, known: Digest) -> None:
        self._digest = known

    @property
    def head_digest(self) -> Digest | None:
        """The digest of what the task needs of the backbone besides: its own frozen head or loaded pooler."""
        if not self._reads_own:
            return None
        beyond = self._beyond_trunk() - (self._own_head() if self.head is not None else set())
        rest = [
            (name, parameter.detach())
            for name, parameter in sorted(self.backbone.named_parameters())
            if id(parameter) in beyond and f"backbone.{name}" not in self._task_names
        ]
        with self._without_diff():
            return backbones.digest_of(rest) if rest else None

    @property
    def parts(self) -> tuple[SideModel, ...]:
        """The attached backbones: of a `PairModel` two, here this one."""
        return (self,)

    @contextmanager
    def _without_diff(self) -> Iterator[None]:
        """The backbone's weights are the pretrained ones meanwhile, where a sparse diff is written into them."""
        if not self.fold.attached:
            check_attachable(self.backbone)  # under another task they would not be
        if not self.fold.attached or self.sparse is None:
            yield
            return
        with self.fold.turn, self.sparse.lifted():
            yield

    @property
    def relaxes(self) -> bool:
        """Whether training begins with a stage in which all weights are free, after which a diff gets its positions."""
        placed = self.sparse is None or self.sparse.is_placed
        return isinstance(self._delta, SparseDelta) and self._delta.relaxes and not placed

    def place_anywhere(self) -> None:
        """Give a sparse diff that has no positions random ones: memory and time do not depend on where they are."""
        if self.sparse is not None and not self.sparse.is_placed:
            self.sparse.place_at_random(0)

    def relax(
        self, *, rate: float, weight_decay: float = 0.0, max_norm: float = 1.0, seed: int = 0
    ) -> torch.optim.Optimizer:
        """The optimizer of that stage (see `SparseDelta.relax`), until its `project` or `unrelax`.

        Args:
            rate: learning rate; at 0 nothing moves.
            weight_decay: of the weights and of the head.
            max_norm: where gradients are cut; 0 leaves them.
            seed: of what is random in it.
        """
        assert isinstance(self._delta, SparseDelta)
        assert self.sparse is not None
        dense = [p for _, p in self.trained_parameters() if p is not self.sparse.values]
        return self._delta.relax(self.sparse, dense, rate=rate, weight_decay=weight_decay, max_norm=max_norm, seed=seed)

    def unrelax(self, optimizer: Any) -> None:
        """Undo `relax`: the weights have their pretrained values, and gradients are the diff's again."""
        assert self.sparse is not None
        optimizer.restore()
        self.sparse.hook()

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that are trained (not the weights that a sparse diff is written into)."""
        trained = ((name, p) for name, p in self.named_parameters() if p.requires_grad)
        return ((name, p) for name, p in trained if self.sparse is None or not self.sparse.covers(p))

    @property
    def delta(self) -> WeightDelta | None:
        """The method, if it changes weights."""
        return self._delta

    @property
    def untrained(self) -> str | None:
        """Why nothing is trained; None if something is."""
        return None if any(True for _ in self.trained_parameters()) else self._nothing_trained()

    def _get_name(self) -> str:
        # The Trainer's label smoothing shifts labels by the class name of a causal language model.
        own_lm = self.__dict__.get("settings") is not None and self.settings.head is None
        return type(self.backbone).__name__ if own_lm and "backbone" in self._modules else type(self).__name__

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The task alone: trained parameters, side buffers, and weights that the checkpoint did not have."""
        self.fold.require_attached()
        destination = OrderedDict() if destination is None else destination
        tensors = self._named_tensors()
        for name in self._task_names:
            destination[prefix + name] = tensors[name] if keep_vars else tensors[name].detach()
        return destination

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Load a task's tensors; always strict, but over the task's names only.

        Raises:
            FoldError: if the model was detached.
            ValueError: if names are missing or unexpected, or a shape differs.
        """
        self.fold.require_attached()
        missing = sorted(set(self._task_names) - set(state_dict))
        unexpected = sorted(set(state_dict) - set(self._task_names))
        tensors = self._named_tensors()
        shapes = {
            name: (tuple(value.shape), tuple(tensors[name].shape))
            for name, value in state_dict.items()
            if name in tensors and value.shape != tensors[name].shape and not name.startswith("sparse.")
        }
        if missing or unexpected or shapes:
            raise ValueError(
                f"these weights are of another task: missing {some(missing)}; unexpected {some(unexpected)}; "
                f"other shapes {some(f'{name} {given} for {own}' for name, (given, own) in shapes.items())}"
            )
        with torch.no_grad():
            for name in self._task_names:
                if not name.startswith("sparse."):
                    tensors[name].copy_(state_dict[name])
        if self.sparse is not None:
            self.sparse.place_flat(state_dict["sparse.positions"], state_dict["sparse.values"])
        return _IncompatibleKeys([], [])

    def _named_tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write the task folder: config, weights, tokenizer or processor, model card (see `task_folder`)."""
        from sidestep.model import saving

        saving.save(self, folder, **kwargs)

    def detach_backbone(self) -> nn.Module:
        """See `detach`."""
        if self.fold.attached:
            with self.fold.turn:
                self.leave()
        return self.backbone

    def leave(self) -> None:
        """Be detached, within the fold's turn."""
        torch.clear_autocast_cache()  # of a context that is still open
        self.hooks.remove()
        backbones.uncheckpoint_blocks([place.module for place in self.places])
        self._wide.remove()
        if self.sparse is not None:
            self.sparse.revert()
            self.sparse.unhook()
        with torch.no_grad():
            for name, tensor in self._stored().items():
                tensor.copy_(self._originals[name])
                tensor.grad = None
        if self._delta is not None:
            self._delta.remove(self.trunk)
        self._before.restore(self.backbone)

    def _stored(self) -> dict[str, Tensor]:
        """The backbone's tensors whose values are the task's own."""
        if not self._originals:  # a walk through the modules takes longer than a switch's other steps
            return {}
        tensors = dict([*self.backbone.named_parameters(), *self.backbone.named_buffers()])
        return {name: tensors[name] for name in self._originals}

    @property
    def can_rest(self) -> bool:
        """Whether `rest` and `resume` work: the method has no modules of its own inside the backbone."""
        return self._delta is None or type(self._delta).remove is WeightDelta.remove

    def rest(self) -> Rest:
        """Leave the backbone as `detach` does; `resume` takes what this returns."""
        with self.fold.turn:
            values = {name: tensor.detach().clone() for name, tensor in self._stored().items()}
            rest = Rest(values, Before.of(self.backbone))
            self.leave()
        return rest

    def resume(self, rest: Rest) -> None:
        """Be attached again, exactly as before `rest`, or leave the backbone as it was.

        Raises:
            ValueError: if another task is attached to the backbone meanwhile.
        """
        check_attachable(self.backbone)
        with self.fold.turn:  # no thread calls the model before all is there
            self.hooks.put()
            try:
                self._resume(rest)
            except BaseException:  # out of memory, or stopped by hand
                self.leave()
                raise

    def _resume(self, rest: Rest) -> None:
        torch.clear_autocast_cache()
        self._wide.put()
        with torch.no_grad():
            for name, tensor in self._stored().items():
                tensor.copy_(rest.values[name])
        if self.sparse is not None:
            self.sparse.hook()
            self.sparse.write()
        if self.settings.checkpoint == "late":
            backbones.checkpoint_blocks(self.late_blocks())
        rest.flags.restore(self.backbone)


_LIKE: dict[type[nn.Module], type[SideModel]] = {}
"""What `_like` has made: one class for all models on a class of backbones."""


def _like(kind: type[nn.Module]) -> type[SideModel]:
    """`SideModel` by the name and with the signature of a backbone's class.

    The Trainer finds the names of labels by these two of a class (start_positions of one for question answering), and
    pipelines find by the name whether a model is of their task.
    """

    if kind in _LIKE:
        return _LIKE[kind]

    def forward(self: SideModel, *args: Any, **kwargs: Any) -> Any:
        return SideModel.forward(self, *args, **kwargs)

    # which `inspect` reads; types know no such attribute of functions
    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    forward.__doc__ = SideModel.forward.__doc__
    fields = {"forward": forward, "__module__": __name__, "__doc__": SideModel.__doc__}
    return _LIKE.setdefault(kind, type(kind.__name__, (SideModel,), fields))


def _blank_like(kind: type[nn.Module]) -> SideModel:
    """An attached model of this class without its state, which pickle or a copy sets."""
    cls = _like(kind)
    return cls.__new__(cls)


def _loss_of(output: Any) -> Tensor | None:
    """The loss in a model's output; a tuple does not say whether it begins with one."""
    return output.get("loss") if isinstance(output, ModelOutput) else None


def _scaled(output: Any, factor: Tensor) -> Any:
    """A model's output with its loss times a factor; a tuple begins with the loss."""
    if isinstance(output, tuple):
        return (output[0] * factor, *output[1:])
    output.loss = output.loss * factor
    return output


class _naming:
    """Turn a method's refusal into one that names the method and the backbone."""

    def __init__(self, record: Method, backbone: nn.Module) -> None:
        self.record, self.backbone = record, backbone

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError):
            raise UnsupportedBackbone(
                f"{self.record.name} does not work on {type(self.backbone).__name__}: {error}"
            ) from error


def check_attachable(backbone: nn.Module) -> None:
    """Raise unless nothing is attached to the backbone and it is not compiled.

    Raises:
        ValueError: if it is.
        TypeError: if it is no torch module.
    """
    if isinstance(backbone, SideModel):
        raise ValueError("this is an attached model already: call ss.detach(model) first, then attach again")
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"{type(backbone).__name__} is no torch module: pass a Hugging Face or timm model")
    for module in backbone.modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{type(backbone).__name__} is compiled: a compiled graph does not see hooks. "
                "Attach first, then torch.compile the attached model"
            )
        if is_hooked(module):
            raise ValueError(
                f"{type(backbone).__name__} has a task attached already: call ss.detach on the attached model first"
            )


def _at_end(write: Site | None) -> bool:
    return write is None or write.kind == "norm" or write.last


def _same_place(a: Site, b: Site) -> bool:
    return (a.kind, a.stack, a.index) == (b.kind, b.stack, b.index)


def _pads_left(mask: Tensor) -> bool:
    """Whether a text is padded on the left; a compiled pass counts as such, and a plan's batch does not."""
    if mask.is_meta or isinstance(mask, FakeTensor):
        return False
    return torch.compiler.is_compiling() or bool((mask[:, 0] == 0).any())


def _refuse_ignored(labels: Tensor) -> None:
    """Raise if the loss would leave out all classes or tokens, as the mean over none is no number."""
    # not on an accelerator, where to look would be to wait for it: there the collators have looked
    if labels.device.type != "cpu" or isinstance(labels, FakeTensor) or torch.compiler.is_compiling():
        return
    if labels.numel() and not labels.is_floating_point() and bool((labels == IGNORED).all()):
        raise ValueError(
            f"all {labels.numel()} labels of a batch are {IGNORED}, which the loss leaves out, so there is nothing to "
            "learn from: leave the batch out, or give no labels"
        )

"""SideModel: a frozen backbone, a method and a head. The one `nn.Module` that a user holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from sidestep import backbone as backbones
from sidestep.backbone import Digest
from sidestep.backbone.families import family_of
from sidestep.fold import Fold, Hooks
from sidestep.interface.offload import retie
from sidestep.interface.registry import Method
from sidestep.interface.sites import Site
from sidestep.methods import SideNet, method_of
from sidestep.model import build, saving
from sidestep.model.attachment import Attachment
from sidestep.model.before import Before
from sidestep.model.forward import Forward
from sidestep.model.inputs import Inputs
from sidestep.model.settings import Settings
from sidestep.model.token_loss import TokenLoss
from sidestep.model.trained import Trained, check_state, precisions, tensors_beyond_trunk


class SideModel(Forward):
    """A backbone with a method and a head attached. Make one with `attach` or `load`.

    It returns the backbone's own output type, or with a Sidestep head a `SequenceClassifierOutput` or
    `ImageClassifierOutput`. `state_dict()` is the task alone. That is what is trained, side buffers, and what the
    backbone's checkpoint did not have.

    Attributes:
        backbone: the backbone as given.
        settings: what it was attached with.
        record: the method as it is registered.
        side: the side network (for a method that changes weights, a probe that does nothing).
        delta: the method, if it changes weights.
        head: the Sidestep head, or None.
        sparse: the sparse diff of the backbone's weights that is trained in their place, or None.
        facts: what the backbone is, as a traced pass of it showed.
        places: the backbone's sites and the modules they sit on.
        fold: runs the method along a pass.
        token_loss: the loss of the backbone's own language model head without its logits, where that was asked for.
        attachment: what is on the backbone, and can be taken off.
        extras: what `save_pretrained` stores besides (tokenizer or processor, preprocessing, scores).
    """

    side: SideNet

    def __init__(self, backbone: nn.Module, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.record: Method = method_of(settings.method)
        self.extras: dict[str, Any] = {}
        self._digest: Digest | None = None
        build.check_devices(self.record, settings, backbone)
        retie(backbone)
        self.facts = backbones.facts_of(backbone)
        build.check_head(backbone, self.facts, settings.head)

        self.places = build.with_features(backbones.find_places(backbone), settings.head, self.facts)
        sites = [place.site for place in self.places]
        before, snapshot = Before.of(backbone), backbones.Snapshot(backbone)
        try:
            self.delta = build.built_delta(self.record, settings, backbone, backbones.trunk_of(backbone), self.places)
            side = build.built_side(self.record, settings, backbone, sites)
            mean_first = build.mean_first(self.record, settings, side, sites)
            backbones.freeze(backbone)
            self._assemble(backbone, side, before, mean_first)
        except BaseException:
            if "trained" in vars(self):
                self.trained.release()
            snapshot.restore()
            before.restore(backbone)
            raise

    def _assemble(self, backbone: nn.Module, side: SideNet, before: Before, mean_first: bool) -> None:
        """Put the parts together on a frozen backbone."""
        settings, sites, trunk = self.settings, [place.site for place in self.places], backbones.trunk_of(backbone)
        self.backbone = backbone
        self.attached_shapes = backbones.embedding_shapes(backbone)
        home = build.home_of(backbone, self.places)
        device = home.device or backbones.device_of(backbone)
        self.side = side.to(device=device)
        pool, through = self.pool, self._reads_own
        self.head = None
        if settings.head is not None:
            self.head = settings.head.build(build.head_width(side, sites, self.facts), pool).to(device=device)
        self.inputs = Inputs(backbone, self.facts, side, headed=self.head is not None)
        self.trained = Trained(self.record, settings, backbone, trunk, self.delta, through=through)
        self.sparse = self.trained.sparse
        self.fold = Fold(
            trunk,
            self.places,
            side,
            self.facts,
            family_of(backbone).grid,
            narrow=None
            if self.facts.head.mixed or self.facts.head.after is not None
            else build.single_token(backbone, side, self.delta, self._first_write(), sites, "own" if through else pool),
            mean_first=mean_first,
            through=through,
            frozen=self.delta is None,
            late=bool(self.late_blocks()),
            border=self._first_write(),
            keep=build.checked_keep(self.record, settings, side, self.delta),
            pools=self.head is not None,
            home=home,
            diff=self.sparse,
        )
        hooks = Hooks(self.fold, trunk if self.head is not None else backbone, trunk, self.places)
        recomputed = self.late_blocks() if settings.checkpoint == "late" else []
        backbones.checkpoint_blocks(recomputed)
        self.attachment = Attachment(backbone, trunk, before, self.trained, self.delta, self.fold, hooks, recomputed)
        # not by `state_dict` of the whole, which unpacks what bitsandbytes has packed
        parts = {"side": self.side, "head": self.head, "sparse": self.sparse}
        own = [f"{part}.{name}" for part, module in parts.items() if module is not None for name in module.state_dict()]
        self._task_names = (*own, *(f"backbone.{name}" for name in self.trained.originals))
        self.show_face()
        chunked = settings.lm_loss == "chunked" and self.writes is not None
        self.token_loss = TokenLoss(backbone, shifted=self.writes == "lm") if chunked else None
        self.train(before.training)

    @property
    def head_config(self) -> dict[str, Any] | None:
        """The head's config as JSON-ready values, with its read-out as it was resolved. None for the backbone's own."""
        return None if self.settings.head is None else {**self.settings.head.to_dict(), "pool": self.pool}

    def _first_write(self) -> Site | None:
        return build.first_write(self.settings, self.places, self.side, self.delta)

    def late_blocks(self) -> list[nn.Module]:
        """The blocks after the method's first write: those through which a gradient flows."""
        return build.blocks_after(self._first_write(), self.places)

    # --- mode ---------------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> SideModel:
        """Training mode for the method and the head. The backbone stays in eval mode unless noise was asked for.

        A method that changes the weights trains with the backbone's noise, behind the first block that it changes.
        """
        super().train(mode)
        if self.delta is None:
            backbones.set_noise(self.trunk, self.settings.backbone_noise if mode else None)
        elif self.delta.late:
            self.trunk.eval()
            for block in self.late_blocks():
                block.train(mode)
        else:
            backbones.hold_fronts(self.trunk)
        return self

    # --- which backbone it is on -------------------------------------------------------------------------------------

    @property
    def precisions(self) -> str:
        """The precisions of the backbone's weights without the task's, joined by "+". An own head counts as given."""
        return precisions(self.backbone, self.trunk, self.delta, self.trained.wide)

    @property
    def digest(self) -> Digest:
        """The digest of the backbone's pretrained weights, as they were at `attach`."""
        if self._digest is None:
            plain_name = self.delta.plain_name if self.delta is not None else str
            named = backbones.pretrained_tensors(self.backbone, self.trained.originals, plain_name)
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
        retie(self.backbone)
        kept = tensors_beyond_trunk(self.backbone, self.trunk, own=self.head is None, but=self.trained.originals)
        with self._without_diff():
            return backbones.digest_of(kept) if kept else None

    @contextmanager
    def _without_diff(self) -> Iterator[None]:
        """Within it the backbone's weights are the pretrained ones, also if a sparse diff is written into them."""
        if not self.fold.attached:
            build.check_attachable(self.backbone)  # under another task they would not be
        if not self.fold.attached or self.sparse is None:
            yield
            return
        with self.fold.turn, self.sparse.lifted():
            yield

    # --- the task ----------------------------------------------------------------------------------------------------

    @property
    def towers(self) -> dict[str, SideModel]:
        """The attached backbones by name. A `PairModel` has two. Here it is this one, without a name."""
        return {"": self}

    @property
    def parts(self) -> tuple[SideModel, ...]:
        """The attached backbones."""
        return (self,)

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that are trained (not the weights that a sparse diff is written into)."""
        trained = ((name, p) for name, p in self.named_parameters() if p.requires_grad)
        return ((name, p) for name, p in trained if self.sparse is None or not self.sparse.covers(p))

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
        """Load a task's tensors. It is always strict, but over the task's names only.

        Raises:
            FoldError: if the model was detached.
            ValueError: if names are missing or unexpected, or a shape differs.
        """
        self.fold.require_attached()
        tensors = self._named_tensors()
        check_state(state_dict, {name: tensors[name] for name in self._task_names})
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
        saving.save(self, folder, **kwargs)

    # --- on and off the backbone -------------------------------------------------------------------------------------

    def detach_backbone(self) -> nn.Module:
        """See `detach`."""
        if self.fold.attached:
            with self.fold.turn:
                self.attachment.leave()
        return self.backbone

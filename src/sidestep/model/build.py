"""What `attach` makes of a backbone, a method and a head, or the reason why they do not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from sidestep.backbone import Facts, is_encoder_decoder, prove_replay
from sidestep.backbone.families import Pool, family_of
from sidestep.backbone.shards import is_sharded
from sidestep.backbone.trunk import device_of
from sidestep.fold import is_hooked
from sidestep.fold.home import Home
from sidestep.interface.keep import Keep
from sidestep.interface.offload import devices_of, is_offloaded
from sidestep.interface.registry import Method
from sidestep.interface.sites import Place, Site, same_place
from sidestep.messages import some
from sidestep.methods import ProbeConfig, SideNet, UnsupportedBackbone, WeightDelta
from sidestep.methods.controls import Probe
from sidestep.model.heads import HeadConfig, Retrieve
from sidestep.model.settings import Settings
from sidestep.model.trainer_face import TrainerFace

SEVERAL = 2
"""From how many devices on a method's home has to be chosen."""


def check_attachable(backbone: nn.Module) -> None:
    """Raise unless nothing is attached to the backbone, it is whole, and it is not compiled.

    Raises:
        ValueError: if it is.
        TypeError: if it is no torch module.
    """
    refuse_zero3()
    if isinstance(backbone, TrainerFace):
        raise ValueError("this is an attached model already: call ss.detach(model) first, then attach again")
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"{type(backbone).__name__} is no torch module: pass a Hugging Face or timm model")
    if is_sharded(backbone):
        raise ValueError(
            f"{type(backbone).__name__} is sharded: attach to a whole backbone first, and then call ss.shard(model)"
        )
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


def refuse_zero3() -> None:
    """Refuse DeepSpeed's ZeRO-3. ZeRO-1 and ZeRO-2 leave the backbone whole.

    Raises:
        ValueError: saying what to do instead.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed's ZeRO-3 frees frozen weights in a second pass of the backbone (DeepSpeed#8130, "
            "transformers#47254). keep='replay' and checkpoint='late' make one, and ZeRO-3 was not tried without. "
            "Choose ZeRO-1 or ZeRO-2 (zero_optimization.stage). Or shard the frozen blocks instead: "
            "`sidestep train --shard`, or ss.shard(model)"
        )


def home_of(backbone: nn.Module, places: Sequence[Place]) -> Home:
    """Where the method and the head are put, if a backbone's modules run on several devices: where its last part runs.

    Nothing is said of a backbone on one device, because that may be moved.
    """
    if len(devices_of(backbone)) < SEVERAL:
        return Home()
    last = next(place.module for place in reversed(places) if any(True for _ in place.module.parameters()))
    return Home(device_of(last))


def check_devices(record: Method, settings: Settings, backbone: nn.Module) -> None:
    """Refuse what needs a whole backbone on one device, if its modules run on several.

    Raises:
        UnsupportedBackbone: naming the devices.
    """
    if len(devices := devices_of(backbone)) < SEVERAL:
        return
    method, why = record.implementation, ""
    if issubclass(method, WeightDelta):
        why = f"{record.name} changes weights of all blocks"
    elif method.replays:
        why = f"{record.name} runs its queries through the parts of each block"
    elif isinstance(settings.head, Retrieve):
        why = "a Retrieve head compares what two encoders give"
    elif settings.lm_loss == "chunked":
        why = "lm_loss='chunked' runs the language model's head by itself"
    if why:
        raise UnsupportedBackbone(
            f"the modules of {type(backbone).__name__} run on {some(sorted(map(str, devices)))}, and {why}: this was "
            "built for one device. Choose another method or setting (read, sherl and dtl work), or show one card "
            "(CUDA_VISIBLE_DEVICES=0) and place the rest on cpu or disk"
        )


def check_head(backbone: nn.Module, facts: Facts, head: HeadConfig | None) -> None:
    """Refuse a Sidestep head where it could not read the model's last hidden state.

    Raises:
        UnsupportedBackbone: saying what to do instead.
    """
    name = type(backbone).__name__
    if head is not None and head.reads_all and is_encoder_decoder(backbone):
        raise UnsupportedBackbone(
            f"a {type(head).__name__} head does not work on {name}: it reads a state for each token of the text, and "
            "this model's are its decoder's. Choose an encoder or a decoder (of T5 the encoder alone, T5EncoderModel)"
        )
    if head is None or facts.head.ends:
        return
    if facts.head.after is None:
        raise UnsupportedBackbone(
            f"a {type(head).__name__} head does not work on {name}: it reads a last hidden state of (batch, tokens, "
            "width), and this model gives none. Train the model's own head (head=None, on a For...Classification class)"
        )
    if head.pool == "mean_pre_norm":
        raise UnsupportedBackbone(
            f"pool='mean_pre_norm' reads what goes into the final norm, and {name} ends in something else: choose "
            "another pool"
        )


def with_features(places: Sequence[Place], head: HeadConfig | None, facts: Facts) -> list[Place]:
    """The places with what their sites tell of the head: the width of its vector, and whether it reads every token."""
    width = facts.head.after or places[-1].site.width
    features = width if head is None else head.features(width)
    every = head is not None and head.reads_all
    return [replace(place, site=replace(place.site, features=features, per_token=every)) for place in places]


def built_delta(
    record: Method, settings: Settings, backbone: nn.Module, trunk: nn.Module, places: Sequence[Place]
) -> WeightDelta | None:
    """The method, if it changes weights, with its own modules in the trunk.

    Raises:
        UnsupportedBackbone: if it does not work on this backbone.
    """
    if not issubclass(record.implementation, WeightDelta):
        return None
    _check_resident(record, backbone, places)
    delta = record.implementation(settings.method)
    with naming(record, backbone):
        delta.see(places)
        delta.insert(trunk)
        delta.check([name for name, parameter in trunk.named_parameters() if delta.moves(name, parameter)])
    return delta


def _check_resident(record: Method, backbone: nn.Module, places: Sequence[Place]) -> None:
    """Refuse to change weights of blocks that are brought from disk for each call, and dropped behind it."""
    if elsewhere := [place.name for place in places if is_offloaded(place.module)]:
        raise UnsupportedBackbone(
            f"{record.name} does not work on this {type(backbone).__name__}: it changes weights, and those of "
            f"{some(elsewhere)} are offloaded. Choose a method with a side network (such as read), or a device_map and "
            "max_memory that leave the blocks in memory"
        )


def built_side(record: Method, settings: Settings, backbone: nn.Module, sites: Sequence[Site]) -> SideNet:
    """The side network. A method that changes weights gets a probe, which does nothing.

    Raises:
        UnsupportedBackbone: if the method does not work on this backbone.
        ValueError: if it does not go with the head.
    """
    if not issubclass(record.implementation, SideNet):
        return Probe(ProbeConfig(), sites)
    with naming(record, backbone):
        record.implementation.check(settings.method, sites)
        if record.implementation.replays:
            prove_replay(backbone)
    # A method's constructor takes its config and the sites.
    side = record.implementation(settings.method, sites)
    if side.from_data and settings.head is not None:
        raise ValueError(
            f"{record.name} as configured starts by the loss of the backbone's own head on training rows, and "
            f"a {type(settings.head).__name__} head is none. Let the backbone write the labels as words, or "
            "choose a start without data"
        )
    if settings.head is not None and settings.head.reads_all and not side.gives_tokens:
        raise ValueError(
            f"{record.name} as configured gives one vector for a whole row, and a {type(settings.head).__name__} head "
            "reads every token: choose another method"
        )
    if settings.head is None and (side.pooled_width is not None or side.corrects):
        raise ValueError(
            f"{record.name} has a read-out of its own, which the own head of {type(backbone).__name__} does "
            "not read: pass head=ss.Classify(...), ss.Regress(...) or ss.Retrieve(...)"
        )
    return side


def checked_keep(record: Method, settings: Settings, side: SideNet, delta: WeightDelta | None) -> Keep:
    """How taps' inputs are kept, if the method has taps whose inputs can be kept in other ways than in full.

    Raises:
        ValueError: if it has none. "auto" is "full" then.
    """
    learns = any(True for _ in side.parameters())
    if settings.keep == "full" or (delta is None and side.splits and learns):
        return settings.keep
    if settings.keep == "auto":
        return "full"
    why = "what it needs of a hidden state in backward is not narrower than that state"
    if delta is not None:
        why = "it changes the backbone's weights, so gradients go through all blocks, and there are no taps"
    elif not learns:
        why = "it reads no block, and keeps nothing of them"
    raise ValueError(f"{record.name} does not go with keep={settings.keep!r}: {why}. Leave keep out")


def first_write(settings: Settings, places: Sequence[Place], side: SideNet, delta: WeightDelta | None) -> Site | None:
    """The first site at which the method changes what the backbone computes. None if it never does."""
    if delta is not None:
        return delta.border(places)
    return type(side).first_write(settings.method, [place.site for place in places])


def blocks_after(write: Site | None, places: Sequence[Place]) -> list[nn.Module]:
    """The blocks after a site: those through which a gradient flows."""
    if write is None:
        return []
    order = next(n for n, place in enumerate(places) if same_place(place.site, write))
    return [place.module for place in places[order + 1 :] if place.site.kind == "block"]


def mean_first(record: Method, settings: Settings, side: SideNet, sites: Sequence[Site]) -> bool:
    """Whether the head reads the tokens' mean before the final norm.

    Raises:
        ValueError: if the method writes behind that place only.
    """
    head = settings.head
    if head is None or head.pool != "mean_pre_norm" or side.pooled_width is not None:
        return False
    write = type(side).first_write(settings.method, sites)
    if write is not None and write.kind == "norm":
        raise ValueError(
            f'pool="mean_pre_norm" reads before the final norm, and {record.name} as configured writes behind '
            'it: choose pool="mean"'
        )
    return True


def single_token(
    backbone: nn.Module, side: SideNet, delta: WeightDelta | None, write: Site | None, sites: Sequence[Site], head: Pool
) -> Pool | None:
    """The single token that the method may be given, if it is known to be all that is read. `head`: by what."""
    staged = any(site.stage > 0 for site in sites)
    at_end = write is None or write.kind == "norm" or write.last
    if delta is not None or not side.tokenwise or staged or not at_end:
        return None
    if head != "own":
        return head if head in ("cls", "last") and side.pooled_width is None else None
    return "cls" if type(backbone).__name__ in family_of(backbone).first_token_heads else None


def head_width(side: SideNet, sites: Sequence[Site], facts: Facts) -> int:
    """Channels of what the head reads."""
    own = side.pooled_width
    return own if own is not None else facts.head.after or next(site.width for site in reversed(sites) if site.head)


@contextmanager
def naming(record: Method, backbone: nn.Module) -> Iterator[None]:
    """Turn a method's refusal into one that names the method and the backbone."""
    try:
        yield
    except ValueError as error:
        raise UnsupportedBackbone(f"{record.name} does not work on {type(backbone).__name__}: {error}") from error

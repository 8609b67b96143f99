"""Read a backbone while it runs, without touching it.

What each site means (all before a dropout or layer scale that may follow; in evaluation dropout does nothing):

- `resid_pre`: what enters the block. `embed` is what enters block 0: for BERT after the embedding norm, for ViT
  after positions, for CLIP after its pre-norm.
- `attn_out`, `mlp_out`: what the attention's (the MLP's) output projection writes. In pre-norm blocks
  resid_post = resid_pre + attn_out + mlp_out; where the model scales (DINOv2) or normalises (BERT, Gemma 2)
  that output, this is the value before.
- `resid_post`: what the block hands on. The last one is *before* the model's final norm, where it has one (GPT-2,
  Llama, ViT, CLIP …); the final hidden state after it is what `Backbone.forward` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layerprobe.errors import LayerprobeError, UnknownNameError, UsageError
from layerprobe.layers import EMBED, SITES, LayerRef

Pool = Callable[[Tensor], Tensor]


class Layout(Protocol):
    """Where the blocks of a model are; `layerprobe.backbones.layout.Layout` is one."""

    @property
    def n_blocks(self) -> int: ...
    @property
    def block_names(self) -> tuple[str, ...]: ...
    @property
    def attention_outputs(self) -> tuple[str | None, ...]: ...
    @property
    def mlp_outputs(self) -> tuple[str | None, ...]: ...
    @property
    def tokens_first(self) -> bool: ...
    @property
    def withheld(self) -> str | None: ...


class Hookable(Protocol):
    """What `capture` needs of a backbone."""

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def layout(self) -> Layout: ...


class _EnoughSeen(Exception):
    """Ends a forward pass once every requested layer was seen."""


class Capture(Mapping[LayerRef, Tensor]):
    """The captured tensors of the last forward pass, by layer. Made by `capture`."""

    def __init__(
        self, backbone: Hookable, layers: Sequence[LayerRef], *, pool: Pool | None, stop_early: bool
    ) -> None:
        self.layers = list(dict.fromkeys(layers))
        self._pool = pool
        self._stop_early = stop_early
        self._seen: dict[LayerRef, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._backbone = backbone
        self._shape = torch.Size()  # B×T×D of this pass
        check_layers(self.layers, backbone)

    def __enter__(self) -> Capture:
        layout, model = self._backbone.layout, self._backbone.model
        blocks = [model.get_submodule(name) for name in layout.block_names]
        writers = {"attn_out": layout.attention_outputs, "mlp_out": layout.mlp_outputs}
        try:
            self._handles.append(blocks[0].register_forward_pre_hook(self._note_shape, with_kwargs=True))
            for layer in self.layers:
                block = layer.block or 0
                if layer.site in ("resid_pre", EMBED):
                    hook = self._on_input(layer)
                    self._handles.append(blocks[block].register_forward_pre_hook(hook, with_kwargs=True))
                    continue
                module = blocks[block]
                if layer.site in writers:
                    module = model.get_submodule(writers[layer.site][block] or "")
                self._handles.append(module.register_forward_hook(self._on_output(layer)))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._remove()
        if kind is None:
            missing = [layer for layer in self.layers if layer not in self._seen]
            if missing:
                raise LayerprobeError(
                    f"{missing[0]} was requested but never ran in this forward pass; "
                    f"{len(self._seen)} of {len(self.layers)} requested layers did"
                )
        return kind is not None and issubclass(kind, _EnoughSeen)

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _note_shape(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._shape = (args[0] if args else kwargs["hidden_states"]).shape

    def _on_input(self, layer: LayerRef) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._take(layer, args[0] if args else kwargs.get("hidden_states"), module)

        return hook

    def _on_output(self, layer: LayerRef) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            # Blocks of transformers 5 return a tensor or a tuple that starts with it.
            self._take(layer, output[0] if isinstance(output, (tuple, list)) else output, module)

        return hook

    def _take(self, layer: LayerRef, value: object, module: nn.Module) -> None:
        if isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] == self._shape[:2].numel():
            value = value.view(self._shape[0], self._shape[1], -1)  # OPT runs its MLP on (B·T)×D
        if not isinstance(value, Tensor) or value.ndim != 3:
            found = f"{value.ndim}-dimensional tensor" if isinstance(value, Tensor) else type(value).__name__
            raise LayerprobeError(
                f"{layer}: expected B×T×D activations from {type(module).__name__}, got a {found}"
            )
        value = value.detach()
        if self._backbone.layout.tokens_first:
            value = value.transpose(0, 1)
        kept = value if self._pool is None else self._pool(value)
        if kept.untyped_storage().data_ptr() == value.untyped_storage().data_ptr():
            # Some blocks add in place afterwards, and a view would keep the whole tensor alive.
            kept = kept.clone()
        self._seen[layer] = kept
        if self._stop_early and len(self._seen) == len(self.layers):
            raise _EnoughSeen

    def __getitem__(self, layer: LayerRef) -> Tensor:
        return self._seen[layer]

    def __iter__(self) -> Iterator[LayerRef]:
        return (layer for layer in self.layers if layer in self._seen)

    def __len__(self) -> int:
        return len(self._seen)


def capture(
    backbone: Hookable,
    layers: Sequence[LayerRef],
    *,
    pool: Pool | None = None,
    stop_early: bool = False,
) -> Capture:
    """A context manager that captures layers of every forward pass inside it.

    >>> with capture(backbone, [LayerRef(0), LayerRef(3, "mlp_out")]) as seen:   # doctest: +SKIP
    ...     backbone(pixels)
    >>> seen[LayerRef(0)].shape                                                  # doctest: +SKIP
    torch.Size([8, 64, 384])

    Parameters
    ----------
    backbone : Hookable
        Anything with `.model`, `.layout` and `.name`.
    layers : Sequence[LayerRef]
        Which places; order is kept.
    pool : Pool | None
        Applied to each B×T×D tensor on its device at once, so that no whole activation is kept.
    stop_early : bool
        End the forward pass when the last requested layer was seen; code after the call in the `with` body is
        then skipped.

    Raises
    ------
    UnknownNameError
        A block that does not exist.
    UsageError
        A site this model has not.
    LayerprobeError
        On leaving, when a requested layer never ran.
    """
    return Capture(backbone, layers, pool=pool, stop_early=stop_early)


def check_layers(layers: Sequence[LayerRef], backbone: Hookable) -> None:
    """Refuse layers that the backbone has not, before anything runs."""
    layout = backbone.layout
    writers = {"attn_out": layout.attention_outputs, "mlp_out": layout.mlp_outputs}
    if not layers:
        raise UsageError("no layers were requested")
    for layer in layers:
        if layer.block is None:
            continue
        if not 0 <= layer.block < layout.n_blocks:
            raise UnknownNameError(
                f"block {layer.block} does not exist: {backbone.name} has {layout.n_blocks} blocks "
                f"(0 to {layout.n_blocks - 1})"
            )
        if layer.site in writers and writers[layer.site][layer.block] is None:
            kind = "attention" if layer.site == "attn_out" else "MLP"
            if layout.withheld:
                raise UsageError(
                    f"{layer} is not offered for {backbone.name}: {layout.withheld}; use resid_pre and resid_post"
                )
            raise UsageError(
                f"{layer}: no {kind} output projection was found in {layout.block_names[layer.block]} "
                f"of {backbone.name} (looked for the last linear map of the model's width); "
                "use resid_pre and resid_post"
            )


def all_layers(n_blocks: int, sites: Sequence[str] = SITES, *, embed: bool = True) -> list[LayerRef]:
    """`embed` and every block's `sites`, from input to output."""
    refs = [LayerRef(block, site) for block in range(n_blocks) for site in sites]
    return ([LayerRef(None, EMBED)] if embed else []) + refs

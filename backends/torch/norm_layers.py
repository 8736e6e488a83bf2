"""The layers for the `norm_layer=` of networks: with the channels first, and with an activation for timm."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import nn

from polywhiten.torch.modules import GroupWhitening, IterNorm


class GroupWhiteningLayer(GroupWhitening):
    """`GroupWhitening` with the number of channels first, for networks that call `norm_layer(channels)`.

    torchvision's networks also take `functools.partial(GroupWhitening, 32)`. timm's networks keep only the keyword
    arguments of a partial, and `GroupWhitening` can't take its number of groups by keyword if the channels come first.

    Parameters
    ----------
    num_channels, num_groups
        As for `GroupWhitening`.
    **kwargs
        The other arguments of `GroupWhitening`.

    Raises
    ------
    TypeError, ValueError
        As for `GroupWhitening`.

    Examples
    --------
    >>> import functools
    >>> from polywhiten.torch.norm_layers import GroupWhiteningLayer
    >>> norm_layer = functools.partial(GroupWhiteningLayer, num_groups=8, eps=1e-3)
    >>> layer = norm_layer(64)
    >>> layer.num_channels, layer.num_groups, layer.eps
    (64, 8, 0.001)
    """

    # This is a class because timm would take a function for a layer with an activation, and leave the activation out.
    def __init__(self, num_channels: int, num_groups: int = 32, **kwargs: Any) -> None:
        super().__init__(num_groups, num_channels, **kwargs)

    def extra_repr(self) -> str:
        """Return the arguments, as `repr` shows them."""
        sizes, arguments = f"{self.num_groups}, {self.num_channels}", super().extra_repr()
        return f"{self.num_channels}, num_groups={self.num_groups}{arguments.removeprefix(sizes)}"


def iter_norm_act(
    num_features: int,
    *,
    act_layer: str | Callable[..., nn.Module] | None,
    apply_act: bool = True,
    act_kwargs: Mapping[str, Any] | None = None,
    inplace: bool = True,
    drop_layer: Callable[[], nn.Module] | None = None,
    **kwargs: Any,
) -> NormAct:
    """Return `IterNorm` with an activation, for networks of timm whose normalization layers include the activation.

    These are EfficientNet, RegNet, ResNetV2, DenseNet and others, for which timm rejects `IterNorm` with the message
    "No equivalent norm_act layer". There timm takes layers that aren't its own only as functions, and doesn't tell them
    the activation: use `functools.partial` to pass the one that the network normally has.

    Parameters
    ----------
    num_features : int
        As for `IterNorm`.
    act_layer : str, callable or None
        The activation: a name that timm knows, or a class of modules. None means no activation.
    apply_act : bool
        Whether this layer has an activation. timm's networks pass it.
    act_kwargs : mapping, optional
        Arguments of the activation.
    inplace : bool
        Whether the activation works in place, if it can.
    drop_layer : callable, optional
        Returns a module to put between normalization and activation.
    **kwargs
        The other arguments of `IterNorm`.

    Returns
    -------
    NormAct

    Raises
    ------
    TypeError, ValueError
        As for `IterNorm`.

    Examples
    --------
    >>> import functools
    >>> import timm  # doctest: +SKIP
    >>> from polywhiten.torch.norm_layers import iter_norm_act
    >>> norm_layer = functools.partial(iter_norm_act, act_layer="silu", group_size=16)
    >>> model = timm.create_model("efficientnet_b0", norm_layer=norm_layer)  # doctest: +SKIP
    """
    layer = IterNorm(num_features, **kwargs)
    return _with_activation(layer, act_layer if apply_act else None, act_kwargs, inplace, drop_layer)


def group_whitening_act(
    num_channels: int,
    num_groups: int = 32,
    *,
    act_layer: str | Callable[..., nn.Module] | None,
    apply_act: bool = True,
    act_kwargs: Mapping[str, Any] | None = None,
    inplace: bool = True,
    drop_layer: Callable[[], nn.Module] | None = None,
    **kwargs: Any,
) -> NormAct:
    """Return `GroupWhitening` with an activation, for networks of timm whose normalization layers include it.

    Parameters
    ----------
    num_channels, num_groups
        As for `GroupWhitening`.
    act_layer, apply_act, act_kwargs, inplace, drop_layer
        As for `iter_norm_act`.
    **kwargs
        The other arguments of `GroupWhitening`.

    Returns
    -------
    NormAct

    Raises
    ------
    TypeError, ValueError
        As for `GroupWhitening`.

    Examples
    --------
    >>> import functools
    >>> import timm  # doctest: +SKIP
    >>> from polywhiten.torch.norm_layers import group_whitening_act
    >>> norm_layer = functools.partial(group_whitening_act, num_groups=8, act_layer="relu")
    >>> model = timm.create_model("regnetx_002", norm_layer=norm_layer)  # doctest: +SKIP
    """
    layer = GroupWhitening(num_groups, num_channels, **kwargs)
    return _with_activation(layer, act_layer if apply_act else None, act_kwargs, inplace, drop_layer)


class NormAct(nn.Sequential):
    """A normalization layer `norm`, a layer `drop` and an activation `act`, in this order.

    Attributes
    ----------
    weight, bias : Parameter or None
        Those of `norm`. timm's networks look for them here to initialize them.

    Notes
    -----
    `load_state_dict` also accepts checkpoints of layers that are both normalization and activation, as timm's
    `BatchNormAct2d` is: what they have becomes that of `norm`.
    """

    norm: nn.Module
    drop: nn.Module
    act: nn.Module

    def __init__(self, norm: nn.Module, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(OrderedDict(norm=norm, drop=drop, act=act))

    @property
    def weight(self) -> nn.Parameter | None:
        return dict(self.norm.named_parameters(recurse=False)).get("weight")

    @property
    def bias(self) -> nn.Parameter | None:
        return dict(self.norm.named_parameters(recurse=False)).get("bias")

    def _load_from_state_dict(self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any) -> None:
        """Move entries of this layer in the state_dict, which PyTorch has copied, to `norm`, which loads them next."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = key.removeprefix(prefix)
            if name.split(".")[0] not in self._modules and f"{prefix}norm.{name}" not in state_dict:
                state_dict[f"{prefix}norm.{name}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _with_activation(
    layer: IterNorm | GroupWhitening,
    act_layer: str | Callable[..., nn.Module] | None,
    act_kwargs: Mapping[str, Any] | None,
    inplace: bool,
    drop_layer: Callable[[], nn.Module] | None,
) -> NormAct:
    """Return a normalization layer with its activation, which timm creates from a name or a class."""
    from timm.layers import create_act_layer

    act = create_act_layer(act_layer, **{"inplace": inplace, **(act_kwargs or {})})
    return NormAct(layer, nn.Identity() if drop_layer is None else drop_layer(), nn.Identity() if act is None else act)

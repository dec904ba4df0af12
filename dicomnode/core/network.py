"""The regressors: the paper's VGG-16 SSBR and the compact network, on one page.

Both take (B, 1, 128, 128) inputs as `core.preprocess` makes them and give (B,) slice scores.
"""

import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Simonyan and Zisserman 2015, configuration D; 0 is a 2 x 2 max pooling.
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
# The compact network looks at means over 2 x 2 pixels, 7 mm: what tells heights of the body is
# coarser, and convolutions at full width, bound by memory, took half of a training step.
# (channels, 3 x 3 convolutions) of each stage, the first of which halves the image.
POOL = 2
COMPACT = ((64, 2), (96, 3), (192, 2), (256, 2))


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """What is needed to build a network; stored with its weights."""

    kind: str = "compact"  # "compact" or "vgg16"
    width: float = 1.0  # of all channel counts
    normalised: bool = False  # batch normalisation after each convolution; folded at export
    gain: float = 1.0  # of the output: the larger, the sooner scores span a body; folded likewise

    def to_dict(self) -> dict[str, Any]:
        """Return the config as the manifest of a bundle holds it."""
        return asdict(self)


class Regressor(nn.Module):
    """Convolutional basis, global average pooling, one dense output.

    References
    ----------
    Yan, Lu, Summers 2018, "Unsupervised body part regression via spatially
    self-ordering convolutional neural networks"; Meine and Hering 2019, section 2.1.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        layers, channels = _basis(config)
        self.basis = nn.Sequential(*layers)
        self.head = nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the score of each slice.

        Parameters
        ----------
        x : (B, 1, H, W) uint8 or float
            Values 0..255 as `preprocess.to_input` gives them.

        Returns
        -------
        (B,) float
        """
        return self.regress(self.reduce(x))

    def reduce(self, x: Tensor) -> Tensor:
        """Return inputs as the convolutions take them: their dtype and size, (..., H, W).

        Apart from `regress` so that training varies the smaller images.
        """
        x = x.to(self.head.weight.dtype)
        return F.avg_pool2d(x, POOL) if self.config.kind == "compact" else x

    def regress(self, x: Tensor) -> Tensor:
        """Return the score of each reduced input, (B, 1, h, w) -> (B,)."""
        x = self.basis(x / 127.5 - 1)  # (B, 1, 64, 64) or 128 -> (B, channels, 4, 4)
        x = x.mean((2, 3))
        score: Tensor = self.head(x).squeeze(1)
        return score * self.config.gain


def build(config: NetworkConfig) -> Regressor:
    """Return an untrained network, channels last.

    Raises
    ------
    ValueError
        If the kind is unknown.
    """
    net = Regressor(config)
    for module in net.basis:
        if isinstance(module, nn.Conv2d):  # He et al. 2015: torch's own start fades with depth
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    # torch implements this form of `to` but does not declare it.
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


def fold(network: Regressor) -> Regressor:
    """Return the same function: normalisation folded into convolutions, gain into the head.

    The network must be in `eval()`.
    """
    config = replace(network.config, normalised=False, gain=1.0)
    if network.config == config:
        return network
    folded = build(config).eval()
    convs = [m for m in network.basis if isinstance(m, nn.Conv2d)]
    norms = [m for m in network.basis if isinstance(m, nn.BatchNorm2d)]
    targets = [m for m in folded.basis if isinstance(m, nn.Conv2d)]
    for i, (target, conv) in enumerate(zip(targets, convs, strict=True)):
        fused = nn.utils.fuse_conv_bn_eval(conv, norms[i]) if norms else conv
        target.load_state_dict(fused.state_dict())
    gain = network.config.gain
    folded.head.load_state_dict({k: v * gain for k, v in network.head.state_dict().items()})
    return folded


def narrowed(network: Regressor, dtype: torch.dtype = torch.bfloat16) -> Regressor:
    """Return a copy whose convolutions work in a narrower dtype, all but the first; to score.

    The mean and the head stay in float32 as well. Over 10,998 slices of real CT bfloat16 moves
    body heights by 0.10 mm (sd, 1.2 at most) so; with the first convolution narrowed too by 0.47
    mm (15), and with the head by 0.64 mm: air is one value all over an image, and what rounding
    does to it does not average out.
    """
    narrow = copy.deepcopy(network)
    first, *rest = narrow.basis
    narrow.basis = nn.Sequential(
        first, _To(dtype), *(layer.to(dtype) for layer in rest), _To(torch.float32)
    )
    return narrow.eval().requires_grad_(False)


class _To(nn.Module):
    """Another dtype from here on."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def _basis(config: NetworkConfig) -> tuple[list[nn.Module], int]:
    layers: list[nn.Module] = []
    channels = 1

    def convolution(count: int, stride: int = 1) -> None:
        nonlocal channels
        out = max(8, round(count * config.width / 8) * 8)
        layers.append(nn.Conv2d(channels, out, 3, stride, 1, bias=not config.normalised))
        if config.normalised:
            layers.append(nn.BatchNorm2d(out))
        layers.append(nn.ReLU(inplace=True))
        channels = out

    if config.kind == "vgg16":
        for count in VGG16:
            if count:
                convolution(count)
            else:
                layers.append(nn.MaxPool2d(2))
    elif config.kind == "compact":
        for count, depth in COMPACT:
            for i in range(depth):
                convolution(count, stride=2 if i == 0 else 1)
    else:
        raise ValueError(f"unknown network {config.kind!r}: compact or vgg16")
    return layers, channels

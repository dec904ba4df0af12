"""The two regressors have the size they are said to have, and folding keeps what they compute."""

import pytest
import torch
from torch import nn

from dicomnode.core import network
from dicomnode.core.network import NetworkConfig

# (channels in, channels out, side of the output) of every convolution, worked out from the
# published tables: 128 x 128 inputs of one channel, 3 x 3 kernels. Compact halves them first.
COMPACT = [
    (1, 64, 32), (64, 64, 32),
    (64, 96, 16), (96, 96, 16), (96, 96, 16),
    (96, 192, 8), (192, 192, 8),
    (192, 256, 4), (256, 256, 4),
]  # fmt: skip
VGG16 = [
    (1, 64, 128), (64, 64, 128),
    (64, 128, 64), (128, 128, 64),
    (128, 256, 32), (256, 256, 32), (256, 256, 32),
    (256, 512, 16), (512, 512, 16), (512, 512, 16),
    (512, 512, 8), (512, 512, 8), (512, 512, 8),
]  # fmt: skip


def on_meta(kind: str, **options) -> network.Regressor:
    """A network without memory or arithmetic: shapes alone."""
    with torch.device("meta"):
        return network.build(NetworkConfig(kind, **options))


def convolutions(net: network.Regressor) -> list[tuple[int, int, int]]:
    """(channels in, channels out, side of the output) as a forward pass meets them."""
    met: list[tuple[int, int, int]] = []
    for module in net.basis:
        if isinstance(module, nn.Conv2d):
            assert module.kernel_size == (3, 3)
            module.register_forward_hook(
                lambda m, _, out: met.append((m.in_channels, m.out_channels, out.shape[-1]))
            )
    net(torch.empty(1, 1, 128, 128, device="meta"))
    return met


def randomise(net: nn.Module, seed: int = 0) -> None:
    """Give normalisation layers statistics as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            n = module.num_features
            module.running_mean.copy_(torch.randn(n, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(n, generator=generator) + 0.5)
            with torch.no_grad():
                module.weight.copy_(torch.rand(n, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(n, generator=generator) * 0.3)


def inputs(n: int, size: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 1, size, size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(("kind", "table"), [("compact", COMPACT), ("vgg16", VGG16)])
def test_convolutions_are_those_of_the_table(kind, table):
    assert convolutions(on_meta(kind)) == table


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        # 9 * in * out + out of each convolution: 640 + 36928 + 55392 + 2 * 83040
        # + 166080 + 331968 + 442624 + 590080; the head has 256 + 1.
        ("compact", 1_790_049),
        # VGG-16's published 14,714,688 (with 3 channels in), less 2 * 9 * 64; head 512 + 1.
        ("vgg16", 14_714_688 - 1152 + 513),
    ],
)
def test_parameters_are_counted_by_hand(kind, count):
    assert sum(p.numel() for p in on_meta(kind).parameters()) == count


def test_the_compact_network_takes_less_than_a_third_of_a_gflop():
    macs = sum(9 * i * o * side**2 for i, o, side in convolutions(on_meta("compact"))) + 256
    assert 2 * macs == pytest.approx(0.287e9, rel=0.01)


def test_normalisation_adds_a_scale_and_a_shift_in_place_of_a_bias():
    plain, normalised = (
        sum(p.numel() for p in on_meta("compact", normalised=n).parameters()) for n in (False, True)
    )
    assert normalised - plain == sum(out for _, out, _ in COMPACT)


def test_half_the_width_is_half_the_channels_in_steps_of_eight():
    assert [o for _, o, _ in convolutions(on_meta("compact", width=0.5))] == [
        32, 32, 48, 48, 48, 96, 96, 128, 128,
    ]  # fmt: skip
    assert {o for _, o, _ in convolutions(on_meta("compact", width=0.001))} == {8}


@pytest.mark.parametrize("kind", ["compact", "vgg16"])
def test_a_batch_of_inputs_gives_a_batch_of_scores(kind):
    assert on_meta(kind)(torch.empty(5, 1, 128, 128, device="meta")).shape == (5,)


def test_a_score_does_not_depend_on_its_batch():
    net = network.build(NetworkConfig(width=0.25)).eval()
    x = inputs(3)
    with torch.inference_mode():
        together = net(x)
        alone = torch.cat([net(part) for part in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.shape == (3,)


def test_bytes_and_floats_give_the_same_score():
    net = network.build(NetworkConfig(width=0.25)).eval()
    x = inputs(1)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), net(x.float()))


def test_the_basis_sees_values_from_minus_one_to_one():
    net = network.build(NetworkConfig(width=0.25)).eval()
    seen = []
    net.basis.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten().tolist()))
    with torch.inference_mode():
        net(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 32, 32))
    assert set(seen[0]) == {-1.0, 1.0}


@pytest.mark.parametrize("kind", ["compact", "vgg16"])
def test_folding_keeps_the_function(kind):
    torch.manual_seed(0)
    net = network.build(NetworkConfig(kind, width=0.25, normalised=True)).eval()
    randomise(net)
    folded = network.fold(net)
    assert folded.config == NetworkConfig(kind, width=0.25, normalised=False)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert not folded.training
    x = inputs(2)
    with torch.inference_mode():
        expected, got = net.double()(x), folded.double()(x)
    assert expected[0] != expected[1]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_folding_takes_the_gain_into_the_head():
    net = network.build(NetworkConfig(width=0.25, gain=3.0)).eval()
    folded = network.fold(net)
    assert folded.config.gain == 1.0
    x = inputs(2)
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-5)


def test_reducing_and_regressing_is_scoring():
    net = network.build(NetworkConfig(width=0.25)).eval()
    x = inputs(2).float()
    reduced = net.reduce(x)
    assert reduced.shape == (2, 1, 64, 64)
    assert reduced[0, 0, 0, 0] == x[0, 0, :2, :2].mean()
    with torch.inference_mode():
        torch.testing.assert_close(net.regress(reduced), net(x))


def test_folding_leaves_a_network_without_normalisation_as_it_is():
    net = network.build(NetworkConfig(width=0.25))
    assert network.fold(net) is net


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="resnet"):
        network.build(NetworkConfig("resnet"))


def test_a_config_survives_its_manifest():
    config = NetworkConfig("vgg16", 0.5, True)
    assert NetworkConfig(**config.to_dict()) == config

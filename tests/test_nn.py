"""Networks: shapes with any leading dimensions, exact sizes, the Glorot start, and errors."""

import pytest
import torch
from torch import nn

from pyrovae.nn import ACTIVATIONS, MLP, NETWORKS, ConvDecoder, ConvEncoder, DenseDecoder, DenseEncoder, fold

LEADING = [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)]
IMAGES = [(1, 4, 4), (1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 27, 31), (1, 7, 5)]


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_take_any_leading_dimensions(network, leading):
    encoder, decoder = NETWORKS[network]
    shape = (2, 8, 9)
    code = encoder(shape, (16,), (5, 5, 3))(torch.rand(*leading, *shape))
    assert code.shape == (*leading, 13)
    assert decoder(13, (16,), shape)(code).shape == (*leading, 2, 8, 9)
    assert decoder(13, (16,), shape, heads=2)(code).shape == (*leading, 4, 8, 9)


@pytest.mark.parametrize("hidden", [(), (16, 7)])
@pytest.mark.parametrize("network", NETWORKS)
def test_features_are_what_the_last_layer_reads(network, hidden):
    encoder = NETWORKS[network][0]((2, 8, 9), hidden, (5, 3))
    x = torch.rand(3, 2, 2, 8, 9)
    features = encoder.features(x)
    assert features.shape == (3, 2, encoder.output.in_features)
    torch.testing.assert_close(encoder.output(features), encoder(x))


@pytest.mark.parametrize("shape", [(6,), (4, 5), (1, 2, 3, 4)])
def test_dense_networks_take_any_event_shape(shape):
    x = torch.rand(2, 3, *shape)
    code = DenseEncoder(shape, (), 5)(x)
    assert code.shape == (2, 3, 5)
    assert DenseDecoder(5, (7,), shape)(code).shape == x.shape


@pytest.mark.parametrize("shape", IMAGES)
def test_convolutions_give_the_exact_size_back(shape):
    code = ConvEncoder(shape, (16,), 5)(torch.rand(3, *shape))
    assert ConvDecoder(5, (16,), shape)(code).shape == (3, *shape)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_convolutions_of_every_depth(depth):
    channels = tuple(range(2, 2 + depth))
    code = ConvEncoder((1, 33, 47), (), 5, channels=channels)(torch.rand(2, 1, 33, 47))
    assert ConvDecoder(5, (), (1, 33, 47), channels=channels[::-1])(code).shape == (2, 1, 33, 47)


@pytest.mark.parametrize("network", NETWORKS)
def test_fold_equals_a_loop(network):
    encoder, decoder = NETWORKS[network]
    x, z = torch.rand(4, 3, 1, 9, 8), torch.randn(4, 3, 5)
    for net, inputs in [(encoder((1, 9, 8), (16,), 5), x), (decoder(5, (16,), (1, 9, 8)), z)]:
        net.double()
        inputs = inputs.double()
        assert torch.equal(net(inputs), net(inputs.flatten(0, 1)).unflatten(0, (4, 3)))
        loop = torch.stack([torch.stack([net(inputs[k, b]) for b in range(3)]) for k in range(4)])
        torch.testing.assert_close(net(inputs), loop, rtol=1e-12, atol=1e-12)


def test_fold_accepts_expanded_input():
    x = torch.rand(3, 1, 8, 8)
    convolution = nn.Conv2d(1, 2, 4)
    assert torch.equal(
        fold(convolution, x.expand(5, 3, 1, 8, 8), 3)[4], fold(convolution, x.repeat(5, 1, 1, 1), 3)[12:]
    )


def test_no_hidden_layers_is_one_linear():
    net = MLP(7, (), 4)
    assert len(net) == 1
    x = torch.rand(2, 3, 7)
    assert torch.equal(net(x), nn.functional.linear(x, net.output.weight, net.output.bias))
    assert net.output_bias is net.output.bias


def assert_uniform(weight, bound):
    """Within the bound and filling it: the maximum of n uniforms is below 0.95 of it with probability 0.95^n < 1e-6."""
    assert weight.numel() > 280
    assert 0.95 * bound < weight.abs().max() <= bound


def test_glorot_bounds_count_each_head_by_itself():
    net = MLP(784, (200, 200), (50, 50, 30))
    first, _, second, _, output = net
    assert_uniform(first.weight, (6 / 984) ** 0.5)
    assert_uniform(second.weight, (6 / 400) ** 0.5)
    for head, width in zip(output.weight.split([50, 50, 30]), [50, 50, 30], strict=True):
        assert_uniform(head, (6 / (200 + width)) ** 0.5)
    assert all((layer.bias == 0).all() for layer in (first, second, output))


def test_glorot_bounds_of_convolutions():
    encoder, decoder = ConvEncoder((3, 8, 8), (), 5), ConvDecoder(5, (), (3, 8, 8), heads=2)
    assert_uniform(encoder.convolutions[0].weight, (6 / (16 * (3 + 32))) ** 0.5)
    assert_uniform(encoder.convolutions[2].weight, (6 / (16 * (32 + 64))) ** 0.5)
    assert_uniform(decoder.convolutions[1].weight, (6 / (16 * (64 + 32))) ** 0.5)
    for head in decoder.convolutions[3].weight.split(3, dim=1):
        assert_uniform(head, (6 / (16 * (32 + 3))) ** 0.5)
    biases = [p for net in (encoder, decoder) for name, p in net.named_parameters() if "bias" in name]
    assert all((b == 0).all() for b in biases)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_parameter_gets_a_gradient(network):
    encoder, decoder = NETWORKS[network]
    nets = nn.Sequential(encoder((1, 8, 8), (16,), 5, "tanh"), decoder(5, (16,), (1, 8, 8), "tanh"))
    nets(torch.rand(3, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in nets.parameters())


@pytest.mark.parametrize("network", NETWORKS)
def test_output_bias_has_one_entry_per_output(network):
    decoder = NETWORKS[network][1](5, (16,), (3, 8, 8), heads=2)
    with torch.no_grad():
        zero = decoder(torch.zeros(1, 5))
        shift = torch.randn(6, 8, 8)
        decoder.output_bias.add_(shift.reshape(decoder.output_bias.shape))
        torch.testing.assert_close(decoder(torch.zeros(1, 5))[0], zero[0] + shift)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_name_and_by_class(name):
    assert type(MLP(3, (4,), 2, name)[1]) is type(MLP(3, (4,), 2, ACTIVATIONS[name])[1])


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ConvEncoder((1, 8, 3), (), 2), ValueError, "at least 4, got 8x3: give at most 1 channels"),
        (lambda: ConvDecoder(2, (), (1, 7, 8), channels=(1, 1, 1)), ValueError, "at least 8, got 7x8"),
        (lambda: ConvEncoder((64,), (), 2), ValueError, r"\(channels, height, width\), got \(64,\)"),
    ],
)
def test_errors_name_the_rule_the_value_and_the_fix(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("hidden", [(), (7,)])
def test_a_context_is_the_last_of_the_input(hidden):
    net = MLP(9, hidden, (3, 2)).double()
    x, context = torch.randn(4, 5, 6).double(), torch.randn(5, 3).double()
    joined = torch.cat([x, context.expand(4, 5, 3)], -1)
    torch.testing.assert_close(net(x, context), net(joined))
    every = torch.randn(2, 1, 3).double()  # the context may have the more dimensions
    assert net(x[0], every).shape == (2, 5, 5)
    torch.testing.assert_close(net(x[0], every)[1], net(x[0], every[1].expand(5, 3)))


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_take_a_context(network):
    make_encoder, make_decoder = NETWORKS[network]
    encoder, decoder = make_encoder((1, 8, 8), (7,), 5, context=3).double(), make_decoder(8, (7,), (1, 8, 8)).double()
    x, context = torch.rand(4, 1, 8, 8).double(), torch.randn(4, 3).double()
    code = encoder(x, context)
    assert code.shape == (4, 5)
    assert not torch.allclose(code, encoder(x, context + 1))
    y = decoder(code, context)
    assert y.shape == x.shape
    torch.testing.assert_close(y, decoder(torch.cat([code, context], -1)))
    torch.testing.assert_close(encoder(x.expand(2, 4, 1, 8, 8), context)[1], code)

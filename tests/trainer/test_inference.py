"""A backbone made ready to sample from: its numbers are those of the plain model in the precision asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from featcache.errors import UserError
from trainer.diffusion.guidance import Guidance
from trainer.models import Transformer, build_model, model_config
from trainer.sampling.draw import SampleConfig, draw_latents
from trainer.sampling.inference import Arithmetic, Network, applied, choose_arithmetic


def backbone(name: str = "SiT-Ti/2") -> Transformer:
    """With weights that matter: a fresh model predicts zero."""
    cfg = model_config(name, latent_channels=4, latent_size=8, num_classes=10)
    model = build_model(cfg).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    return x, torch.rand(3, generator=generator), torch.tensor([0, 5, 10])


@pytest.mark.parametrize("name", ["SiT-Ti/2", "DiT-Ti/2"])
def test_rounded_weights_change_no_bit_of_autocast(name: str) -> None:
    x, t, y = inputs()
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            expected = backbone(name)(x, t, y).prediction
        network = Network(backbone(name), Arithmetic(precision="bf16"))
        got = network(x, t, y).prediction
        exact = Network(backbone(name), Arithmetic())(x, t, y).prediction
    assert expected.dtype == torch.bfloat16 and got.dtype == torch.float32
    assert torch.equal(got, expected.float())
    assert 0 < (got - exact).abs().max() < 0.1 * exact.abs().max()
    block: Any = network.backbone.blocks[0]
    linear = block.attn.qkv.weight
    assert linear.dtype == torch.bfloat16
    assert network.backbone.t_embedder.mlp[0].weight.dtype == torch.float32


def test_plain_arithmetic_is_the_backbone_itself() -> None:
    x, t, y = inputs()
    with torch.inference_mode():
        assert torch.equal(Network(backbone(), Arithmetic())(x, t, y).prediction, backbone()(x, t, y).prediction)


@pytest.mark.slow
def test_compiled_samples_are_the_eager_ones_to_rounding() -> None:
    """And twice the same bytes."""
    config = SampleConfig(sampler="heun", steps=4, guidance=Guidance(scale=2.0))
    labels = torch.tensor([1, 2, 3])
    eager = draw_latents(Network(backbone(), Arithmetic()), labels, range(3), config)
    network = Network(backbone(), Arithmetic(compile=True))
    compiled, again = (draw_latents(network, labels, range(3), config) for _ in range(2))
    assert torch.equal(compiled, again)
    assert torch.allclose(compiled, eager, rtol=1e-4, atol=1e-5)


def test_choices() -> None:
    assert choose_arithmetic("cpu") == Arithmetic(precision="fp32", compile=False)
    assert choose_arithmetic("cuda") == Arithmetic(precision="tf32", compile=True)
    assert choose_arithmetic("cuda:1", "fp32", False) == Arithmetic(precision="fp32", compile=False)
    for device, precision in (("cpu", "tf32"), ("cuda", "fp16")):
        with pytest.raises(UserError, match="precision"):
            choose_arithmetic(device, precision)


def test_tensor_float_32_is_set_for_the_block_alone() -> None:
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for precision, allowed in (("fp32", False), ("tf32", True), ("bf16", True)):
        with applied(Arithmetic(precision=precision)):
            assert [flag.allow_tf32 for flag in flags] == [allowed, allowed]
    assert [flag.allow_tf32 for flag in flags] == before


def test_failed_compilation_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(backbone(), Arithmetic())

    def fails(*_: object, **__: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no compiler\nmore")

    monkeypatch.setattr(network.backbone, "forward", fails)
    with pytest.raises(UserError, match="no compiler") as raised:
        network(*inputs())
    assert "--no-compile" in str(raised.value.remedy)

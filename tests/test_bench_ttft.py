import numpy as np
import oracle
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from bench import flops, published
from hivtp_kernels import PruneConfig

VISION = CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=32,
    patch_size=4,
    attn_implementation="eager",
)


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return CLIPVisionModel(VISION).eval()


def counted(call):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_vision_flops(tower):
    assert flops.vision_tower(VISION, images=2) == counted(lambda: tower(torch.randn(2, 3, 32, 32)))


def test_projector_flops():
    layers = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.GELU(), torch.nn.Linear(24, 24))
    assert flops.projector(32, 24, tokens=7) == counted(lambda: layers(torch.randn(7, 32)))


def test_prefill_flops():
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    assert flops.prefill(config, 9) == counted(
        lambda: model(torch.ones(1, 9, dtype=torch.long), logits_to_keep=1)
    )


def test_the_published_procedure_keeps_what_the_definition_keeps(tower):
    pixels, layers, config = torch.randn(2, 3, 32, 32), (0, 2), PruneConfig(grid=(8, 8))
    with torch.no_grad():
        features = published.encode(tower, pixels, layers, grid=(8, 8))
        out = tower(pixels, output_attentions=True, output_hidden_states=True)
    for image in range(2):
        maps = np.stack([out.attentions[layer][image].double().numpy() for layer in layers])
        kept = np.flatnonzero(oracle.select(maps.mean((0, 1, 2))[1:], config))
        torch.testing.assert_close(features[image], out.hidden_states[-2][image, 1:][kept])

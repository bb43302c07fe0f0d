"""LLaVA-1.5 whose projector reads one hidden state or several."""

import hivtp_transformers
import pytest
import tiny_llava
import torch
from reference import answer as expected
from tiny_llava import answer, build, one, rows_of

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("layers", [[-2], [-2, -5], [3, 8, 1]], ids=str)
def test_several(layers):
    model = build(vision_feature_layer=layers)
    ran = []
    for number, layer in enumerate(tiny_llava.tower(model).encoder.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    ((ids, images),) = rows_of(one())
    wanted = expected(model, ids, images, None, budget=100)
    ran.clear()
    with hivtp_transformers.apply(model, budget=100):
        assert torch.equal(answer(model, one())[0], wanted)
    assert ran == list(range(max(layer % 11 for layer in layers)))


def test_one_in_a_list_is_that_one():
    alone, listed = build(vision_feature_layer=-2), build(vision_feature_layer=[-2])
    with hivtp_transformers.apply(alone), hivtp_transformers.apply(listed), torch.no_grad():
        assert torch.equal(alone(**one()).logits, listed(**one()).logits)

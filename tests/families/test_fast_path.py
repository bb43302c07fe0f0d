"""What the pruned model does not do: no attention map, no last vision layer, no dropped row."""

import itertools

import hivtp_transformers
import pytest
import torch
from hivtp_transformers import towers
from hivtp_transformers.layout import Layout
from hivtp_transformers.policy import METHODS, Plan
from miniatures import MINIATURES
from tiny_llava import answer, one, three, tower
from torch.utils._python_dispatch import TorchDispatchMode


class Shapes(TorchDispatchMode):
    """Shapes of everything that any operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.seen.add(tuple(value.shape))
        return out


def test_no_attention_map_is_allocated(model):
    with hivtp_transformers.apply(model, rows="cls"), Shapes() as shapes:
        answer(model, one(), tokens=1)
    assert not any(shape[-2:] == (577, 577) for shape in shapes.seen)
    assert any(577 in shape for shape in shapes.seen), "the trace saw the tower"


@pytest.mark.parametrize("budget", [None, 100])
def test_last_layer_rests_and_projector_sees_kept_rows_only(model, budget):
    projected, ran = [], []
    hooks = [
        model.model.multi_modal_projector.register_forward_pre_hook(
            lambda module, args: projected.append(args[0].shape[:-1].numel())
        ),
        *(
            layer.register_forward_pre_hook(lambda module, args, i=i: ran.append(i))
            for i, layer in enumerate(tower(model).encoder.layers)
        ),
        tower(model).post_layernorm.register_forward_pre_hook(
            lambda module, args: pytest.fail("post_layernorm ran")
        ),
    ]
    try:
        with hivtp_transformers.apply(model, budget=budget) as handle:
            answer(model, three())
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == list(range(9))
    assert projected == [sum(handle.stats.kept)]


def test_generate_builds_no_graph(model):
    enabled = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, args: enabled.append(torch.is_grad_enabled())
    )
    with hivtp_transformers.apply(model):
        answer(model, one(), tokens=1)
    hook.remove()
    assert enabled == [False]


def test_mask_of_ones_is_left_out(model):
    inputs = one()
    with hivtp_transformers.apply(model) as handle:
        assert "attention_mask" in handle.compact(**inputs)
        del inputs["attention_mask"]
        assert "attention_mask" not in handle.compact(**inputs)


def test_taps_keep_nothing_outside_of_a_pruned_call(model):
    with hivtp_transformers.apply(model):
        answer(model, one(), tokens=1)
        assert towers._tapped.get() is None
        model.get_image_features(one()["pixel_values"])
        assert towers._tapped.get() is None


@pytest.mark.parametrize("method", METHODS)
def test_exact_budget_does_not_read_from_the_encoder(model, method):
    """A synchronisation would be a `.item()` or `.tolist()` of something the encoder made."""

    class Reads(TorchDispatchMode):
        encoding, reads = False, 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.convolution.default:
                self.encoding = True
            names = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select")
            if self.encoding and str(function).startswith(names):
                self.reads += 1
            return function(*args, **(kwargs or {}))

    with hivtp_transformers.apply(model, budget=100, method=method) as handle, Reads() as reads:
        handle.compact(**one())
    assert reads.encoding and not reads.reads


RULES = [("hivtp", None), *itertools.product(METHODS, (100, 0.3))]


@pytest.mark.parametrize(("method", "budget"), RULES)
@pytest.mark.parametrize("name", MINIATURES)
def test_nothing_is_copied_from_the_host_after_the_encoder(monkeypatch, name, method, budget):
    """Such a copy waits for the device. Here both are one, so `Tensor.to` is watched."""
    mini, moved = MINIATURES[name], []
    budget = 80 if budget == 100 and name == "llava_next" else 30 if budget == 100 else budget
    move = torch.Tensor.to

    def watched(tensor, *args, **kwargs):
        moved.extend(a for a in args if isinstance(a, torch.device))
        return move(tensor, *args, **kwargs)

    def watch(function):
        def wrapped(*args, **kwargs):
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "to", watched)
                return function(*args, **kwargs)

        return wrapped

    for owner, method_name in ((Plan, "select"), (Plan, "scores"), (Layout, "keep")):
        monkeypatch.setattr(owner, method_name, watch(getattr(owner, method_name)))
    with hivtp_transformers.apply(mini.model, budget=budget, method=method) as handle:
        handle.compact(**mini.inputs(1))
        assert not moved

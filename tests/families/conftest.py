import hivtp_transformers
import pytest
import tiny_llava


@pytest.fixture(scope="session")
def seeded_model():
    return tiny_llava.build()


@pytest.fixture
def model(seeded_model):
    """The shared tiny model; a test that leaves a trace on it fails."""
    before = set(seeded_model.__dict__)
    yield seeded_model
    if (handle := seeded_model.__dict__.get("_hivtp_handle")) is not None:
        handle.remove()
    # transformers remembers static caches by itself.
    remembered = {"_previous_max_cache_length", "_cache"}
    assert set(seeded_model.__dict__) - before <= remembered
    assert not seeded_model._forward_pre_hooks
    for layer in tiny_llava.tower(seeded_model).encoder.layers:
        assert not layer.self_attn.q_proj._forward_hooks
        assert not layer.self_attn.k_proj._forward_hooks


@pytest.fixture
def refuses(monkeypatch):
    """Check that every call of a pruned model refuses inputs before any work."""

    def check(model, inputs, message):
        with hivtp_transformers.apply(model) as handle:
            tower = handle._pruner.tower
            monkeypatch.setattr(tower, "encode", lambda _: pytest.fail("worked first"))
            for call in (model, model.generate, handle.compact):
                with pytest.raises(ValueError, match=message):
                    call(**inputs)

    return check

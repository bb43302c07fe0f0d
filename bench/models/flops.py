"""Flops up to the first token: matrix products only, with two flops per multiply-add."""


def vision_tower(config, images=1):
    """Flops of all layers of a CLIP vision tower; `config` is a `CLIPVisionConfig`."""
    width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
    tokens = patches + 1
    embed = 2 * patches * config.num_channels * config.patch_size**2 * width
    linear = 2 * tokens * width * (4 * width + 2 * config.intermediate_size)
    attention = 4 * tokens**2 * width
    return images * (embed + config.num_hidden_layers * (linear + attention))


def projector(vision_width, text_width, tokens):
    """Flops of LLaVA's two-layer projector for `tokens` visual tokens."""
    return 2 * tokens * text_width * (vision_width + text_width)


def prefill(config, tokens, batch=1):
    """Flops of a Llama's prefill, with attention counted over the whole square."""
    width, head_dim = config.hidden_size, config.head_dim
    q_width = config.num_attention_heads * head_dim
    kv_width = config.num_key_value_heads * head_dim
    linear = 2 * tokens * width * (2 * q_width + 2 * kv_width + 3 * config.intermediate_size)
    attention = 4 * tokens**2 * q_width
    return batch * (config.num_hidden_layers * (linear + attention) + 2 * width * config.vocab_size)

"""A tiny model of every family under one interface: inputs, and each row pruned by definition."""

from functools import cached_property
from types import MappingProxyType

import reference
import tiny_internvl
import tiny_llava
import tiny_llava_next
import tiny_onevision
import torch

from hivtp_kernels import PruneConfig


class Miniature:
    """LLaVA-1.5, by the paper's rule."""

    rule = MappingProxyType({})

    @cached_property
    def model(self):
        return tiny_llava.build()

    @property
    def options(self):
        """What `apply` is told."""
        return self.rule

    def inputs(self, *images, seed=0, tail=()):
        """A padded row for each number of images, with the text `tail` behind."""
        end = torch.tensor(tail, dtype=torch.long)
        rows = [
            torch.cat([self._prompt(n, before=3 + 4 * i, seed=seed + i), end])
            for i, n in enumerate(images)
        ]
        inputs = tiny_llava.batch(rows)
        return {**inputs, **self._pictures(sum(images), seed)}

    def _prompt(self, images, **text):
        return tiny_llava.prompt(images, **text)

    def _pictures(self, count, seed):
        return {"pixel_values": tiny_llava.photos(count, seed=seed)}

    def rows(self, inputs):
        return tiny_llava.rows_of(inputs)

    def embed(self, ids, images):
        return reference.embed(self.model, ids, images, PruneConfig())[0]

    def prompts(self, inputs):
        """The embeddings of each row `[1, T', C]` after pruning."""
        return [self.embed(ids, images) for ids, images in self.rows(inputs)]


class Next(Miniature):
    """LLaVA-NeXT, by budget."""

    rule = MappingProxyType({"budget": 300})
    size = (300, 900)

    @cached_property
    def model(self):
        return tiny_llava_next.build()

    def _prompt(self, images, **text):
        return tiny_llava_next.prompt(*[self.size] * images, **text)

    def _pictures(self, count, seed):
        pictures = tiny_llava_next.inputs_of([self.size] * count, seed=seed)
        return {name: pictures[name] for name in ("pixel_values", "image_sizes")}

    def rows(self, inputs):
        return tiny_llava_next.rows_of(inputs)

    def embed(self, ids, images):
        return tiny_llava_next.embed(self.model, ids, images, **self.rule)[0]


class Onevision(Miniature):
    """LLaVA-OneVision: an image of several tiles that is resized, or several of a tile each."""

    rule = MappingProxyType({"budget": 60})
    size = (380, 300)

    @cached_property
    def model(self):
        return tiny_onevision.build()

    @property
    def options(self):
        return {**self.rule, "layers": tiny_onevision.LAYERS}

    def inputs(self, *images, seed=0, tail=()):
        inputs = tiny_onevision.inputs_of(self.model, *([self.size] * n for n in images), seed=seed)
        ends = torch.tensor(tail, dtype=torch.long).expand(len(images), -1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ends], dim=1)
        mask = inputs["attention_mask"]
        inputs["attention_mask"] = torch.cat([mask, torch.ones_like(ends)], dim=1)
        return inputs

    def rows(self, inputs):
        return tiny_onevision.rows_of(self.model, inputs)

    def embed(self, ids, images):
        return tiny_onevision.embed(self.model, ids, images, **self.rule)[0]


class InternVL(Miniature):
    """InternVL, by the paper's rule."""

    @cached_property
    def model(self):
        return tiny_internvl.build()

    def _prompt(self, images, **text):
        return tiny_llava.prompt(images, patches=tiny_internvl.tokens_of(self.model), **text)

    def _pictures(self, count, seed):
        size = self.model.config.vision_config.image_size[0]
        return {"pixel_values": tiny_llava.photos(count, seed=seed, size=size)}

    def rows(self, inputs):
        return tiny_internvl.rows_of(self.model, inputs)

    def embed(self, ids, images):
        return tiny_internvl.embed(self.model, ids, images, PruneConfig(grid=(6, 6)))[0]


MINIATURES = {
    "llava": Miniature(),
    "llava_next": Next(),
    "llava_onevision": Onevision(),
    "internvl": InternVL(),
}

"""A tiny model of every family under one interface: inputs, and each row pruned by definition."""

from functools import cached_property
from types import MappingProxyType

import reference
import tiny_granite
import tiny_internvl
import tiny_llava
import tiny_llava_next
import tiny_mantis
import tiny_onevision
import tiny_vipllava
import torch


def arguments(image):
    """An image as the references take it: tiles alone, or with their size."""
    return image if isinstance(image, tuple) else (image,)


class Miniature:
    """LLaVA-1.5, in ratio mode."""

    # The references.
    module = reference
    # What `apply` is told.
    options = MappingProxyType({})
    # Height and width of an image.
    size = (336, 336)

    @cached_property
    def model(self):
        return tiny_llava.build()

    def inputs(self, *images, seed=0, tail=()):
        """A padded row for each number of images, with the text `tail` behind."""
        inputs = self.batch(*([self.size] * count for count in images), seed=seed)
        ends = torch.tensor(tail, dtype=torch.long).expand(len(images), -1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ends], dim=1)
        mask = inputs["attention_mask"]
        inputs["attention_mask"] = torch.cat([mask, torch.ones_like(ends)], dim=1)
        return inputs

    def batch(self, *rows, seed=0):
        """A padded row for each list of image sizes."""
        counts = [[len(self.image_of(size).positions) for size in row] for row in rows]
        inputs = tiny_llava.batch(tiny_llava.texts_around(counts, seed))
        if images := sum(map(len, rows)):
            pixels = self.model.config.vision_config.image_size
            inputs["pixel_values"] = tiny_llava.photos(images, seed=seed, size=pixels)
        return inputs

    def rows(self, inputs):
        """Ids of each row without padding, and its images."""
        return tiny_llava.rows_of(inputs, len(self.image_of(self.size).positions))

    def known(self, *rows):
        """What `token_count` is told besides sizes."""
        return {}

    def image_of(self, size, together=1):
        """Positions and grids of an image of this size, of which a row has so many."""
        return reference.layout(self.model)

    def importance(self, image):
        """fp64 `[units]`."""
        return self.module.importance(self.model, *arguments(image))

    def features(self, image):
        """`[positions, C]`, unpruned."""
        return self.module.features(self.model, *arguments(image))

    def embed(self, ids, images, **rule):
        """The embeddings of one row `[1, T', C]`, pruned by this rule or by that of `options`."""
        return self.module.embed(self.model, ids, images, **(rule or self.options))[0]

    def prompts(self, inputs, **rule):
        """The embeddings of each row."""
        return [self.embed(ids, images, **rule) for ids, images in self.rows(inputs)]

    def answers(self, inputs, tokens=6, **rule):
        """Greedy continuation of each row."""
        with torch.no_grad():
            prompts = self.prompts(inputs, **rule)
        return reference.continue_each(self.model, prompts, tokens)


class VipLlava(Miniature):
    """ViP-LLaVA, in ratio mode."""

    @cached_property
    def model(self):
        return tiny_vipllava.build()


class Mantis(Miniature):
    """LLaVA without a class token, whose first patch is not shown, by budget."""

    options = MappingProxyType({"budget": 30})

    @cached_property
    def model(self):
        return tiny_mantis.build(seed=3)


class Next(Miniature):
    """LLaVA-NeXT, by budget."""

    module = tiny_llava_next
    options = MappingProxyType({"budget": 300})
    size = (300, 900)

    @cached_property
    def model(self):
        return tiny_llava_next.build()

    def batch(self, *rows, seed=0):
        return tiny_llava_next.inputs_of(*rows, seed=seed, config=self.model.config)

    def rows(self, inputs):
        return tiny_llava_next.rows_of(inputs, self.model.config)

    def image_of(self, size, together=1):
        return tiny_llava_next.image_of(size, self.model.config)


class Granite(Next):
    """Granite Vision, by budget."""

    options = MappingProxyType({"budget": 90})
    size = (380, 300)

    @cached_property
    def model(self):
        return tiny_granite.build()


class Onevision(Miniature):
    """LLaVA-OneVision: an image of several tiles that is resized, or several of a tile each."""

    module = tiny_onevision
    options = MappingProxyType({"budget": 60})
    size = (380, 300)

    @cached_property
    def model(self):
        return tiny_onevision.build()

    def batch(self, *rows, seed=0):
        return tiny_onevision.inputs_of(self.model, *rows, seed=seed)

    def rows(self, inputs):
        return tiny_onevision.rows_of(self.model, inputs)

    def known(self, *rows):
        return {"batch_num_images": [len(row) for row in rows if row]}

    def image_of(self, size, together=1):
        count = tiny_onevision.count_of(self.model, size, together)
        return tiny_onevision.image_of(self.model, size, count)


class InternVL(Miniature):
    """InternVL, by budget: an image of two tiles and a small copy."""

    module = tiny_internvl
    options = MappingProxyType({"budget": 40})
    size = (168, 336)

    @cached_property
    def model(self):
        return tiny_internvl.build()

    def known(self, *rows):
        return {"processor": tiny_internvl.processor(self.model)}

    def _tiles(self, size):
        return tiny_internvl.count_of(self.model, size)

    def batch(self, *rows, seed=0):
        tiles = [[self._tiles(size) for size in row] for row in rows]
        return tiny_internvl.inputs_of(self.model, *tiles, seed=seed)

    def rows(self, inputs):
        return tiny_internvl.rows_of(self.model, inputs)

    def image_of(self, size, together=1):
        return tiny_internvl.image_of(self.model, self._tiles(size))


MINIATURES = {
    "llava": Miniature(),
    "vipllava": VipLlava(),
    "mantis": Mantis(),
    "llava_next": Next(),
    "granite": Granite(),
    "llava_onevision": Onevision(),
    "internvl": InternVL(),
}

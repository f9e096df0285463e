"""Write a recipe to a file, read it back, and see what it would do."""

from pathlib import Path

import timm

import manyheads as mh

recipe = mh.Recipe(
    mh.Swap(blocks=[10, 11], attention=mh.Hydra()),
    mh.Swap(ffn=mh.Compact(rank=0.5)),
)
Path("recipe.json").write_text(recipe.to_json() + "\n")

model = timm.create_model("deit_tiny_patch16_224")
print(mh.preview(model, mh.Recipe.read("recipe.json")))

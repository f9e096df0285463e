"""Count what Hydra saves at each resolution; no weights, no device, no data."""

import timm

import manyheads as mh

softmax = timm.create_model("deit_small_patch16_224")  # counting needs no weights
hydra = mh.convert(softmax, mh.Recipe(mh.Swap(attention=mh.Hydra())))

for size in ((224, 224), (384, 384), (1080, 1920), (2160, 3840)):
    before, after = (mh.cost(model, image_size=size) for model in (softmax, hydra))
    print(
        f"{size[0]:>4} x {size[1]:<4}  {before.flops / 1e9:7.1f} -> "
        f"{after.flops / 1e9:6.1f} GFLOPs, {before.flops / after.flops:5.2f} times less"
    )

"""Train a small ViT on digits, make its attention Hydra, heal it, keep it."""

import timm

import manyheads as mh
from manyheads.data import digits

train, test = digits(image_size=32)
teacher = timm.create_model(
    "vit_tiny_patch16_224", img_size=32, depth=4, num_classes=10
)
mh.train(teacher, train, epochs=1)

recipe = mh.Recipe(mh.Swap(blocks=range(2, 4), attention=mh.Hydra()))
print(mh.preview(teacher, recipe))  # nothing has changed yet

student = mh.convert(teacher, recipe)  # the teacher is untouched
print("before: ", mh.evaluate(teacher, test))
print("swapped:", mh.evaluate(student, test))
mh.heal(student, teacher, train[0], logit_epochs=2)
print("healed: ", mh.evaluate(student, test))

mh.save(student, "student")
student = mh.load("student")

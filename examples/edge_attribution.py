"""Which writers speak to which readers: every edge of a model, scored on a pair of prompts with `gim.circuits`."""

import gim.demo
from gim import circuits

model, tokenizer = gim.demo.load()
fact = "The password of Irene is {}. The password of Irene is"
pair = circuits.Pair(fact.format("lantern"), fact.format("copper"), " lantern", " copper")
found = circuits.attribute(model, [pair], tokenizer=tokenizer)
print(*found.top(10, absolute=True), sep="\n")

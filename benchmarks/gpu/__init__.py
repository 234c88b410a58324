"""The GPU kit: one command that tests and measures everything on a GPU within a few minutes.

`make gpu` runs the phases of `phases/` one after the other, the most valuable first. Each is a process of its own with
a time limit, and `gpu.json` is written anew after every result: a phase that crashes, hangs or runs out of memory takes
nothing with it. `make gpu DEVICE=cpu` goes through the same code at toy sizes. All phases but the last need torch,
triton, transformers, peft, safetensors and numpy alone, so they run on a machine where autopeft is not installed.
"""

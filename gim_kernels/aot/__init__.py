"""The kernels ahead of time: which variants are built, their compiled files, and what the compiled code consists of.

``python -m gim_kernels.aot build`` writes what ``CMakeLists.txt`` makes a C library of, ``python -m gim_kernels.aot
report`` the table of registers, memory and instructions. Neither needs a GPU or a CUDA toolkit: triton brings its own
compiler, assembler and disassembler.
"""

"""Measuring on a GPU what the kernels are worth, beside what a user could take instead.

shapes      which sizes of linears
peers       the others' linears, as plain PyTorch
candidates  everything timed at one size: the peers, and our kernels alone and together
turns       taking turns, and what many times say
timing      candidates captured in CUDA graphs
blocks      whole transformer blocks, and where their time goes
kernels     the run: size by size, each saved as it is done
results     rows and the file of a run
floors      what the kernels must reach, checked against a file
plots       roofline and bars
display     tables on a terminal
tensorrt    whole models as TensorRT engines, a package of its own
command     `qvdit bench`
"""

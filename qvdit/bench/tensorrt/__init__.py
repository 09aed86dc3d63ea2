"""Engines side by side, all built by the same TensorRT on this GPU: FP16, its own static INT8, and ours.

cases     one model as one engine on disk: its ONNX files, a reference run, what its weights take
prepare   writes cases. Needs PyTorch
measure   builds their engines, compares them with the references and times them in turns. Needs no PyTorch
results   rows and the file of a run
floors    what the engines must reach, checked against a file
display   tables on a terminal
plots     latency and weights as bars

TensorRT 8.6 has no Python in common with PyTorch: `qvdit bench tensorrt --prepare-only` writes the cases in one,
`python -m qvdit.bench.tensorrt` measures them in the other, `qvdit bench tensorrt --render` draws what came of it.
"""

"""TensorRT engines of a bundle: built, proven and run. Needs numpy and tensorrt; no PyTorch, CPython 3.10 or newer.

python -m qvdit.runtimes.tensorrt BUNDLE                       # build, prove; the engine lands beside its ONNX file
with TensorRtSession(BUNDLE) as session: session.infer(...)    # run it
"""

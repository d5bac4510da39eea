"""ONNX graphs of a merged model: written by torch, shrunk and run by onnxruntime."""

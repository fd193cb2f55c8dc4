"""To and from other code: checkpoints of CoOp's family and GalLoP, plain classifiers, ONNX, words.

``config`` is read by the command line before anything heavy is imported, so nothing is imported here.
"""

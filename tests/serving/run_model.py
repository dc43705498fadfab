"""Answers requests with src/export/model.py, without Triton.

    python tests/serving/run_model.py MODEL.py FOLDER < REQUESTS > RESPONSES

FOLDER is what `Preprocessor::save_for_numpy` wrote. Both streams hold one JSON object a line: a request is
`{"inputs": {name: [value, ...]}, "parameters": {...}}`, texts as lists of bytes and prices in words; a response is
`{"outputs": {name: [shape, values]}}` or `{"error": text}`.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
from triton_python_backend_utils import InferenceRequest, Tensor

TYPES = {"price": np.float64, "top_k": np.int32, "exclude_seen": np.bool_}


def array(name, values):
    """An input as Triton would hand it on."""
    if name in TYPES:
        values = np.array([float(value) if name == "price" else value for value in values], TYPES[name])
    elif name.endswith("_id"):
        values = np.array(values, np.int64)
    else:
        values = np.array([bytes(value) for value in values] + [None], np.object_)[:-1]
    return values if name in ("top_k", "exclude_seen") else values.reshape(-1, 1)


def plain(values):
    """An output for JSON."""
    texts = values.dtype == np.object_
    return values.shape, [list(value) if texts else value for value in values.reshape(-1).tolist()]


def main():
    """Requests in, responses out."""
    path, folder = map(Path, sys.argv[1:])
    spec = importlib.util.spec_from_file_location("model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({"model_repository": str(folder.parent), "model_version": folder.name})
    requests = []
    for line in sys.stdin:
        request = json.loads(line)
        tensors = [Tensor(name, array(name, values)) for name, values in request["inputs"].items()]
        requests.append(InferenceRequest(tensors, json.dumps(request["parameters"])))
    for response in model.execute(requests):
        if response.error is not None:
            print(json.dumps({"error": str(response.error)}))
        else:
            outputs = {tensor.name(): plain(tensor.as_numpy()) for tensor in response.output_tensors}
            print(json.dumps({"outputs": outputs}))


if __name__ == "__main__":
    main()

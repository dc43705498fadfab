"""Stands in for the module of this name that Triton's Python backend gives to its models."""


class Tensor:
    """A named array."""

    def __init__(self, name, array):
        self._name, self._array = name, array

    def name(self):
        """The tensor's name."""
        return self._name

    def as_numpy(self):
        """Its elements."""
        return self._array


class TritonError(Exception):
    """What a client gets instead of outputs."""

    INVALID_ARG = 3

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


class InferenceRequest:
    """Inputs, and parameters as JSON."""

    def __init__(self, inputs, parameters):
        self._inputs, self._parameters = inputs, parameters

    def inputs(self):
        """The tensors that came."""
        return self._inputs

    def parameters(self):
        """The parameters that came."""
        return self._parameters


class InferenceResponse:
    """Outputs, or an error."""

    def __init__(self, output_tensors, error=None):
        self.output_tensors, self.error = output_tensors, error
